//! Disk in memory.
