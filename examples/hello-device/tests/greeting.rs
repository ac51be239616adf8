//! Plays the guest, without a VM.

use hello_device::VMM_PLUGIN;
use vmm_plugin_api::Result;
use vmm_plugin_api::testing::{FakeDevice, FakeHost};

fn device() -> Result<FakeDevice> {
    let host = FakeHost::new(1 << 20);
    host.device(
        &VMM_PLUGIN,
        "hello",
        &[("port", 0x500u64.into()), ("text", "Hi!".into())],
    )
}

fn read(device: &FakeDevice, count: usize) -> String {
    (0..count)
        .map(|_| device.read(0, 0, 1) as u8 as char)
        .collect()
}

#[test]
fn the_guest_reads_the_text_and_starts_over() -> Result<()> {
    let device = device()?;
    device.start()?;
    assert_eq!(device.regions()[0].address, 0x500);
    assert_eq!(read(&device, 5), "Hi!\0\0");
    device.write(0, 0, 1, 1);
    assert_eq!(read(&device, 3), "Hi!");
    device.pause()?;
    device.reset()?;
    device.resume()?;
    assert_eq!(read(&device, 1), "H");
    Ok(())
}

#[test]
fn a_saved_device_goes_on_where_it_was() -> Result<()> {
    let first = device()?;
    first.start()?;
    assert_eq!(read(&first, 1), "H");
    first.pause()?;
    let (version, state) = first.save()?;
    let second = device()?;
    second.load(version, &state)?;
    second.start()?;
    assert_eq!(read(&second, 2), "i!");
    assert!(device()?.load(version, b"short").is_err());
    Ok(())
}
