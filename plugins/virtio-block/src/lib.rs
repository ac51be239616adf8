//! virtio 1.2 block device.
