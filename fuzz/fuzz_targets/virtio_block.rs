//! Guests of virtio-block.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    vmm_fuzz::virtio_block::run(&vmm_plugin_virtio_block::VMM_PLUGIN, bytes);
});
