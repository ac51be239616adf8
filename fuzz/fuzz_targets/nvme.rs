//! Guests of the NVMe controller.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vmm_fuzz::nvme::run(
    &vmm_plugin_nvme::VMM_PLUGIN,
    bytes
));
