//! What the CPUID instruction says.

use crate::check;
use crate::memory;
use core::arch::x86_64::{__cpuid_count, CpuidResult};

/// The most significant bits of leaf 1's EBX.
const APIC_ID: u32 = 24;

/// Compares with each `cpuid=LEAF-SUBLEAF:EAX,EBX,ECX,EDX` of the command line, in hexadecimal; `*` is a register that
/// may have any value.
pub fn run() {
    let [highest, ..] = registers(0, 0);
    check!(highest >= 1, "cpuid", "basic leaves up to {highest:#x}");
    if highest >= 0xb {
        let id = registers(1, 0)[1] >> APIC_ID;
        let [_, cpus, _, x2apic] = registers(0xb, 1);
        check!(
            cpus >= 1 && x2apic == id,
            "cpuid",
            "a package of {cpus} CPUs; this is APIC id {id}, in leaf b {x2apic}"
        );
    }
    let line = memory::command_line();
    for word in line.words() {
        if let Some(asked) = word.strip_prefix("cpuid=") {
            compare(asked);
        }
    }
}

fn registers(leaf: u32, subleaf: u32) -> [u32; 4] {
    let CpuidResult { eax, ebx, ecx, edx } = __cpuid_count(leaf, subleaf);
    [eax, ebx, ecx, edx]
}

fn compare(asked: &str) {
    let Some((leaf, subleaf, wanted)) = parse(asked) else {
        check!(false, "cpuid", "{asked:?} is a leaf with its registers");
        return;
    };
    let found = registers(leaf, subleaf);
    let same = found
        .iter()
        .zip(wanted)
        .all(|(found, wanted)| wanted.is_none_or(|wanted| wanted == *found));
    check!(
        same,
        "cpuid",
        "leaf {leaf:x}-{subleaf:x} is {:08x} {:08x} {:08x} {:08x}",
        found[0],
        found[1],
        found[2],
        found[3]
    );
}

fn parse(asked: &str) -> Option<(u32, u32, [Option<u32>; 4])> {
    let hex = |text| u32::from_str_radix(text, 16).ok();
    let (request, registers) = asked.split_once(':')?;
    let (leaf, subleaf) = request.split_once('-')?;
    let mut words = registers.split(',');
    let mut wanted = [None; 4];
    for register in &mut wanted {
        *register = match words.next()? {
            "*" => None,
            word => Some(hex(word)?),
        };
    }
    words.next().is_none().then_some(())?;
    Some((hex(leaf)?, hex(subleaf)?, wanted))
}
