//! Probes for DTrace, perf and bpftrace at each request of a block backend: provider `vmm_block`, as `docs/tracing.md` describes it.
//!
//! Only with the feature `probes`. One that nobody watches costs a load and a branch.

#[cfg(feature = "probes")]
mod fired {
    #![allow(unsafe_code)] // what `usdt` makes of the provider is assembly

    use vmm_abi::block::{BlockDone, BlockReq};

    #[usdt::provider(provider = "vmm_block")]
    mod firing {
        fn request_start(disk: &str, token: u64, op: u32, offset: u64, bytes: u64) {}
        fn request_done(disk: &str, token: u64, error: i32) {}
    }

    pub(crate) fn register() {
        if let Err(error) = usdt::register_probes() {
            log::debug!("DTrace can't see the probes: {error}");
        }
    }

    #[inline(always)]
    pub(crate) fn request_start(disk: &str, request: &BlockReq) {
        firing::request_start!(|| (disk, request.token, request.op, request.offset, request.len));
    }

    #[inline(always)]
    pub(crate) fn request_done(disk: &str, done: &BlockDone) {
        firing::request_done!(|| (disk, done.token, -done.result));
    }
}

#[cfg(not(feature = "probes"))]
mod fired {
    use vmm_abi::block::{BlockDone, BlockReq};

    pub(crate) fn register() {}
    #[inline(always)]
    pub(crate) fn request_start(_: &str, _: &BlockReq) {}
    #[inline(always)]
    pub(crate) fn request_done(_: &str, _: &BlockDone) {}
}

pub(crate) use fired::{register, request_done, request_start};
