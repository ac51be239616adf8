//! How a VM's CPUs lie in sockets, cores and threads, and the local APIC ids that follow from it.

use std::fmt;

/// The largest local APIC id of a CPU: ids have 8 bits, of which 255 means all (Intel SDM volume 3, 12.6.1).
pub const APIC_ID_MAX: u32 = 254;

/// Sockets, cores in each, threads in each of those: none is 0, and all CPUs are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    sockets: u32,
    cores: u32,
    threads: u32,
}

impl Topology {
    /// `sockets` of `cores` each of `threads`. `None` if one of them is 0, or an id would exceed [`APIC_ID_MAX`].
    pub fn new(sockets: u32, cores: u32, threads: u32) -> Option<Self> {
        let valid = [sockets, cores, threads]
            .iter()
            .all(|n| (1..=255).contains(n));
        let topology = Self {
            sockets,
            cores,
            threads,
        };
        (valid && topology.apic_id_max() <= APIC_ID_MAX).then_some(topology)
    }

    /// One socket of `cpus` cores with one thread each: what a VM has that asks for nothing else. From 1 to 254 CPUs.
    pub fn of_cores(cpus: u8) -> Self {
        Self {
            sockets: 1,
            cores: u32::from(cpus.clamp(1, APIC_ID_MAX as u8)),
            threads: 1,
        }
    }

    /// Sockets.
    pub fn sockets(self) -> u32 {
        self.sockets
    }

    /// Cores in each socket.
    pub fn cores(self) -> u32 {
        self.cores
    }

    /// Threads in each core.
    pub fn threads(self) -> u32 {
        self.threads
    }

    /// CPUs in all.
    pub fn cpus(self) -> u32 {
        self.sockets * self.cpus_per_socket()
    }

    /// CPUs in each socket.
    pub fn cpus_per_socket(self) -> u32 {
        self.cores * self.threads
    }

    /// Low bits of an APIC id that tell the threads of one core apart.
    pub fn thread_bits(self) -> u32 {
        bits(self.threads)
    }

    /// Low bits of an APIC id that tell the CPUs of one socket apart.
    pub fn socket_bits(self) -> u32 {
        self.thread_bits() + bits(self.cores)
    }

    /// The local APIC id of CPU `cpu`, counted from 0: threads count fastest, and each level has whole bits (Intel SDM
    /// volume 3, 10.9). It is the CPU's number wherever cores and threads are powers of two or there is one socket of
    /// single-threaded cores; elsewhere some numbers are left out.
    pub fn apic_id(self, cpu: u32) -> u32 {
        let Place {
            socket,
            core,
            thread,
        } = self.place(cpu);
        socket << self.socket_bits() | core << self.thread_bits() | thread
    }

    /// The APIC id of the last CPU.
    pub fn apic_id_max(self) -> u32 {
        self.apic_id(self.cpus() - 1)
    }

    /// Where CPU `cpu` is.
    pub fn place(self, cpu: u32) -> Place {
        Place {
            socket: cpu / self.cpus_per_socket(),
            core: cpu / self.threads % self.cores,
            thread: cpu % self.threads,
        }
    }
}

impl fmt::Display for Topology {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "sockets {} x cores {} x threads {}",
            self.sockets, self.cores, self.threads
        )
    }
}

/// Where one CPU is; each counts from 0 within the level above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The socket.
    pub socket: u32,
    /// The core in its socket.
    pub core: u32,
    /// The thread in its core.
    pub thread: u32,
}

fn bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(topology: Topology) -> Vec<u32> {
        (0..topology.cpus())
            .map(|cpu| topology.apic_id(cpu))
            .collect()
    }

    #[test]
    fn ids_count_where_levels_are_powers_of_two() {
        for cpus in [1, 3, 200, 254] {
            let expected: Vec<u32> = (0..cpus).collect();
            assert_eq!(ids(Topology::of_cores(cpus as u8)), expected);
        }
        let all: Vec<u32> = (0..16).collect();
        assert_eq!(ids(Topology::new(2, 4, 2).unwrap()), all);
        assert_eq!(ids(Topology::new(16, 1, 1).unwrap()), all);
    }

    #[test]
    fn ids_leave_gaps_elsewhere() {
        assert_eq!(ids(Topology::new(2, 3, 1).unwrap()), [0, 1, 2, 4, 5, 6]);
        assert_eq!(ids(Topology::new(1, 2, 3).unwrap()), [0, 1, 2, 4, 5, 6]);
        let topology = Topology::new(3, 3, 2).unwrap();
        assert_eq!(topology.apic_id(7), 1 << 3 | 1);
        let place = Place {
            socket: 1,
            core: 0,
            thread: 1,
        };
        assert_eq!(topology.place(7), place);
    }

    #[test]
    fn ids_fit_into_an_apic() {
        assert!(Topology::new(60, 3, 1).is_some());
        assert!(Topology::new(80, 3, 1).is_none());
        assert!(Topology::new(3, 65, 1).is_none());
        assert!(Topology::new(255, 1, 1).is_some());
        assert!(Topology::new(256, 1, 1).is_none());
        for zero in [[0, 1, 1], [1, 0, 1], [1, 1, 0]] {
            assert!(Topology::new(zero[0], zero[1], zero[2]).is_none());
        }
    }
}
