//! `type = "pty"`: a new pseudo terminal.

use std::ffi::OsString;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pty::{OpenptFlags, grantpt, openpt, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use vmm_plugin_api::{CharBackend, Events, Host, Options};

use crate::console::Console;

/// The master side, with the slave side held open.
pub(crate) struct Pty {
    console: Console,
    /// While somebody has the slave open, the master never hangs up, however many programs come and go.
    _slave: OwnedFd,
    _link: Option<Link>,
}

impl CharBackend for Pty {
    fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
        let (master, slave, name) = open_pair().context("can't open a pseudo terminal")?;
        let link = options
            .maybe_str("link")?
            .map(|path| Link::new(Path::new(path), &name))
            .transpose()?;
        let console = Console::new(options.u64("buffer")?, host)?;
        console.add(master)?;
        host.log(
            log::Level::Info,
            format_args!("the console is on {}", name.display()),
        );
        Ok(Self {
            console,
            _slave: slave,
            _link: link,
        })
    }

    fn read(&self, buf: &mut [u8]) -> Option<usize> {
        self.console.read(buf)
    }

    fn write(&self, buf: &[u8]) -> usize {
        self.console.write(buf)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.console.fd())
    }

    fn ready(&self, token: u64, events: Events) {
        self.console.ready(token, events);
    }
}

/// A nonblocking master, its slave in raw mode, and the slave's path.
fn open_pair() -> Result<(OwnedFd, OwnedFd, PathBuf)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    fcntl_setfd(&master, FdFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = slave_name(&master)?;
    let slave = open(
        &name,
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .with_context(|| format!("can't open {}", name.display()))?;
    #[cfg(target_os = "illumos")]
    crate::streams::make_terminal(std::os::fd::AsFd::as_fd(&slave))?;
    // A terminal starts out as one for people: it would echo the guest's output back to the guest as input.
    let mut modes = tcgetattr(&slave)?;
    modes.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &modes)?;
    fcntl_setfl(&master, fcntl_getfl(&master)? | OFlags::NONBLOCK)?;
    Ok((master, slave, name))
}

fn slave_name(master: &OwnedFd) -> Result<PathBuf> {
    let name = rustix::pty::ptsname(master, Vec::new())?;
    Ok(OsString::from_vec(name.into_bytes()).into())
}

/// A symbolic link to the slave, removed in the end if it is still that.
struct Link {
    path: PathBuf,
    target: PathBuf,
}

impl Link {
    fn new(path: &Path, target: &Path) -> Result<Self> {
        let shown = path.display();
        match path.symlink_metadata() {
            Ok(meta) if meta.is_symlink() => {
                std::fs::remove_file(path)
                    .with_context(|| format!("can't replace the link {shown}"))?;
            }
            Ok(_) => bail!(
                "`link`: {shown} exists and is no symbolic link; move it away or give another name"
            ),
            Err(_) => {}
        }
        std::os::unix::fs::symlink(target, path)
            .with_context(|| format!("can't make the link {shown}"))?;
        Ok(Self {
            path: std::path::absolute(path)?,
            target: target.to_owned(),
        })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if std::fs::read_link(&self.path).is_ok_and(|target| target == self.target) {
            // Nothing to do about a directory that has become read-only.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
