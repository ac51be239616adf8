//! `type = "socket"`: a unix stream socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, chmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, connect, listen, socket};
use vmm_plugin_api::{CharBackend, Events, Host, Options};

use crate::console::Console;

/// Token of the listening socket and of the timer that tries again.
const LISTEN: u64 = 1;
/// Clients at once; further ones wait until one leaves.
const CLIENTS: usize = 8;
/// Connections that wait.
const BACKLOG: i32 = 16;
const RETRY_NS: u64 = 1_000_000_000;

/// A listening socket and its clients.
pub(crate) struct Socket {
    console: Console,
    listener: UnixListener,
    file: SocketFile,
    host: Host,
}

impl CharBackend for Socket {
    fn create(options: &Options<'_>, host: &Host) -> Result<Self> {
        let path = options.str("path")?;
        let (listener, file) = open(Path::new(path))?;
        let console = Console::new(options.u64("buffer")?, host)?;
        host.watch(listener.as_fd(), Events::READ, LISTEN)?;
        if options.bool("wait")? {
            host.hold_startup(&format!(
                "a client on the unix socket {path}, for example `socat -,raw,echo=0 unix-connect:{path}`; Ctrl-C ends the wait"
            ))?;
        }
        Ok(Self {
            console,
            listener,
            file,
            host: host.clone(),
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
        if token != LISTEN {
            let before = self.console.clients();
            self.console.ready(token, events);
            if before == CLIENTS && self.console.clients() < CLIENTS {
                self.listen();
            }
        } else if events.timer() {
            self.listen();
        } else {
            self.accept();
        }
    }
}

impl Socket {
    fn listen(&self) {
        if let Err(error) = self.host.watch(self.listener.as_fd(), Events::READ, LISTEN) {
            self.host.log(
                log::Level::Error,
                format_args!("no more clients: {error:#}"),
            );
        }
    }

    fn accept(&self) {
        while self.console.clients() < CLIENTS {
            let added = match self.listener.accept() {
                Ok((stream, _)) => stream
                    .set_nonblocking(true)
                    .map_err(Into::into)
                    .and_then(|()| self.console.add(OwnedFd::from(stream))),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) => Err(error.into()),
            };
            match added {
                Ok(()) => self.host.release_startup(),
                Err(error) => {
                    // Out of descriptors, say: the connection waits, and so must we, or the I/O thread would spin.
                    self.host.log(
                        log::Level::Error,
                        format_args!(
                            "can't serve a client of {}: {error:#}",
                            self.file.path.display()
                        ),
                    );
                    self.host.unwatch(LISTEN);
                    if self
                        .host
                        .timer(LISTEN, Some(self.host.clock().saturating_add(RETRY_NS)))
                        .is_err()
                    {
                        self.listen();
                    }
                    return;
                }
            }
        }
        self.host.unwatch(LISTEN);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.host.unwatch(LISTEN);
    }
}

/// The socket's name in the file system, removed in the end if it is still ours.
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path) == Some(self.identity) {
            // Nothing to do about a directory that has become read-only.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Device and inode.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let meta = path.symlink_metadata().ok()?;
    Some((meta.dev(), meta.ino()))
}

/// Listens at `path`. A socket that nobody listens on any more is replaced.
fn open(path: &Path) -> Result<(UnixListener, SocketFile)> {
    let shown = path.display();
    let address = SocketAddrUnix::new(path).with_context(|| {
        format!(
            "the path {shown} does not fit a unix socket address (it has {} bytes, about 100 fit); give a shorter `path`",
            path.as_os_str().len()
        )
    })?;
    let fd = socket(AddressFamily::UNIX, SocketType::STREAM, None)
        .context("can't make a unix socket")?;
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    match bind(&fd, &address) {
        Err(Errno::ADDRINUSE) => {
            remove_stale(path, &address)?;
            bind(&fd, &address)
        }
        other => other,
    }
    .with_context(|| format!("can't make the unix socket {shown}"))?;
    let file = SocketFile {
        // The working directory may have changed by the time it is removed.
        path: std::path::absolute(path)?,
        identity: identity(path)
            .with_context(|| format!("the unix socket {shown} has vanished"))?,
    };
    // Whoever connects is at the guest's console. Nobody can before `listen`.
    chmod(path, Mode::RUSR | Mode::WUSR)
        .with_context(|| format!("can't restrict access to {shown}"))?;
    listen(&fd, BACKLOG).with_context(|| format!("can't listen on {shown}"))?;
    let listener = UnixListener::from(fd);
    listener.set_nonblocking(true)?;
    Ok((listener, file))
}

/// Removes the socket at `path` unless somebody listens on it.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<()> {
    let shown = path.display();
    let meta = path
        .symlink_metadata()
        .with_context(|| format!("can't look at {shown}"))?;
    if !meta.file_type().is_socket() {
        bail!("{shown} exists and is no socket; move it away or give another `path`");
    }
    // A socket of another kind can't connect to a stream socket, so that a live owner does not see a client come and go (it
    // may be waiting for its first). It fails in one way if there is an owner and in another if not.
    let probe =
        socket(AddressFamily::UNIX, SocketType::DGRAM, None).context("can't make a unix socket")?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path)
            .with_context(|| format!("can't remove the left-over socket {shown}")),
        Ok(()) | Err(Errno::PROTOTYPE) => {
            bail!(
                "another process listens on {shown}: is the VM running already? Stop it or give another `path`"
            )
        }
        Err(error) => Err(error).with_context(|| {
            format!(
                "{shown} exists and can't be checked for an owner; remove it or give another `path`"
            )
        }),
    }
}
