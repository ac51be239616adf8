use super::*;

fn entry(leaf: u32, subleaf: Option<u32>, values: [u32; 4]) -> CpuidEntry {
    CpuidEntry {
        leaf,
        subleaf,
        values,
    }
}

fn intel() -> CpuidProfile {
    let entries = vec![
        entry(0x8000_0008, None, [0x3028, 0, 0, 0]),
        entry(0x8000_0000, None, [0x8000_0008, 0, 0, 0]),
        // Two level 1, one level 2, one level 3, no more; the sharers are another machine's.
        entry(4, Some(0), [0xfc00_4121, 0x02c0_003f, 63, 0]),
        entry(4, Some(1), [0xfc00_4122, 0x01c0_003f, 63, 0]),
        entry(4, Some(2), [0xfc00_4143, 0x04c0_003f, 0x7ff, 0]),
        entry(4, Some(3), [0xfc1f_c163, 0x03c0_003f, 0xffff, 4]),
        entry(4, None, [0; 4]),
        entry(0, None, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        entry(1, None, [0x806f8, 0x7740_0800, 0xfffa_3203, 0x1f8b_fbff]),
        entry(0xb, Some(0), [5, 6, 7, 8]),
        entry(0xb, Some(4), [5, 6, 7, 8]),
    ];
    CpuidProfile::new(Vendor::Intel, entries)
}

fn amd() -> CpuidProfile {
    let entries = vec![
        entry(0, None, [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        entry(1, None, [0xa2_0f10, 0x7740_0800, 0xfffa_3203, 0x1f8b_fbff]),
        entry(4, None, [1, 2, 3, 4]),
        entry(0x8000_0000, None, [0x8000_0021, 0, 0, 0]),
        entry(0x8000_0001, None, [0xa2_0f10, 0, 0x0044_03f3, 0]),
        entry(0x8000_0008, None, [0x3030, 0, 0x0000_700f, 0]),
        entry(0x8000_001d, Some(0), [0x0003_c121, 0x01c0_003f, 63, 0]),
        entry(0x8000_001d, Some(3), [0x003f_c163, 0x03c0_003f, 0x7fff, 1]),
        entry(0x8000_001e, None, [9, 9, 9, 9]),
    ];
    CpuidProfile::new(Vendor::Amd, entries)
}

fn topology(sockets: u32, cores: u32, threads: u32) -> Topology {
    Topology::new(sockets, cores, threads).unwrap()
}

#[test]
fn an_entry_for_one_subleaf_goes_before_that_for_all() {
    let profile = CpuidProfile::new(
        Vendor::Amd,
        vec![
            entry(7, None, [1; 4]),
            entry(0xd, None, [2; 4]),
            entry(7, Some(1), [3; 4]),
            entry(2, None, [4; 4]),
        ],
    );
    assert_eq!(profile.get(7, 0), Some([1; 4]));
    assert_eq!(profile.get(7, 1), Some([3; 4]));
    assert_eq!(profile.get(7, 9), Some([1; 4]));
    assert_eq!(profile.get(3, 0), None);
    let order: Vec<_> = profile
        .entries()
        .iter()
        .map(|entry| (entry.leaf, entry.subleaf))
        .collect();
    assert_eq!(order, [(2, None), (7, Some(1)), (7, None), (0xd, None)]);
}

#[test]
fn the_vendor_is_the_one_that_leaf_0_names() {
    assert_eq!(intel().named_vendor(), Some(Vendor::Intel));
    assert_eq!(amd().named_vendor(), Some(Vendor::Amd));
    let other = vec![entry(0, None, [1, 2, 3, 4])];
    assert_eq!(CpuidProfile::new(Vendor::Amd, other).named_vendor(), None);
}

#[test]
fn intel_sockets_cores_and_threads() {
    // CPU 9 is socket 1, core 1, thread 1; ids have 1 bit for the thread, 2 for the core: 0b1_01_1.
    let table = intel().for_cpu(topology(2, 3, 2), 9);
    let get = |leaf, subleaf| table.get(leaf, subleaf).unwrap();
    assert_eq!(get(1, 0)[1], 0x0b08_0800);
    assert_eq!(get(1, 0)[3] & HTT, HTT);
    let cores = 3 << 26;
    assert_eq!(get(4, 0)[0], 0x121 | 1 << 14 | cores);
    assert_eq!(get(4, 2)[0], 0x143 | 1 << 14 | cores);
    assert_eq!(get(4, 3)[0], 0x163 | 7 << 14 | cores);
    assert_eq!(get(4, 4), [0; 4]);
    for leaf in [0xb, 0x1f] {
        assert_eq!(get(leaf, 0), [1, 2, 0x100, 0xb]);
        assert_eq!(get(leaf, 1), [3, 6, 0x201, 0xb]);
        assert_eq!(get(leaf, 2), [0, 0, 2, 0xb]);
        assert_eq!(table.get(leaf, 4), None, "the profile's own level is gone");
    }
    // Reserved on Intel.
    assert_eq!(get(0x8000_0008, 0), [0x3028, 0, 0, 0]);
    assert_eq!(table.get(0x8000_001e, 0), None);
}

#[test]
fn amd_sockets_cores_and_threads() {
    let table = amd().for_cpu(topology(2, 3, 2), 9);
    let get = |leaf, subleaf| table.get(leaf, subleaf).unwrap();
    assert_eq!(get(1, 0)[1], 0x0b06_0800);
    assert_eq!(get(0x8000_0001, 0)[2], 0x0044_03f3);
    assert_eq!(get(0x8000_0008, 0)[2], 0x3005);
    assert_eq!(get(0x8000_001d, 0)[0], 0x121 | 1 << 14);
    assert_eq!(get(0x8000_001d, 3)[0], 0x163 | 7 << 14);
    assert_eq!(get(0x8000_001e, 0), [0xb, 0x101, 1, 0]);
    assert_eq!(table.get(4, 0), None);
    // Its highest basic leaf is 0xd: 0xb is there, 0x1f is not.
    assert_eq!(get(0xb, 1), [3, 6, 0x201, 0xb]);
    assert_eq!(table.get(0x1f, 0), None);
}

#[test]
fn one_cpu_is_no_multiprocessor() {
    for (profile, logical) in [(intel(), 1), (amd(), 1)] {
        let table = profile.for_cpu(topology(2, 1, 1), 1);
        let [_, b, _, d] = table.get(1, 0).unwrap();
        assert_eq!((b, d & HTT), (0x0100_0800 | logical << 16, 0));
        assert_eq!(table.get(0xb, 1).unwrap(), [0, 1, 0x201, 1]);
    }
    let table = amd().for_cpu(topology(1, 1, 1), 0);
    assert_eq!(table.get(0x8000_0001, 0).unwrap()[2], 0x0044_03f1);
    assert_eq!(table.get(0x8000_0008, 0).unwrap()[2], 0);
}

#[test]
fn cores_of_one_socket_are_numbered_in_a_row() {
    let table = intel().for_cpu(Topology::of_cores(3), 2);
    assert_eq!(table.get(1, 0).unwrap()[1], 0x0204_0800);
    assert_eq!(table.get(4, 3).unwrap()[0], 0x163 | 3 << 14 | 3 << 26);
    assert_eq!(table.get(0xb, 1).unwrap(), [2, 3, 0x201, 2]);
    let many = amd().for_cpu(Topology::of_cores(254), 253);
    assert_eq!(many.get(1, 0).unwrap()[1], 0xfdfe_0800);
    assert_eq!(many.get(0x8000_0008, 0).unwrap()[2], 0x80fd);
}

#[test]
fn amd_without_topology_extensions_hides_threads() {
    assert!(!intel().hides_threads() && !amd().hides_threads());
    let entries = vec![entry(0x8000_0001, None, [0, 0, 3, 0])];
    assert!(CpuidProfile::new(Vendor::Amd, entries).hides_threads());
}

/// Whatever the topology that a profile was taken under, another one leaves no trace of it.
#[test]
fn specialising_twice_is_specialising_once() {
    let topologies = [(1, 1, 1), (2, 3, 2), (1, 254, 1), (4, 1, 2), (1, 5, 1)];
    for profile in [intel(), amd()] {
        for first in topologies {
            for second in topologies {
                let [first, second] = [first, second].map(|(s, c, t)| topology(s, c, t));
                let last = second.cpus() - 1;
                assert_eq!(
                    profile.for_cpu(first, 0).for_cpu(second, last),
                    profile.for_cpu(second, last)
                );
            }
        }
    }
}

#[test]
fn what_is_written_down_gives_the_same_tables() {
    let paravirtual = entry(PARAVIRTUAL, None, [0x4000_0001, 1, 2, 3]);
    for profile in [intel(), amd()] {
        let portable = profile.with([paravirtual]).portable();
        assert!(!portable.has_paravirtual());
        assert_eq!(portable.get(0xb, 0), None);
        for topology in [topology(2, 3, 2), Topology::of_cores(2)] {
            assert_eq!(
                portable.for_cpu(topology, 1),
                profile.for_cpu(topology, 1),
                "{topology}"
            );
        }
    }
}
