//! Finding plugins and reading what they say about themselves, loading them, and lending them the host's services.
//!
//! A plugin's manifest is read from its file without running any of its code ([`manifest`]); names in a VM file lead to
//! plugins through the [`registry`]. Only then is a plugin loaded.

pub mod device;
pub mod inspect;
pub mod instance;
pub mod iothread;
mod known_names;
mod layout;
pub mod loader;
pub mod manifest;
mod manifest_toml;
pub mod memory_table;
pub mod object;
mod process;
pub mod registry;
pub mod schema;
pub mod search;
pub mod section;
pub mod statistics;
pub mod wiring;
