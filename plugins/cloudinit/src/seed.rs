//! What the volume holds: the files that cloud-init looks for, from the VM file's texts or from the files that it names.

use std::borrow::Cow;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, bail, ensure};
use vmm_plugin_api::{Options, Result};

/// The most that a file may have, in bytes. What is longer was given by mistake: it would be held in memory.
const FILE_MAX: u64 = 1 << 30;

/// The files, by the option of each text and that of a path. The text's is the name in the volume as well.
const FILES: [(&str, &str); 3] = [
    ("user-data", "user-data-path"),
    ("meta-data", "meta-data-path"),
    ("network-config", "network-config-path"),
];

/// A file: its name and its contents, which are bytes and not always text.
pub type File<'a> = (&'static str, Cow<'a, [u8]>);

/// All files; one that was not given is empty.
///
/// # Errors
/// Both forms of one were given, or its file can't be read: the text names the key and the file.
pub fn read<'a>(options: &Options<'a>) -> Result<[File<'a>; 3]> {
    let mut files = FILES.map(|(name, _)| (name, Cow::Borrowed(&[][..])));
    for ((name, by_path), (_, contents)) in FILES.into_iter().zip(&mut files) {
        *contents = match (options.maybe_str(name)?, options.maybe_str(by_path)?) {
            (Some(_), Some(_)) => bail!("both `{name}` and `{by_path}` are given: give one"),
            (Some(text), None) => Cow::Borrowed(text.as_bytes()),
            (None, Some(path)) => Cow::Owned(
                read_file(path).with_context(|| format!("`{by_path}`: cannot read {path}"))?,
            ),
            (None, None) => continue,
        };
    }
    Ok(files)
}

fn read_file(path: &str) -> Result<Vec<u8>> {
    // The file was checked before, but may be another by now: opening a FIFO would wait for its other end.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    ensure!(metadata.is_file(), "not a regular file");
    let mut bytes = Vec::new();
    let mut len = metadata.len();
    if len <= FILE_MAX {
        // It may grow meanwhile.
        len = file.take(FILE_MAX + 1).read_to_end(&mut bytes)? as u64;
    }
    ensure!(len <= FILE_MAX, "it has more than {} MiB", FILE_MAX >> 20);
    Ok(bytes)
}
