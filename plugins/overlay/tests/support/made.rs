//! Backends that tests make themselves: a program can link one plugin's root only, so theirs are made by hand.

#![allow(dead_code, missing_docs, unsafe_code, clippy::unwrap_used)]

use vmm_plugin_api::BlockBackend;
use vmm_plugin_api::abi::{Host as AbiHost, Obj, Opt, Root, Sink, Str};
use vmm_plugin_api::private::{CreateCall, create_block, root};

/// The root of a plugin with one block backend.
pub const fn root_of<T: BlockBackend>() -> Root {
    root(b"", create::<T>)
}

unsafe extern "C" fn create<T: BlockBackend>(
    host: *const AbiHost,
    _kind: u32,
    _name: Str,
    opts: *const Opt,
    opt_count: usize,
    out: *mut Obj,
    err: *const Sink,
) -> i32 {
    // SAFETY: these are the values of this call.
    let call = unsafe { CreateCall::new(host, opts, opt_count, out, err) };
    create_block::<T>(&call)
}
