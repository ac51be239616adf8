//! A fake host.
