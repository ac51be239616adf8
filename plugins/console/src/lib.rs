//! Character backends: unix socket, terminal, pty, file.
//!
//! The guest never waits for any of them. What it writes is copied into a `ring`, from which the host's I/O thread (socket
//! and pty, in `console`) or a thread of the backend's own (stdio and file, in `sink`) takes it at the reader's
//! pace; a reader that falls behind by more than the ring loses the oldest bytes and is told so. Input waits in the
//! client's end of the connection until the guest takes it.

mod client;
mod console;
mod escape;
mod file;
mod input;
mod output;
mod pty;
mod ring;
mod sink;
mod socket;
mod stdio;
#[cfg(target_os = "illumos")]
mod streams;
mod terminal;

use file::LogFile;
use pty::Pty;
use socket::Socket;
use stdio::Stdio;

vmm_plugin_api::plugin! {
    manifest: "plugin.toml",
    devices: {},
    blocks: {},
    chars: {
        "socket" => Socket,
        "stdio" => Stdio,
        "pty" => Pty,
        "file" => LogFile,
    },
}
