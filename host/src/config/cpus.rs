//! The keys of `[main]` about CPUs: how many, in which sockets, cores and threads, bound to which of this machine's.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::document::{Table, Value};
use super::source::{Problems, Span};
use super::spelling::{listed, suggestion};
use super::values::{Field, refuse_unknown};
use crate::hypervisor::cpuid::CpuidProfile;
use crate::hypervisor::topology::{APIC_ID_MAX, Topology};
use crate::hypervisor::{CpuModel, affinity};

/// The most vCPUs: their local APIC ids count from 0.
const CPUS_MAX: u64 = APIC_ID_MAX as u64;
const LEVELS: [&str; 3] = ["sockets", "cores", "threads"];
const BINDINGS: &str =
    "\"any\", \"upper-half\", { start = N } or an array with the CPU of each vCPU";

/// The profiles of `[cpuid.NAME]`; those that were refused are `None`.
pub type Profiles = BTreeMap<String, Option<Arc<CpuidProfile>>>;

/// What `[main]` says about CPUs. Where a value was refused it holds one that lets the check go on.
#[derive(Debug)]
pub struct Cpus {
    pub count: u8,
    pub model: CpuModel,
    /// This machine's CPU for each vCPU; empty for any.
    pub binding: Vec<u32>,
}

/// Reads the keys, each of which `field` finds.
pub fn read<'a>(
    field: &impl Fn(&'static str) -> Option<Field<'a>>,
    profiles: &Profiles,
    problems: &mut Problems,
) -> Cpus {
    let given = field("cpus")
        .and_then(|field| field.integer(1, CPUS_MAX, problems))
        .and_then(|cpus| u8::try_from(cpus).ok());
    let topology = topology(field, given, problems);
    let binding = field("cpu_binding")
        .and_then(|field| binding(&field, given, problems))
        .unwrap_or_default();
    let profile = field("cpuid_profile").and_then(|field| profile(&field, profiles, problems));
    let count = given.unwrap_or(1);
    Cpus {
        count,
        model: CpuModel {
            topology: topology.unwrap_or_else(|| Topology::of_cores(count)),
            profile,
            x2apic: true,
        },
        binding,
    }
}

/// What was asked for; `None` if nothing was, or what was is refused.
fn topology<'a>(
    field: &impl Fn(&'static str) -> Option<Field<'a>>,
    cpus: Option<u8>,
    problems: &mut Problems,
) -> Option<Topology> {
    let levels = LEVELS.map(field);
    let first = levels.iter().flatten().next().copied();
    let bits = field("topology");
    let (place, [sockets, cores, threads]) = match (bits, first) {
        (None, None) => return None,
        (Some(bits), Some(_)) => {
            let others = levels.iter().flatten().map(|level| level.name);
            problems
                .error(
                    bits.entry.key,
                    format!(
                        "`topology` in [main] says the same as {}: give one or the other",
                        listed(others)
                    ),
                )
                .help("\"L:C\" stands for threads = 2^L and cores = 2^C");
            return None;
        }
        (Some(bits), None) => (bits, threads_and_cores(&bits, problems)?),
        (None, Some(first)) => {
            let mut numbers = [None; 3];
            let mut good = true;
            for (number, level) in numbers.iter_mut().zip(levels) {
                if let Some(level) = level {
                    *number = level.integer(1, CPUS_MAX, problems);
                    good &= number.is_some();
                }
            }
            good.then_some((first, numbers))?
        }
    };
    let cpus = u64::from(cpus?);
    // What is not given is one; of those, cores or else sockets or threads make up the number of CPUs.
    let given: u64 = [sockets, cores, threads].into_iter().flatten().product();
    let rest = if cpus % given == 0 { cpus / given } else { 1 };
    let (sockets, cores, threads) = match (sockets, cores, threads) {
        (sockets, None, threads) => (sockets.unwrap_or(1), rest, threads.unwrap_or(1)),
        (None, Some(cores), threads) => (rest, cores, threads.unwrap_or(1)),
        (Some(sockets), Some(cores), threads) => (sockets, cores, threads.unwrap_or(rest)),
    };
    let product = sockets * cores * threads;
    let says = format!("sockets {sockets} x cores {cores} x threads {threads} = {product}");
    if product != cpus {
        problems.error(
            place.entry.at,
            format!("`{}` in [main]: {says}, but `cpus` is {cpus}", place.name),
        );
        return None;
    }
    // At most `cpus` each.
    let [sockets, cores, threads] = [sockets, cores, threads].map(|number| number as u32);
    let topology = Topology::new(sockets, cores, threads);
    if topology.is_none() {
        problems
            .error(
                place.entry.at,
                format!(
                    "`{}` in [main]: {says} needs local APIC ids above {APIC_ID_MAX}",
                    place.name
                ),
            )
            .help("each level has whole bits in the id: powers of two waste none");
    }
    topology
}

/// "L:C", as DragonFly BSD's vkernel takes them: bits of the APIC id for threads, and for cores. Sockets follow.
fn threads_and_cores(field: &Field<'_>, problems: &mut Problems) -> Option<[Option<u64>; 3]> {
    let text = field.text(problems)?;
    let bits = |text: &str| match text.as_bytes() {
        [digit @ b'0'..=b'7'] => Some(1 << (digit - b'0')),
        _ => None,
    };
    let parsed = text
        .split_once(':')
        .and_then(|(threads, cores)| Some([None, Some(bits(cores)?), Some(bits(threads)?)]));
    if parsed.is_none() {
        field
            .expected("\"L:C\", two numbers from 0 to 7", problems)
            .help("2^L threads in each core, 2^C cores in each socket, as in DragonFly's vkernel");
    }
    parsed
}

/// The CPU of this machine for each of `cpus` vCPUs. `Some` and empty: any.
fn binding(field: &Field<'_>, cpus: Option<u8>, problems: &mut Problems) -> Option<Vec<u32>> {
    let asked = asked(field, problems)?;
    if let Asked::Any = asked {
        return Some(Vec::new());
    }
    let cpus = u32::from(cpus?);
    let online = affinity::online()
        .map_err(|why| problems.error(field.entry.key, format!("`cpu_binding` in [main]: {why:#}")))
        .ok()?;
    let wanted: Vec<(Span, u32)> = match asked {
        Asked::Any => Vec::new(),
        Asked::UpperHalf => {
            let Some(below) = online.len().checked_sub(cpus as usize) else {
                problems.error(
                    field.entry.at,
                    format!(
                        "`cpu_binding` in [main]: this machine has {} CPUs, too few to give each of {cpus} vCPUs one",
                        online.len()
                    ),
                );
                return None;
            };
            return Some(online[below..].to_vec());
        }
        Asked::From(at, start) => (0..cpus).map(|cpu| (at, start + cpu)).collect(),
        Asked::Each(list) if list.len() == cpus as usize => list,
        Asked::Each(list) => {
            problems.error(
                field.entry.at,
                format!(
                    "`cpu_binding` in [main] names {} CPUs, but `cpus` is {cpus}: one for each vCPU",
                    list.len()
                ),
            );
            return None;
        }
    };
    for (index, (at, cpu)) in wanted.iter().enumerate() {
        if !online.contains(cpu) {
            let names: Vec<String> = online.iter().map(u32::to_string).collect();
            problems
                .error(
                    *at,
                    format!("`cpu_binding` in [main]: vCPU {index} is to run on CPU {cpu}, which this machine does not have"),
                )
                .help(format!("CPUs online: {}", listed(names.iter().map(String::as_str))));
            return None;
        }
        if let Some(twin) = wanted[..index].iter().position(|(_, other)| other == cpu) {
            problems.error(
                *at,
                format!("`cpu_binding` in [main]: vCPU {index} is to run on CPU {cpu}, as vCPU {twin} is"),
            );
            return None;
        }
    }
    Some(wanted.into_iter().map(|(_, cpu)| cpu).collect())
}

enum Asked {
    Any,
    UpperHalf,
    From(Span, u32),
    Each(Vec<(Span, u32)>),
}

fn asked(field: &Field<'_>, problems: &mut Problems) -> Option<Asked> {
    match &field.entry.value {
        Value::Text(text) if text == "any" => Some(Asked::Any),
        Value::Text(text) if text == "upper-half" => Some(Asked::UpperHalf),
        Value::Text(text) => {
            let problem = field.expected(BINDINGS, problems);
            if let Some(help) = suggestion(text, ["any", "upper-half"]) {
                problem.help(help);
            }
            None
        }
        Value::Table(table) => start(table, field, problems),
        Value::Array(items) => {
            let mut list = Vec::new();
            for (at, item) in items {
                match item {
                    Value::Int(cpu) if (0..=i128::from(u16::MAX)).contains(cpu) => {
                        list.push((*at, *cpu as u32));
                    }
                    other => {
                        problems.error(
                            *at,
                            format!(
                                "`cpu_binding` in [main]: expected the number of a CPU, found {}",
                                other.describe()
                            ),
                        );
                        return None;
                    }
                }
            }
            Some(Asked::Each(list))
        }
        _ => {
            field.expected(BINDINGS, problems);
            None
        }
    }
}

fn start(table: &Table, field: &Field<'_>, problems: &mut Problems) -> Option<Asked> {
    const NAME: &str = "main.cpu_binding";
    refuse_unknown(NAME, table, &["start"], problems);
    let Some(entry) = table.get("start") else {
        field.expected(BINDINGS, problems);
        return None;
    };
    let start = Field {
        table: NAME,
        name: "start",
        entry,
    };
    let cpu = start.integer(0, u64::from(u16::MAX), problems)?;
    Some(Asked::From(entry.at, cpu as u32))
}

fn profile(
    field: &Field<'_>,
    profiles: &Profiles,
    problems: &mut Problems,
) -> Option<Arc<CpuidProfile>> {
    let name = field.name(problems)?;
    if let Some(profile) = profiles.get(name) {
        return profile.clone();
    }
    let problem = problems.error(
        field.entry.at,
        format!("`cpuid_profile` in [main]: there is no table [cpuid.{name}]"),
    );
    let known = || profiles.keys().map(String::as_str);
    if let Some(help) = suggestion(name, known()) {
        problem.help(help);
    }
    problem.help(format!("profiles of this file: {}", listed(known())));
    problem.absent();
    None
}
