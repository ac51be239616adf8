//! The `[fw_cfg."NAME"]` tables: blobs that the guest finds by name.

use super::boot::readable;
use super::document::Table;
use super::source::{Problems, Source};
use super::values::{Field, refuse_unknown};
use super::vm_config::{FwCfgContents, FwCfgFile, Place};
use crate::machine::fw_cfg::{FILE_MAX, check_name};

const KEYS: [&str; 2] = ["file", "string"];
/// Names outside of it are the machine's own (QEMU, docs/specs/fw_cfg.rst, "Externally Provided Items").
const PREFIX: &str = "opt/";

/// Reads all tables, in alphabetical order.
pub fn read(group: &Table, sources: &[Source], problems: &mut Problems) -> Vec<FwCfgFile> {
    let mut files = Vec::new();
    for (name, entry) in group {
        let field = Field {
            table: "fw_cfg",
            name,
            entry,
        };
        let Some(table) = field.table(problems) else {
            continue;
        };
        if let Err(error) = check_name(name) {
            problems.error(entry.key, error.to_string());
        } else if !name.starts_with(PREFIX) || name.len() == PREFIX.len() {
            problems
                .error(entry.key, format!("fw_cfg: the name `{name}` is reserved"))
                .help(format!(
                    "names of your own begin with `{PREFIX}`, as in \"opt/org.example/name\""
                ));
        }
        let label = format!("fw_cfg.\"{name}\"");
        refuse_unknown(&label, table, &KEYS, problems);
        let option = |key| {
            table.get(key).map(|entry| Field {
                table: &label,
                name: key,
                entry,
            })
        };
        let contents = match (option("file"), option("string")) {
            (Some(file), None) => file_contents(&file, problems),
            (None, Some(text)) => text
                .text(problems)
                .map(|text| FwCfgContents::Text(text.into())),
            (first, _) => {
                let how = if first.is_some() { "both" } else { "neither" };
                problems
                    .error(
                        entry.key,
                        format!("[{label}] has {how} of `file` and `string`"),
                    )
                    .help("it takes one of them");
                None
            }
        };
        files.extend(contents.map(|contents| FwCfgFile {
            name: name.clone(),
            contents,
            place: Place::of(entry.key, sources),
        }));
    }
    files
}

fn file_contents(field: &Field<'_>, problems: &mut Problems) -> Option<FwCfgContents> {
    let path = readable(field, problems)?;
    let len = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
    if len > FILE_MAX {
        problems.error(
            field.entry.at,
            format!(
                "`file` in [{}]: {} has {len} bytes, and {FILE_MAX} are the most",
                field.table,
                path.display()
            ),
        );
        return None;
    }
    Some(FwCfgContents::File(path))
}
