//! Opens an image and the files behind it.

use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64};

use anyhow::{Context, bail, ensure};
use vmm_plugin_api::Result;

use crate::file::DiskFile;
use crate::header::{AUTOCLEAR_AT, Format, Header};
use crate::image::{Backing, Image, Writer};
use crate::layout::OFFSET;
use crate::refcounts::{Refcounts, Tables};
use crate::slices::Slices;

/// Most files in a chain.
const DEPTH: usize = 64;

/// The options that matter for opening.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The image.
    pub path: PathBuf,
    /// Open it for reading and share it.
    pub read_only: bool,
    /// Flushes do nothing.
    pub skip_flush: bool,
    /// Free what the guest discards.
    pub discard: bool,
    /// Format of the backing file, where the image does not say it.
    pub backing_format: Option<Format>,
}

impl Image {
    /// Opens the image and all that is behind it.
    ///
    /// # Errors
    /// What is wrong with which file, and what to do.
    pub fn open(settings: &Settings) -> Result<Self> {
        let path = settings.path.display();
        exists(&settings.path).with_context(|| {
            format!("no disk image at `{path}`; mend `path`, or make one: qemu-img create -f qcow2 '{path}' 20G")
        })?;
        open_image(&settings.path, settings, &mut Vec::new())
    }
}

/// Opens an image; `chain` has device and number of those in front of it.
fn open_image(path: &Path, settings: &Settings, chain: &mut Vec<(u64, u64)>) -> Result<Image> {
    let read_only = settings.read_only || !chain.is_empty();
    let file = DiskFile::open(path, read_only, settings.skip_flush)?;
    assemble(file, read_only, settings, chain)
        .with_context(|| format!("cannot use `{}`", path.display()))
}

/// The image in a file that has been opened.
fn assemble(
    file: DiskFile,
    read_only: bool,
    settings: &Settings,
    chain: &mut Vec<(u64, u64)>,
) -> Result<Image> {
    enter(&file, chain)?;
    let header = Header::read(&file)?;
    if !read_only {
        header.check_writable(file.path())?;
    }
    let l1 = table(&file, header.l1_at, header.l1_entries).context("cannot read its L1 table")?;
    let backing = open_backing(file.path(), &header, settings, chain)?;
    let writer = match read_only {
        true => None,
        false => Some(prepare(&file, &header, &l1, settings)?),
    };
    Ok(Image {
        file,
        geometry: header.geometry,
        compression: header.compression,
        l1: l1.into_iter().map(AtomicU64::new).collect(),
        l1_at: header.l1_at,
        slices: Slices::new(header.geometry.slice_bytes()),
        backing,
        damaged: AtomicBool::new(false),
        writer,
    })
}

/// Adds a file to the chain.
fn enter(file: &DiskFile, chain: &mut Vec<(u64, u64)>) -> Result<()> {
    let identity = file.identity()?;
    ensure!(
        !chain.contains(&identity),
        "`{}` is its own backing file, by way of {} others: mend the chain with qemu-img rebase -u",
        file.path().display(),
        chain.len() - 1
    );
    ensure!(
        chain.len() < DEPTH,
        "more than {DEPTH} files stand behind each other; shorten the chain with qemu-img commit or qemu-img convert"
    );
    chain.push(identity);
    Ok(())
}

fn open_backing(
    path: &Path,
    header: &Header,
    settings: &Settings,
    chain: &mut Vec<(u64, u64)>,
) -> Result<Option<Backing>> {
    let Some((name, format)) = &header.backing else {
        ensure!(
            settings.backing_format.is_none() || chain.len() > 1,
            "it has no backing file; remove `backing_format`"
        );
        return Ok(None);
    };
    let shown = name.display();
    let format = match (format, settings.backing_format) {
        (Some(format), option) => {
            let format = Format::parse(format)?;
            ensure!(
                option.is_none_or(|option| option == format) || chain.len() > 1,
                "it says that its backing file `{shown}` is {format:?}, and `backing_format` says something else; remove that"
            );
            format
        }
        (None, Some(option)) if chain.len() == 1 => option,
        _ => bail!(
            "it names a backing file, `{shown}`, without its format, and guessing would let a guest choose what is read. Write the format down, after making sure of it: qemu-img rebase -u -F raw -b '{shown}' '{}' (or -F qcow2)",
            path.display()
        ),
    };
    let there = locate(path, name)?;
    exists(&there).with_context(|| {
        format!(
            "its backing file `{}` is not there; put it back, or mend the chain with qemu-img rebase -u",
            there.display()
        )
    })?;
    let opened = match format {
        Format::Raw => DiskFile::open(&there, true, false).and_then(|file| {
            enter(&file, chain)?;
            Ok(Backing::Raw(file))
        }),
        Format::Qcow2 => {
            open_image(&there, settings, chain).map(|image| Backing::Image(Box::new(image)))
        }
    };
    opened.context("its backing file").map(Some)
}

/// An error if nothing has that path. What else may be wrong with it is found by opening it.
fn exists(path: &Path) -> std::io::Result<()> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The backing file's path: relative to the image's directory. Other ways to reach it are not supported.
fn locate(image: &Path, name: &Path) -> Result<PathBuf> {
    let text = name.as_os_str().to_string_lossy();
    let plain = match text.split_once(':') {
        Some(("file", rest)) => Path::new(rest).to_owned(),
        Some((scheme, _)) if !scheme.contains('/') => bail!(
            "its backing file `{text}` is reached by `{scheme}`; only paths of files are supported: put a copy where it can be reached and name it with qemu-img rebase -u"
        ),
        _ => name.to_owned(),
    };
    Ok(image.parent().unwrap_or(Path::new("")).join(plain))
}

/// A table of `entries` offsets.
fn table(file: &DiskFile, at: u64, entries: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0; entries as usize * 8];
    file.read(&mut bytes, at)?;
    let (entries, _) = bytes.as_chunks::<8>();
    Ok(entries
        .iter()
        .map(|entry| u64::from_be_bytes(*entry))
        .collect())
}

/// Checks that an image can be written to without one table being written over another.
fn prepare(file: &DiskFile, header: &Header, l1: &[u64], settings: &Settings) -> Result<Writer> {
    let geometry = header.geometry;
    let entries = header.refcount_table_clusters * geometry.cluster() / 8;
    let refcounts =
        table(file, header.refcount_table_at, entries).context("cannot read its refcount table")?;
    let tables = Tables::default();
    let add = |what: &str, at: u64, bytes: u64| {
        let advice = || {
            format!(
                "it is damaged; check it: qemu-img check -r all '{}'",
                file.path().display()
            )
        };
        ensure!(
            geometry.within(at) == 0 && at < file.len(),
            "{what} is at {at:#x}, where it can't be: {}",
            advice()
        );
        let first = at >> geometry.cluster_bits;
        let mut tables = tables.write().unwrap_or_else(PoisonError::into_inner);
        for cluster in first..first + bytes.div_ceil(geometry.cluster()) {
            ensure!(
                tables.insert(cluster),
                "{what} is at {at:#x}, where another table is: {}",
                advice()
            );
        }
        Ok(())
    };
    add("the header", 0, 1)?;
    add("the refcount table", header.refcount_table_at, entries * 8)?;
    add("the L1 table", header.l1_at, header.l1_entries * 8)?;
    for (index, at) in refcounts.iter().enumerate().filter(|(_, at)| **at != 0) {
        add(&format!("refcount block {index}"), *at, 1)?;
    }
    for (index, entry) in l1
        .iter()
        .enumerate()
        .filter(|(_, entry)| *entry & OFFSET != 0)
    {
        add(&format!("L2 table {index}"), entry & OFFSET, 1)?;
    }
    if header.autoclear != 0 {
        log::warn!(
            "`{}` has features that writing to it makes out of date, such as dirty bitmaps (autoclear bits {:#x}); they are switched off",
            file.path().display(),
            header.autoclear
        );
        file.write(&[0; 8], AUTOCLEAR_AT)?;
        file.sync()?;
    }
    let refcounts = Refcounts::new(header, refcounts, file.len());
    let punch = settings.discard && file.can_punch();
    Ok(Writer::new(tables, refcounts, settings.discard, punch))
}
