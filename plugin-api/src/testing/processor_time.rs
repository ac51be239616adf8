//! What a device's thread costs, for benches.

use std::time::Duration;

/// Processor time that the thread of this process with this name has had so far. Linux only: it is read from /proc.
///
/// # Panics
/// There is no such thread, or no /proc.
#[must_use]
#[allow(clippy::expect_used)] // for tests
pub fn processor_time(thread: &str) -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").expect("this needs Linux's /proc");
    for task in tasks {
        let task = task.expect("a thread").path();
        // One that has just ended has no name.
        let name = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
        if name.trim() == thread {
            let text = std::fs::read_to_string(task.join("schedstat")).expect("its time");
            let time = text.split(' ').next().and_then(|time| time.parse().ok());
            return Duration::from_nanos(time.expect("a number"));
        }
    }
    panic!("there is no thread {thread}");
}
