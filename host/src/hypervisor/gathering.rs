//! Threads whose wake-up interrupts nobody, so that what wakes them goes on and leaves more work behind.
#![allow(unsafe_code)] // the scheduling policy of a thread

#[cfg(target_os = "linux")]
mod system {
    use std::io::{Error, Result};

    /// Makes the calling thread one of them, or one as at first. `false`, and nothing is changed: the thread has another policy
    /// than this would, which is the operator's choice (`chrt`).
    ///
    /// To Linux, `SCHED_BATCH` is `SCHED_OTHER` without preemption at a wake-up (sched(7)); share and nice value are the same, and
    /// going either way needs no right.
    ///
    /// # Errors
    /// The system refuses it.
    pub fn set(on: bool) -> Result<bool> {
        let (from, to) = match on {
            true => (libc::SCHED_OTHER, libc::SCHED_BATCH),
            false => (libc::SCHED_BATCH, libc::SCHED_OTHER),
        };
        if policy()? != from {
            return Ok(false);
        }
        let normal = libc::sched_param { sched_priority: 0 };
        // SAFETY: the kernel reads the parameters, which live during the call. Not libc's function, which musl lacks.
        let code = unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, to, &raw const normal) };
        if code < 0 {
            return Err(Error::last_os_error());
        }
        Ok(true)
    }

    fn policy() -> Result<i32> {
        // SAFETY: takes and changes nothing.
        match unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) } {
            policy @ 0.. => Ok(i32::try_from(policy).unwrap_or(-1)),
            _ => Err(Error::last_os_error()),
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_thread_changes_there_and_back_and_alone() {
            let changed = std::thread::spawn(|| {
                let before = policy()?;
                let there = set(true)?;
                let batch = (policy()?, set(true)?);
                let back = set(false)?;
                std::io::Result::Ok((before, there, batch, back, policy()?, set(false)?))
            });
            let changed = changed.join().unwrap().unwrap();
            let (normal, batch) = (libc::SCHED_OTHER, libc::SCHED_BATCH);
            assert_eq!(changed, (normal, true, (batch, false), true, normal, false));
            assert_eq!(policy().unwrap(), normal, "this thread");
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    /// Never: the scheduling classes of illumos (priocntl(2)) differ in priorities and time slices, and in all of them a thread that wakes
    /// up with a higher priority interrupts.
    ///
    /// # Errors
    /// None.
    pub fn set(_: bool) -> std::io::Result<bool> {
        Ok(false)
    }
}

pub use system::set;
