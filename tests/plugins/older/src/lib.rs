//! As small as a plugin may be: the two interfaces that a device with a register needs, no layout records, no service asked for.
//! Every host of its major version has to take it.

use vmm_abi::Iface;
use vmm_test_plugin_raw::{Variant, export, manifest, plain};

/// The variant.
pub struct Older;

impl Variant for Older {
    const MANIFEST: &'static str =
        manifest!("test-older", "1.0", "Offers as little as a device may");
    const ABI_MINOR: u32 = 0;

    fn interface(name: &str) -> Iface {
        plain(name, false)
    }

    fn read(_has_service: impl Fn(&str) -> bool) -> u64 {
        0x1d
    }
}

export!(Older);
