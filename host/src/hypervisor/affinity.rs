//! Which CPUs this machine has, and threads that run on one of them alone.
#![cfg_attr(target_os = "illumos", allow(unsafe_code))] // system calls that no safe wrapper has

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

#[cfg(target_os = "illumos")]
mod system {
    use std::io::Error;

    use anyhow::{Context, Result, ensure};

    /// processor_bind(2): the calling thread (sys/procset.h), which libc lacks.
    const P_MYID: libc::id_t = -1;
    /// What p_online(2) says of a processor that runs threads and takes no interrupts (sys/processor.h).
    const P_NOINTR: i32 = 6;

    /// The numbers of the CPUs that are online, ascending. In a zone with a pool of processors, those of the pool.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn online() -> Result<Vec<u32>> {
        // SAFETY: takes and changes nothing.
        let last = unsafe { libc::sysconf(libc::_SC_CPUID_MAX) };
        let last = u32::try_from(last).context("can't tell which CPUs there are")?;
        let cpus: Vec<u32> = (0..=last).filter(|&cpu| runs_threads(cpu)).collect();
        ensure!(!cpus.is_empty(), "the system says that no CPU is online");
        Ok(cpus)
    }

    fn runs_threads(cpu: u32) -> bool {
        let Ok(cpu) = libc::processorid_t::try_from(cpu) else {
            return false;
        };
        // SAFETY: takes numbers and, asked for the status alone, changes nothing. A number that is no CPU's gives -1.
        let status = unsafe { libc::p_online(cpu, libc::P_STATUS) };
        status == libc::P_ONLINE || status == P_NOINTR
    }

    /// Lets the calling thread run on CPU `cpu` only.
    ///
    /// # Errors
    /// There is no such CPU, it is not online, or this process may not use it.
    pub fn bind(cpu: u32) -> Result<()> {
        // Negative numbers would ask for the binding, or end it.
        let number = libc::processorid_t::try_from(cpu)
            .with_context(|| format!("CPU {cpu} is beyond the last one there can be"))?;
        // SAFETY: the kernel writes nothing where the place for the former binding is null.
        let code =
            unsafe { libc::processor_bind(libc::P_LWPID, P_MYID, number, std::ptr::null_mut()) };
        if code != 0 {
            return Err(Error::last_os_error()).with_context(|| {
                format!(
                    "the system refuses CPU {cpu} (is it offline, or outside of this zone's pool?)"
                )
            });
        }
        Ok(())
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        /// processor_bind(2): leaves the binding as it is.
        const PBIND_QUERY: libc::processorid_t = -2;

        #[test]
        fn a_thread_is_bound_to_the_cpu_it_asks_for() {
            let last = *online().unwrap().last().unwrap();
            let bound = std::thread::spawn(move || {
                bind(last)?;
                let mut now = -1;
                // SAFETY: the kernel writes one number to `now`.
                let code = unsafe {
                    libc::processor_bind(libc::P_LWPID, P_MYID, PBIND_QUERY, &raw mut now)
                };
                anyhow::Ok((code, now))
            });
            let bound = bound.join().unwrap().unwrap();
            assert_eq!(bound, (0, i32::try_from(last).unwrap()));
            for absent in [100_000, u32::MAX] {
                let refused = std::thread::spawn(move || bind(absent)).join().unwrap();
                let text = format!("{:#}", refused.unwrap_err());
                assert!(text.contains(&absent.to_string()), "{text}");
            }
        }
    }
}

pub use system::{bind, online};
