//! Finding plugins and reading what they say about themselves, loading them, and lending them the host's services.
//!
//! A plugin's manifest is read from its file without running any of its code ([`manifest`]); names in a VM file lead to
//! plugins through the [`registry`]. Only then is a plugin loaded.

pub mod inspect;
pub mod manifest;
mod manifest_toml;
pub mod registry;
pub mod schema;
pub mod search;
pub mod section;
