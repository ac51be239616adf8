//! Disk in a file or block device.
