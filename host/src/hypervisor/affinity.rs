//! Which CPUs this machine has, and threads that run on one of them alone.

#[cfg(target_os = "linux")]
mod system {
    use anyhow::{Context, Result, ensure};
    use rustix::thread::{CpuSet, sched_setaffinity};

    /// Documentation/ABI/stable/sysfs-devices-system-cpu.
    const ONLINE: &str = "/sys/devices/system/cpu/online";

    /// The numbers of the CPUs that are online, ascending.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn online() -> Result<Vec<u32>> {
        let text = std::fs::read_to_string(ONLINE)
            .with_context(|| format!("can't tell which CPUs there are: {ONLINE}"))?;
        parse(text.trim()).with_context(|| format!("{ONLINE} is not understood: {text:?}"))
    }

    /// Reads "0-3,6".
    fn parse(text: &str) -> Option<Vec<u32>> {
        let mut cpus = Vec::new();
        for range in text.split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            cpus.extend(first.parse::<u32>().ok()?..=last.parse().ok()?);
        }
        Some(cpus)
    }

    /// Lets the calling thread run on CPU `cpu` only.
    ///
    /// # Errors
    /// There is no such CPU, or this process may not use it.
    pub fn bind(cpu: u32) -> Result<()> {
        ensure!(
            (cpu as usize) < CpuSet::MAX_CPU,
            "CPU {cpu} is beyond the last one that a thread can be bound to"
        );
        let mut only = CpuSet::new();
        only.set(cpu as usize);
        sched_setaffinity(None, &only).with_context(|| {
            format!("the system refuses CPU {cpu} (is it outside of this process's cpuset?)")
        })
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn lists_of_cpus_are_read() {
            assert_eq!(parse("0"), Some(vec![0]));
            assert_eq!(parse("0-2,5,8-9"), Some(vec![0, 1, 2, 5, 8, 9]));
            for bad in ["", "x", "1-", "1,,2"] {
                assert_eq!(parse(bad), None, "{bad:?}");
            }
        }

        #[test]
        fn a_thread_is_bound_to_the_cpu_it_asks_for() {
            let last = *online().unwrap().last().unwrap();
            let bound = std::thread::spawn(move || {
                bind(last)?;
                anyhow::Ok(rustix::thread::sched_getaffinity(None)?)
            });
            let set = bound.join().unwrap().unwrap();
            assert!(set.count() == 1 && set.is_set(last as usize), "{set:?}");
            let refused = std::thread::spawn(|| [bind(1000), bind(5000)]).join();
            assert!(refused.unwrap().iter().all(|result| result.is_err()));
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use anyhow::{Result, bail};

    const WHY: &str = "threads can't be bound to CPUs yet on";

    /// The numbers of the CPUs that are online, ascending.
    ///
    /// # Errors
    /// Not supported on this system.
    pub fn online() -> Result<Vec<u32>> {
        bail!("{WHY} {}", std::env::consts::OS)
    }

    /// Lets the calling thread run on CPU `cpu` only.
    ///
    /// # Errors
    /// Not supported on this system.
    pub fn bind(_: u32) -> Result<()> {
        bail!("{WHY} {}", std::env::consts::OS)
    }
}

pub use system::{bind, online};
