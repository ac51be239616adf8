//! Which file is whose: two disks of a VM that share an image, and write to it, would corrupt it. The backends' locks say so too, but
//! not before the VM starts.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::backends::{BackendId, BackendTable};
use super::source::{Problems, Source};
use super::vm_config::Place;
use crate::plugins::schema::OptionValue;

/// What tells one file from another, whatever names and links lead to it.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Identity {
    /// Device and inode.
    File(u64, u64),
    /// The number of a block device.
    Device(u64),
    /// Not there yet: the folder that it will be in, and its name.
    Absent(PathBuf),
}

impl Identity {
    /// `None` for what can't be an image.
    fn of(path: &Path) -> Option<Self> {
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => Some(Self::File(metadata.dev(), metadata.ino())),
            Ok(metadata) if metadata.file_type().is_block_device() => {
                Some(Self::Device(metadata.rdev()))
            }
            Ok(_) => None,
            Err(_) => {
                let folder = path.parent().filter(|folder| folder != &Path::new(""));
                let folder = folder.unwrap_or(Path::new("."));
                let folder = folder.canonicalize().unwrap_or(folder.to_owned());
                Some(Self::Absent(folder.join(path.file_name()?)))
            }
        }
    }
}

/// Refuses images that two of the backends in use have, unless both only read.
pub fn check(
    used: &[BackendId],
    backends: &BTreeMap<BackendId, BackendTable>,
    sources: &[Source],
    problems: &mut Problems,
) {
    let mut owners: BTreeMap<Identity, (&BackendId, &BackendTable)> = BTreeMap::new();
    for id in used {
        let Some((table, config)) = backends
            .get(id)
            .and_then(|table| Some((table, table.config.as_ref()?)))
        else {
            continue;
        };
        for spec in config
            .backend
            .backend()
            .options
            .iter()
            .filter(|spec| spec.image)
        {
            let given = config.options.iter().find(|(key, _)| *key == spec.name);
            let Some((key, OptionValue::Text(path))) = given else {
                continue;
            };
            let Some(identity) = Identity::of(Path::new(path)) else {
                continue;
            };
            let Some((other, first)) = owners.get(&identity) else {
                owners.insert(identity, (id, table));
                continue;
            };
            if table.read_only() && first.read_only() {
                continue;
            }
            let (own, other) = (config.label(), format!("{}.{}", other.0.table(), other.1));
            let at = table.values.get(key).copied().unwrap_or(table.at);
            problems
                .error(
                    at,
                    format!("`{key}` in [{own}]: [{other}] has the same file, which the one would corrupt for the other"),
                )
                .help(format!("there: {}", Place::of(first.at, sources)))
                .help("only with read_only = true in both can they share a file");
        }
    }
}
