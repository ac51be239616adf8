//! How the host starts its threads.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Enough for a plugin's register access in a debug build. Less than 2 MiB: the system could back a stack of that size by one large
/// page, which takes its time to zero.
const STACK: usize = 1 << 20;

/// Starts a thread called `name`, of which 15 bytes show.
///
/// # Errors
/// The system is out of threads or memory.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new()
        .name(name.into())
        .stack_size(STACK)
        .spawn(body)
}
