//! Keys of `[main]` that say what guest memory is made of: `hugepages`, `prefault`, `memory_file` and `use_reservoir`.

use std::path::PathBuf;

use super::document::Value;
use super::source::Problems;
use super::values::{Field, size_text};
use crate::hypervisor::Kind;
use crate::hypervisor::backing::{self, Backing, HugePage, Source};

/// Reads them, for a VM of `hypervisor`. `memory` is the size of guest memory, if that is known; whether the machine can give it is
/// then checked.
pub fn read<'a>(
    field: &impl Fn(&'static str) -> Option<Field<'a>>,
    memory: Option<u64>,
    hypervisor: Kind,
    problems: &mut Problems,
) -> Backing {
    let huge = field("hugepages").and_then(|field| hugepages(&field, problems));
    let file = field("memory_file").and_then(|field| field.name(problems));
    let prefault = field("prefault").and_then(|field| field.boolean(problems)) == Some(true);
    let reservoir = field("use_reservoir").filter(|field| field.boolean(problems) == Some(true));
    if hypervisor.makes_memory() {
        let refused = [
            field("hugepages").filter(|_| huge.is_some()),
            field("memory_file"),
        ];
        for field in refused.into_iter().flatten() {
            refuse(&field, hypervisor, problems);
        }
        let source = match reservoir {
            Some(_) => Source::Reservoir,
            None => Source::Anonymous,
        };
        return Backing { source, prefault };
    }
    if let Some(field) = reservoir {
        problems.warning(
            field.entry.key,
            "`use_reservoir` in [main] has no effect: memory comes from the system, not from a reservoir",
        );
    }
    if let (Some(_), Some(_), Some(field)) = (huge, file, field("memory_file")) {
        problems
            .error(
                field.entry.key,
                "`memory_file` in [main] excludes `hugepages`",
            )
            .help("a file on a filesystem of type hugetlbfs has large pages by itself");
        return Backing::default();
    }
    let source = match (huge, file) {
        (Some(size), _) => Source::Huge(size),
        (_, Some(path)) => Source::File(PathBuf::from(path)),
        _ => Source::Anonymous,
    };
    let backing = Backing { source, prefault };
    if let Some(bytes) = memory {
        check(field, &backing, bytes, problems);
    }
    backing
}

/// What asks for memory of another kind than the hypervisor makes.
fn refuse(field: &Field<'_>, hypervisor: Kind, problems: &mut Problems) {
    let (key, name) = (field.name, hypervisor.name());
    problems
        .error(
            field.entry.key,
            format!("`{key}` in [main]: {name} makes guest memory itself"),
        )
        .help("leave the key out; `use_reservoir = true` takes memory that was set aside for VMs");
}

/// `true`, or a size. 2 MiB is what `true` means on every x86 system.
fn hugepages(field: &Field<'_>, problems: &mut Problems) -> Option<HugePage> {
    match &field.entry.value {
        Value::Bool(true) => Some(HugePage::Size2M),
        Value::Bool(false) => None,
        Value::Text(text) if text == "2M" => Some(HugePage::Size2M),
        Value::Text(text) if text == "1G" => Some(HugePage::Size1G),
        _ => {
            field.expected("`true`, `false`, \"2M\" or \"1G\"", problems);
            None
        }
    }
}

fn check<'a>(
    field: &impl Fn(&'static str) -> Option<Field<'a>>,
    backing: &Backing,
    bytes: u64,
    problems: &mut Problems,
) {
    if let (Source::Huge(size), Some(field)) = (&backing.source, field("hugepages"))
        && !bytes.is_multiple_of(size.bytes())
    {
        problems.error(
            field.entry.at,
            format!(
                "`hugepages` in [main]: {} of memory are not whole pages of {size}",
                size_text(bytes)
            ),
        );
        return;
    }
    let key = match &backing.source {
        Source::Huge(_) => "hugepages",
        Source::File(_) => "memory_file",
        Source::Anonymous | Source::Reservoir => "prefault",
    };
    if let (Err(why), Some(field)) = (backing::check(backing, bytes), field(key)) {
        problems.error(field.entry.at, format!("`{key}` in [main]: {why:#}"));
    }
}
