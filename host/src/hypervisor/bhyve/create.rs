//! Making a VM: its name, the driver's version, and why it can't be made, with what to do about it.

use std::io::{self, ErrorKind};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::abi::*;
use super::driver::Driver;
use super::node::{self, Node};
use crate::thread;

/// How long a VM of the same name may take to go: its node stays until its last mapping is gone.
const GOING: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How long the process that has a VM may take to let go of it once that is destroyed.
const LETTING_GO: Duration = Duration::from_secs(10);

/// Opens the driver's control node, and refuses a driver that is too old.
pub(super) fn open<D: Driver>() -> Result<D> {
    let driver = D::open().map_err(|error| open_error(&error))?;
    let version = node::control_number(&driver, node::INTERFACE_VERSION, 0)
        .context("The vmm driver does not tell its version: update the system")?;
    check_version(version)?;
    Ok(driver)
}

/// Makes VM `name` and opens it. It ends with this process at the latest. With `force` it takes the place of one of that name.
pub(super) fn make<D: Driver>(driver: &D, name: &str, flags: u64, force: bool) -> Result<Node> {
    let field = name_field(name)?;
    create(driver, name, field, flags, force)?;
    let opened = driver
        .instance(name)
        .with_context(|| format!("Cannot open /dev/vmm/{name}"));
    let instance = match opened {
        Ok(instance) => instance,
        Err(error) => {
            // Nobody has it open, so this does not wait. If it fails, the error to tell is the first.
            let mut request = VmDestroyReq { name: field };
            let _ = node::control(driver, &node::DESTROY_VM, &mut request);
            return Err(error);
        }
    };
    let node = Node::new(instance);
    node.number(node::SET_AUTODESTRUCT, 1)
        .context("bhyve refused to let the VM end with this process")?;
    Ok(node)
}

fn create<D: Driver>(
    driver: &D,
    name: &str,
    field: [u8; VM_MAX_NAMELEN],
    flags: u64,
    force: bool,
) -> Result<()> {
    let mut to_destroy = force;
    let mut end = Instant::now() + GOING;
    loop {
        let mut request = VmCreateReq { name: field, flags };
        match node::control(driver, &node::CREATE_VM, &mut request) {
            Ok(_) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && to_destroy => {
                log::warn!("VM {name} is there already; --force destroys it");
                destroy::<D>(name, field)?;
                to_destroy = false;
                end = Instant::now() + GOING;
            }
            // Also while an earlier VM of this name is being taken down.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && Instant::now() < end => {
                std::thread::sleep(LOOK_AGAIN);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(create_error(&error, name)),
        }
    }
}

/// Destroys the VM of that name, which takes until the process that has it lets go of it.
fn destroy<D: Driver>(name: &str, field: [u8; VM_MAX_NAMELEN]) -> Result<()> {
    let (told, answer) = mpsc::channel();
    // The request has no limit of time, so it is left behind if it takes too long.
    let request = move || {
        let driver = D::open()?;
        let mut request = VmDestroyReq { name: field };
        loop {
            match node::control(&driver, &node::DESTROY_VM, &mut request) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                answer => break answer,
            }
        }
    };
    thread::spawn("destroy", move || told.send(request()))
        .context("The system has no thread left")?;
    match answer.recv_timeout(LETTING_GO) {
        Ok(Ok(_)) => Ok(()),
        // It has gone meanwhile.
        Ok(Err(error)) if error.kind() == ErrorKind::NotFound => Ok(()),
        Ok(Err(error)) => Err(anyhow!(
            "bhyve refused to destroy the VM {name} that is there: {error}: run as root, in the zone that has the VM"
        )),
        Err(_) => Err(anyhow!(
            "VM {name} is destroyed, but still open in another process, which \"fuser /dev/vmm/{name}\" names: end that, and start \
             this again"
        )),
    }
}

/// The name as the driver takes it. What it would refuse is refused here, by what is wrong with it.
pub(super) fn name_field(name: &str) -> Result<[u8; VM_MAX_NAMELEN]> {
    let refused =
        |why: &str| anyhow!("[main] name = {name:?} can't be a VM's name on bhyve: {why}");
    ensure!(!name.is_empty(), refused("it is empty"));
    ensure!(!name.contains('/'), refused("it has a slash"));
    ensure!(!name.contains('\0'), refused("it has a zero byte"));
    ensure!(
        !matches!(name, "." | ".."),
        refused("it is that of a directory")
    );
    let mut field = [0; VM_MAX_NAMELEN];
    // The last byte stays zero.
    match field[..VM_MAX_NAMELEN - 1].get_mut(..name.len()) {
        Some(room) => room.copy_from_slice(name.as_bytes()),
        None => bail!(refused(&format!(
            "it has {} bytes, and {} are the most",
            name.len(),
            VM_MAX_NAMELEN - 1
        ))),
    }
    Ok(field)
}

fn check_version(version: i32) -> Result<()> {
    ensure!(
        version >= VERSION_MIN,
        "The vmm driver speaks version {version} of its interface, and {VERSION_MIN} is the oldest that this host knows: update \
         the system"
    );
    if version > VERSION_KNOWN {
        log::warn!(
            "the vmm driver speaks version {version} of its interface, which is newer than the {VERSION_KNOWN} that this host was \
             written for: if the guest fails, look for a newer vmm-host"
        );
    }
    Ok(())
}

fn open_error(error: &io::Error) -> anyhow::Error {
    let remedy = match (error.kind(), error.raw_os_error()) {
        (ErrorKind::NotFound, _) | (_, Some(libc::ENXIO | libc::ENODEV)) => {
            "install bhyve with \"pkg install system/bhyve\"; in a zone, add the devices /dev/vmmctl and /dev/vmm/* to its \
             configuration (zonecfg)"
        }
        (ErrorKind::PermissionDenied, _) => "run as root, for instance with pfexec",
        (_, Some(libc::EBUSY)) => {
            "another hypervisor holds this machine's virtualisation; stop it first"
        }
        _ => "the driver is there but can't be used now",
    };
    anyhow!("Cannot open /dev/vmmctl: {error}: {remedy}")
}

fn create_error(error: &io::Error, name: &str) -> anyhow::Error {
    let remedy = match error.raw_os_error() {
        Some(libc::EEXIST) => {
            "there is one already: stop it, or run this with --force, which destroys that one"
        }
        Some(libc::EPERM | libc::EACCES) => {
            "it may not be made from here: run as root, in a zone that may have VMs"
        }
        Some(libc::ENXIO) => {
            "this processor's virtualisation is turned off in the firmware setup, or another hypervisor holds it: turn it on, or \
             stop the other"
        }
        Some(libc::EINVAL) => {
            "the driver refuses it: a zone may have one VM, so stop the one that this zone has"
        }
        Some(libc::ENOMEM) => "the system is out of memory: stop something",
        _ => "the driver refuses it",
    };
    anyhow!("bhyve refused VM {name}: {error}: {remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        let field = name_field("guest-1").unwrap();
        assert!(field.starts_with(b"guest-1\0") && field.len() == 128);
        assert_eq!(name_field(&"x".repeat(127)).unwrap()[126..], *b"x\0");
        for (name, why) in [
            ("", "empty"),
            ("a/b", "slash"),
            ("a\0b", "zero byte"),
            ("..", "directory"),
            (&"ü".repeat(64), "128 bytes, and 127 are the most"),
        ] {
            let error = name_field(name).unwrap_err().to_string();
            assert!(
                error.contains(why) && error.contains("[main] name"),
                "{error}"
            );
        }
    }

    #[test]
    fn old_drivers_are_refused() {
        let error = check_version(15).unwrap_err().to_string();
        assert!(
            error.contains("version 15") && error.contains("update"),
            "{error}"
        );
        for version in [16, 18, 19] {
            check_version(version).unwrap();
        }
    }

    #[test]
    fn each_refusal_comes_with_a_remedy() {
        let of = io::Error::from_raw_os_error;
        for (errno, remedy) in [
            (libc::ENOENT, "pkg install system/bhyve"),
            (libc::EACCES, "pfexec"),
            (libc::EIO, "can't be used now"),
        ] {
            let error = open_error(&of(errno)).to_string();
            assert!(
                error.contains("/dev/vmmctl") && error.contains(remedy),
                "{error}"
            );
        }
        for (errno, remedy) in [
            (libc::EEXIST, "--force"),
            (libc::EPERM, "run as root"),
            (libc::ENXIO, "firmware setup"),
            (libc::EINVAL, "one VM"),
            (libc::EIO, "the driver refuses it"),
        ] {
            let error = create_error(&of(errno), "guest").to_string();
            assert!(
                error.contains("VM guest") && error.contains(remedy),
                "{error}"
            );
        }
    }
}
