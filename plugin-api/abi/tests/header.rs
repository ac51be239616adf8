//! The C header says the same as the Rust tables: generated from them, and its layout asserted by a C compiler.

#![allow(clippy::expect_used)] // tests

use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use vmm_abi::block::{BlockDone, BlockInfo, BlockReq, BlockResizeTable, BlockTable, Iov};
use vmm_abi::chardev::CharTable;
use vmm_abi::device::{
    CapDesc, DeviceDesc, DeviceResizeTable, DeviceTable, EventsTable, IoTable, PciCapabilityTable,
    PciDesc, PciTable, PinDesc, RegionDesc, SnapshotTable,
};
use vmm_abi::host::{
    ControlTable, CounterTable, EventTable, FaultTable, IrqTable, LogTable, MemRegion, MemTable,
    MemoryTable, NameTable, StartupTable, ThreadTable,
};
use vmm_abi::{Base, Host, Iface, Obj, Opt, Root, Sink, Str};

const FILES: [&str; 5] = ["lib", "block", "chardev", "device", "host"];

/// cbindgen has one prefix for types and constants; constants are to be upper case throughout.
fn constants_in_upper_case(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("Vmm") {
        let (before, name) = rest.split_at(at);
        let word: &str = name[3..]
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .next()
            .unwrap_or("");
        let constant = word.len() > 1 && !word.contains(|c: char| c.is_ascii_lowercase());
        out.push_str(before);
        out.push_str(if constant { "VMM_" } else { "Vmm" });
        rest = &name[3..];
    }
    out + rest
}

/// The text constants of a source file, which cbindgen leaves out: the names of interfaces and services.
fn names(source: &str) -> String {
    let mut out = String::new();
    let mut doc = "";
    for line in source.lines() {
        let constant = line
            .strip_prefix("pub const ")
            .and_then(|l| l.strip_suffix(";")?.split_once(": &str = "));
        if let Some((name, value)) = constant {
            let doc = doc.strip_prefix("/// ").expect("a documented name");
            let _ = write!(out, "\n/*\n {doc}\n */\n#define VMM_{name} {value}\n");
        }
        doc = line;
    }
    out
}

fn generate() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut config =
        cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let mut text = String::new();
    for file in FILES {
        text +=
            &names(&std::fs::read_to_string(root.join(format!("src/{file}.rs"))).expect("source"));
    }
    config.after_includes = config.after_includes.map(|given| given + &text);
    let mut builder = cbindgen::Builder::new().with_config(config);
    for file in FILES {
        builder = builder.with_src(root.join(format!("src/{file}.rs")));
    }
    let mut text = Vec::new();
    builder
        .generate()
        .expect("a header from the tables")
        .write(&mut text);
    let text = constants_in_upper_case(&String::from_utf8(text).expect("UTF-8"));
    // A keyword of C++, which cbindgen spares in fields only; then links of rustdoc.
    text.replace("void *this,", "void *this_,")
        .replace("void *this)", "void *this_)")
        .replace("[`", "`")
        .replace("`]", "`")
}

#[test]
fn the_committed_header_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/vmm_plugin.h");
    let new = generate();
    if std::env::var_os("VMM_WRITE_HEADER").is_some() {
        std::fs::write(&path, &new).expect("write the header");
    }
    let old = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = old.lines().zip(new.lines()).position(|(a, b)| a != b);
    assert!(
        old == new,
        "include/vmm_plugin.h differs from the tables from line {} on: VMM_WRITE_HEADER=1 cargo test -p vmm-abi --test header",
        differs.map_or(old.lines().count().min(new.lines().count()) + 1, |n| n + 1)
    );
}

/// A field's name in C and C++, where some are keywords.
fn in_c(field: &str) -> String {
    let keyword = ["class", "int", "this"].contains(&field);
    format!("{field}{}", if keyword { "_" } else { "" })
}

/// Writes C assertions of size and offsets; the pattern makes the compiler refuse a field that is not listed.
macro_rules! layouts {
    ($out:ident: $($name:ident { $($field:ident),* $(,)? })*) => {$(
        #[allow(unused)]
        fn $name($name { $($field),* }: $name) {}
        writeln!($out, "VMM_ASSERT(sizeof(Vmm{0}) == {1}, \"size of {0}\");", stringify!($name), size_of::<$name>())?;
        $(writeln!(
            $out, "VMM_ASSERT(offsetof(Vmm{0}, {1}) == {2}, \"{0}.{1}\");",
            stringify!($name), in_c(stringify!($field)), offset_of!($name, $field)
        )?;)*
    )*};
}

#[allow(non_snake_case)]
fn assertions() -> Result<String, std::fmt::Error> {
    let mut out = String::from(
        "#include \"vmm_plugin.h\"\n#ifdef __cplusplus\n#define VMM_ASSERT static_assert\n#else\n#define VMM_ASSERT _Static_assert\n#endif\n",
    );
    layouts! { out:
        Str { ptr, len }
        Sink { ctx, write }
        Iface { table, layout, layout_kind }
        Base { release, interface }
        Obj { this, base }
        Host { ctx, service }
        Opt { key, kind, reserved, int, text, obj }
        Root { magic, abi_major, abi_minor, flags, reserved, manifest, manifest_len, init, create }
        BlockInfo { bytes, logical, physical, features, max_segments, alignment, max_discard }
        Iov { host, len }
        BlockReq { token, op, flags, offset, len, iov, iov_count }
        BlockDone { token, result, reserved }
        BlockTable { info, open_queue, submit, reap, fd, close_queue }
        BlockResizeTable { look_again, bytes }
        CharTable { read, write, fd }
        RegionDesc { id, kind, bar, reserved, address, size }
        PinDesc { irq, trigger }
        DeviceDesc { regions, region_count, pins, pin_count, acpi_hid }
        DeviceTable { describe, start, pause, resume, reset, stop }
        IoTable { read, write }
        CapDesc { id, flags, body, body_len }
        PciDesc {
            vendor, device, subsystem_vendor, subsystem, class, revision, intx, msix_vectors, msix_bar, reserved, caps,
            cap_count
        }
        PciTable { describe }
        PciCapabilityTable { read, write }
        EventsTable { ready }
        SnapshotTable { save, load }
        DeviceResizeTable { resized }
        MemRegion { gpa, len, host, fd_offset, fd, reserved, dirty }
        MemTable { regions, count, tracking }
        MemoryTable { table }
        IrqTable { fd, raise, level, msix_enabled }
        EventTable { doorbell, watch, unwatch, timer, clock }
        LogTable { max_level, log }
        FaultTable { report }
        CounterTable { counter }
        ControlTable { request }
        StartupTable { hold, release }
        ThreadTable { gather }
        NameTable { name }
    }
    Ok(out)
}

/// Compiles the assertions; the compiler's complaint if there is one, `None` without such a compiler.
fn compile(compiler: &str, standard: &str, language: &str) -> Option<Result<(), String>> {
    let dir = tempfile::tempdir().expect("folder");
    let source = dir.path().join("layout.c");
    std::fs::write(&source, assertions().expect("text")).expect("write");
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    let output = Command::new(compiler)
        .args([
            standard,
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pedantic",
            "-fsyntax-only",
            "-x",
            language,
            "-I",
        ])
        .arg(include)
        .arg(source)
        .output()
        .ok()?;
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    Some(if output.status.success() {
        Ok(())
    } else {
        Err(complaint)
    })
}

#[test]
fn a_c_compiler_sees_the_same_layout() {
    for (compiler, standard, language) in [("cc", "-std=c11", "c"), ("c++", "-std=c++17", "c++")] {
        match compile(compiler, standard, language) {
            Some(result) => result.unwrap_or_else(|complaint| panic!("{compiler}: {complaint}")),
            None => println!("SKIPPED: a_c_compiler_sees_the_same_layout: there is no {compiler}"),
        }
    }
}

/// Every table of the ABI is among the assertions.
#[test]
fn no_struct_is_left_out() {
    let asserted = assertions().expect("text");
    for line in generate().lines().filter(|l| l.starts_with("} Vmm")) {
        let name = line.trim_start_matches("} ").trim_end_matches(';');
        assert!(
            asserted.contains(&format!("sizeof({name})")),
            "{name} has no assertions"
        );
    }
    let structs = generate()
        .lines()
        .filter(|l| l.starts_with("} Vmm"))
        .count();
    assert_eq!(structs, asserted.matches("sizeof").count());
}
