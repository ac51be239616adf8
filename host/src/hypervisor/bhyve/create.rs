//! Making a VM: its name, the driver's version, and why it can't be made, with what to do about it.

use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::abi::*;
use super::driver::Driver;
use super::node::{self, Node};

/// How long a VM of the same name may take to go: its node stays until its last mapping is gone.
const GOING: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Opens the driver's control node, and refuses a driver that is too old.
pub(super) fn open<D: Driver>() -> Result<D> {
    let driver = D::open().map_err(|error| open_error(&error))?;
    let version = node::control_number(&driver, node::INTERFACE_VERSION, 0)
        .context("The vmm driver does not tell its version: update the system")?;
    check_version(version)?;
    Ok(driver)
}

/// Makes VM `name` and opens it. It ends with this process at the latest.
pub(super) fn make<D: Driver>(driver: &D, name: &str, flags: u64) -> Result<Node> {
    let field = name_field(name)?;
    create(driver, name, field, flags)?;
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
) -> Result<()> {
    let end = Instant::now() + GOING;
    loop {
        let mut request = VmCreateReq { name: field, flags };
        match node::control(driver, &node::CREATE_VM, &mut request) {
            Ok(_) => return Ok(()),
            // Also while an earlier VM of this name is being taken down.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && Instant::now() < end => {
                std::thread::sleep(LOOK_AGAIN);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(create_error(&error, name)),
        }
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
        Some(libc::EEXIST) => format!(
            "there is one already: stop it, or remove what was left behind with \"bhyvectl --destroy --vm={name}\""
        ),
        Some(libc::EPERM | libc::EACCES) => {
            "it may not be made from here: run as root, in a zone that may have VMs".into()
        }
        Some(libc::ENXIO) => {
            "this processor's virtualisation is turned off in the firmware setup, or another hypervisor holds it: turn it on, or \
             stop the other"
                .into()
        }
        Some(libc::EINVAL) => {
            "the driver refuses it: a zone may have one VM, so stop the one that this zone has".into()
        }
        Some(libc::ENOMEM) => "the system is out of memory: stop something".into(),
        _ => "the driver refuses it".into(),
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
            (libc::EEXIST, "bhyvectl --destroy --vm=guest"),
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
