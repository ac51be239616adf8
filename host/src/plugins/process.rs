//! The host as a plugin sees it as a whole, before it has made anything: it can log.

#![allow(unsafe_code)] // the C side of the service

use std::ffi::c_void;

use vmm_abi::host::{LOG, LogTable};
use vmm_abi::{Host, Iface, Str};

use super::instance::{level, max_level, offer, text};

/// What [`vmm_abi::Root::init`] is passed, for the life of the process.
pub(super) fn host(plugin: &str) -> &'static Host {
    let name: &'static String = Box::leak(Box::new(plugin.to_owned()));
    Box::leak(Box::new(Host {
        ctx: std::ptr::from_ref(name).cast_mut().cast(),
        service,
    }))
}

unsafe extern "C" fn service(_ctx: *mut c_void, name: Str) -> Iface {
    match text(&name) {
        LOG => offer(&LogTable { max_level, log }),
        _ => Iface::NONE,
    }
}

unsafe extern "C" fn log(ctx: *mut c_void, severity: u32, _target: Str, message: Str) {
    // SAFETY: `ctx` is the leaked name of `host`.
    let name = unsafe { &*ctx.cast::<String>() };
    log::log!(level(severity), "plugin {name}: {}", text(&message));
}
