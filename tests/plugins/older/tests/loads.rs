//! The SDK's own host takes the plugin.

use vmm_plugin_api::testing::FakeHost;
use vmm_test_plugin_older::VMM_PLUGIN;

#[test]
fn its_port_works() {
    let host = FakeHost::new(1 << 20);
    let device = host
        .device(&VMM_PLUGIN, "test-older", &[("port", 0x530u64.into())])
        .expect("create");
    device.start().expect("start");
    assert_eq!(device.read(0, 0, 1), 0x1d);
    device.write(0, 0, 1, 0);
    let error = host
        .device(&VMM_PLUGIN, "test-older", &[])
        .err()
        .expect("refused")
        .to_string();
    assert!(error.contains("`port` is missing"), "{error}");
}
