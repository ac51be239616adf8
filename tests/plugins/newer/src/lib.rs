//! Knows a later ABI than the host: it asks for a service that the host has never heard of and does without, and offers an interface
//! that the host never asks for. Every host of its major version has to take it.

use vmm_abi::Iface;
use vmm_abi::host::MEMORY;
use vmm_test_plugin_raw::{Variant, export, manifest, on_trust, plain};

/// The variant.
pub struct Newer;

/// An interface of the future.
struct TeleportTable {
    beam: extern "C" fn(u64) -> u64,
}

extern "C" fn beam(to: u64) -> u64 {
    to
}

static TELEPORT: TeleportTable = TeleportTable { beam };

impl Variant for Newer {
    const MANIFEST: &'static str = manifest!(
        "test-newer",
        "1.7",
        "Knows interfaces and services of a later ABI"
    );
    const ABI_MINOR: u32 = 7;

    fn interface(name: &str) -> Iface {
        match name {
            "vmm.teleport/1" => on_trust(&TELEPORT),
            _ => plain(name, true),
        }
    }

    /// 0x4e: the host has what it has always had, and is not thought to have what it lacks.
    fn read(has_service: impl Fn(&str) -> bool) -> u64 {
        match (has_service(MEMORY), has_service("vmm.host.teleport/1")) {
            (true, false) => 0x4e,
            _ => (TELEPORT.beam)(0xff),
        }
    }
}

export!(Newer);
