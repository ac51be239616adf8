//! What the CPUID instruction tells a guest, as a table in guest terms: a profile, and the same profile made for one of the
//! VM's CPUs. A hypervisor's own module turns the table into what its kernel takes.
//!
//! Leaf numbers and fields: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.

use super::CpuModel;
use super::topology::Topology;

/// The most entries of a profile. Both hypervisors take 256, and some are added for topology and paravirtual features.
pub const ENTRIES_MAX: usize = 240;

/// Leaf 1: EDX says that the package may have several logical CPUs.
const HTT: u32 = 1 << 28;
/// And ECX that the local APIC has an x2APIC mode.
const X2APIC: u32 = 1 << 21;
/// Leaf 0x8000_0001: ECX says that those are cores.
const CMP_LEGACY: u32 = 1 << 1;
/// And that leaves 0x8000_001d and 0x8000_001e are there.
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
/// The leaves from here to [`PARAVIRTUAL_LAST`] are the hypervisor's own.
const PARAVIRTUAL: u32 = 0x4000_0000;
const PARAVIRTUAL_LAST: u32 = 0x4fff_ffff;
/// The first extended leaf, whose EAX is the last one.
const EXTENDED: u32 = 0x8000_0000;
/// Extended topology of both vendors, of newer Intel CPUs, of AMD's, and AMD's older one: made anew for each CPU.
const TOPOLOGY: [u32; 4] = [0xb, 0x1f, 0x8000_0026, 0x8000_001e];
/// Bits 25 to 14 of a cache's EAX: CPUs that share it, less one.
const CACHE_SHARERS: u32 = 0xfff << 14;

/// Whose rules for leaves hold. The rest of the table says whose CPU it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// A leaf beyond the last one reads as zeros.
    Amd,
    /// A leaf beyond the last one reads as the highest basic leaf.
    Intel,
}

/// The answer to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidEntry {
    /// EAX of the request.
    pub leaf: u32,
    /// ECX of the request; `None` answers every ECX that no other entry of the leaf has.
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX, EDX.
    pub values: [u32; 4],
}

/// A table of answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuidProfile {
    vendor: Vendor,
    entries: Vec<CpuidEntry>,
}

impl CpuidProfile {
    /// Makes a table of `entries`, of which no two have the same leaf and subleaf.
    pub fn new(vendor: Vendor, mut entries: Vec<CpuidEntry>) -> Self {
        // Kernels search in order and take what fits first: the entry for every ECX comes after those for one.
        entries.sort_by_key(|entry| {
            (
                entry.leaf,
                entry.subleaf.is_none(),
                entry.subleaf.unwrap_or(0),
            )
        });
        Self { vendor, entries }
    }

    /// Whose rules hold.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Ascending by leaf, then subleaf; the entry for every subleaf is a leaf's last.
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }

    /// What the table itself says, without the vendor's rule for leaves that it lacks.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
        self.entries
            .iter()
            .find(|entry| entry.leaf == leaf && entry.subleaf.is_none_or(|own| own == subleaf))
            .map(|entry| entry.values)
    }

    /// Whose CPU leaf 0 says this is, by the vendors' rules; `None` for other vendors, and without a leaf 0.
    pub fn named_vendor(&self) -> Option<Vendor> {
        let [_, b, c, d] = self.get(0, 0)?;
        let name = [b, d, c].map(u32::to_le_bytes).concat();
        match name.as_slice() {
            b"AuthenticAMD" | b"HygonGenuine" => Some(Vendor::Amd),
            b"GenuineIntel" => Some(Vendor::Intel),
            _ => None,
        }
    }

    /// Whether it has leaves of a hypervisor.
    pub fn has_paravirtual(&self) -> bool {
        self.entries.iter().any(CpuidEntry::is_paravirtual)
    }

    /// Whether guests take threads for cores: AMD's do on CPUs without topology extensions, whatever else they are told.
    pub fn hides_threads(&self) -> bool {
        let features = self.get(0x8000_0001, 0).map_or(0, |[_, _, ecx, _]| ecx);
        self.vendor == Vendor::Amd && features & TOPOLOGY_EXTENSIONS == 0
    }

    /// The same table with these entries too.
    #[must_use]
    pub fn with(&self, more: impl IntoIterator<Item = CpuidEntry>) -> Self {
        let entries = self.entries.iter().copied().chain(more).collect();
        Self::new(self.vendor, entries)
    }

    /// The same table, but the local APIC has no x2APIC mode.
    #[must_use]
    pub fn without_x2apic(&self) -> Self {
        let mut this = self.clone();
        for entry in this.entries.iter_mut().filter(|entry| entry.leaf == 1) {
            set(&mut entry.values[2], X2APIC, false);
        }
        this
    }

    /// What is worth writing down: without the hypervisor's leaves, which the host adds, and those that it makes anew for
    /// each CPU.
    #[must_use]
    pub fn portable(&self) -> Self {
        let first = self.for_cpu(Topology::of_cores(1), 0);
        let kept = |entry: &CpuidEntry| !entry.is_paravirtual() && !TOPOLOGY.contains(&entry.leaf);
        let entries = first.entries.into_iter().filter(kept).collect();
        Self::new(self.vendor, entries)
    }

    /// The table of one of a VM's CPUs: all that tells where the CPU is, and who shares what, is made for `topology`.
    #[must_use]
    pub fn for_cpu(&self, topology: Topology, cpu: u32) -> Self {
        let amd = self.vendor == Vendor::Amd;
        let mut entries = self.entries.clone();
        // AMD has no leaf 4.
        let made_anew = |leaf| TOPOLOGY.contains(&leaf) || amd && leaf == 4;
        entries.retain(|entry| !made_anew(entry.leaf));
        for entry in &mut entries {
            self.specialise(entry, topology, cpu);
        }
        let last = |first| self.get(first, 0).map_or(0, |[last, ..]| last);
        for leaf in [0xb, 0x1f] {
            if last(0) >= leaf {
                entries.extend(extended_topology(leaf, topology, cpu));
            }
        }
        if amd && last(EXTENDED) >= 0x8000_001e {
            entries.push(amd_topology(topology, cpu));
        }
        Self::new(self.vendor, entries)
    }

    fn specialise(&self, entry: &mut CpuidEntry, topology: Topology, cpu: u32) {
        let in_socket = topology.cpus_per_socket();
        let socket_bits = topology.socket_bits();
        let [a, b, c, d] = &mut entry.values;
        match (entry.leaf, self.vendor) {
            (1, vendor) => {
                // Intel counts the ids that a package has room for, AMD the CPUs.
                let logical = match vendor {
                    Vendor::Intel => 1 << socket_bits,
                    Vendor::Amd => in_socket,
                };
                *b = *b & 0x0000_ffff | logical.min(0xff) << 16 | topology.apic_id(cpu) << 24;
                set(d, HTT, in_socket > 1);
            }
            // Type 0: no more caches.
            (4, Vendor::Intel) if *a & 0x1f != 0 => {
                let cores = (1 << (socket_bits - topology.thread_bits())) - 1_u32;
                *a = *a & !0xfc00_0000 | cores.min(63) << 26;
                share_cache(a, topology);
            }
            (0x8000_001d, Vendor::Amd) if *a & 0x1f != 0 => share_cache(a, topology),
            (0x8000_0001, Vendor::Amd) => set(c, CMP_LEGACY, in_socket > 1),
            // CPUs of the package less one, and how many bits of the APIC id tell them apart.
            (0x8000_0008, Vendor::Amd) => {
                *c = *c & !0xf0ff | (in_socket - 1) & 0xff | socket_bits << 12;
            }
            _ => {}
        }
    }
}

impl CpuidEntry {
    /// Whether it is a leaf of a hypervisor.
    pub fn is_paravirtual(&self) -> bool {
        (PARAVIRTUAL..=PARAVIRTUAL_LAST).contains(&self.leaf)
    }
}

/// Says who shares a cache of leaf 4 or 0x8000_001d: levels 1 and 2 are a core's own, the others a socket's. Guests divide
/// APIC ids by the number, which therefore counts the ids of the core or socket, not its CPUs.
fn share_cache(eax: &mut u32, topology: Topology) {
    let level = *eax >> 5 & 7;
    let bits = match level {
        ..3 => topology.thread_bits(),
        _ => topology.socket_bits(),
    };
    *eax = *eax & !CACHE_SHARERS | ((1 << bits) - 1) << 14;
}

/// Leaf 0xb or 0x1f: level types 1 = thread, 2 = core, 0 = no more levels.
fn extended_topology(leaf: u32, topology: Topology, cpu: u32) -> [CpuidEntry; 3] {
    let id = topology.apic_id(cpu);
    let levels = [
        (topology.thread_bits(), topology.threads(), 1),
        (topology.socket_bits(), topology.cpus_per_socket(), 2),
        (0, 0, 0),
    ];
    [0, 1, 2].map(|level| {
        let (shift, cpus, kind) = levels[level as usize];
        CpuidEntry {
            leaf,
            subleaf: Some(level),
            values: [shift, cpus, level | kind << 8, id],
        }
    })
}

/// Leaf 0x8000_001e. Each socket is one node.
fn amd_topology(topology: Topology, cpu: u32) -> CpuidEntry {
    let place = topology.place(cpu);
    CpuidEntry {
        leaf: 0x8000_001e,
        subleaf: None,
        values: [
            topology.apic_id(cpu),
            (topology.threads() - 1) << 8 | place.core,
            place.socket,
            0,
        ],
    }
}

/// The table of CPU `cpu`: the model's profile, or else the `host`'s. A profile without leaves of a hypervisor gets
/// the host's, which guests know its clock by.
pub fn table(host: &CpuidProfile, model: &CpuModel, cpu: u32) -> CpuidProfile {
    match &model.profile {
        None if model.x2apic => host.for_cpu(model.topology, cpu),
        None => host.without_x2apic().for_cpu(model.topology, cpu),
        Some(profile) => {
            let own = host.entries().iter().copied();
            let own = own.filter(|entry| entry.is_paravirtual() && !profile.has_paravirtual());
            profile.with(own).for_cpu(model.topology, cpu)
        }
    }
}

/// Says so if guests will not see the threads that the model has.
pub fn warn_of_hidden_threads(host: &CpuidProfile, model: &CpuModel) {
    let profile = model.profile.as_deref().unwrap_or(host);
    if model.topology.threads() > 1 && profile.hides_threads() {
        log::warn!(
            "the guest will take threads for cores: its CPUID lacks AMD's topology extensions (leaf 80000001, ecx bit 22)"
        );
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests;
