//! What the host does with plugins of other generations, other builds and other minds: real shared objects, loaded by the real
//! loader, in this process where a register access says enough, and in a VM where the guest has to see it.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[allow(dead_code, reason = "here plugins are real")]
mod fixture;

#[path = "plugins/builds.rs"]
mod builds;
#[path = "plugins/descriptions.rs"]
mod descriptions;
#[path = "plugins/faults.rs"]
mod faults;
#[path = "plugins/generations.rs"]
mod generations;
#[path = "plugins/names.rs"]
mod names;
#[path = "plugins/objects.rs"]
mod objects;
#[path = "plugins/refused.rs"]
mod refused;
#[path = "plugins/threads.rs"]
mod threads;
#[path = "plugins/vm.rs"]
mod vm;
