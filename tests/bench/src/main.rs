//! Prints what a register access and a batch of requests cost through the plugin ABI.
//!
//! Figures are minima over many short samples, taken in turns, so that other load on the machine hardly shows.

#![allow(unsafe_code)] // calls tables as the host does

use std::ffi::c_void;
use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use vmm_bench::{Direct, Register};
use vmm_plugin_api::abi::device::{IO, IoTable};
use vmm_plugin_api::abi::{self, Iface, KIND_DEVICE, Obj, Root, Sink, Str};
use vmm_plugin_api::testing::{FakeHost, load};
use vmm_plugin_api::{Batch, BlockDone, BlockOp};

const SAMPLES: usize = 3000;
const CALLS: u32 = 2000;
const DEPTH: u64 = 32;

/// Nanoseconds for each of `count` runs of `f`.
fn sample(count: u32, mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..count {
        f();
    }
    start.elapsed().as_nanos() as f64 / f64::from(count)
}

unsafe extern "C" fn no_service(_ctx: *mut c_void, _name: Str) -> Iface {
    Iface::NONE
}

unsafe extern "C" fn no_text(_ctx: *mut c_void, _text: *const u8, _len: usize) {}

/// A device and its register table, as the host's bus holds them.
fn device(root: &Root) -> Result<(Obj, &'static IoTable)> {
    let host = Box::leak(Box::new(abi::Host {
        ctx: std::ptr::null_mut(),
        service: no_service,
    }));
    let err = Sink {
        ctx: std::ptr::null_mut(),
        write: no_text,
    };
    let mut object = Obj::NONE;
    // SAFETY: calls by the ABI's contract, with a host and a sink that live long enough; the object is never released.
    let table = unsafe {
        let name = Str::new("bench-register");
        let code = (root.create)(
            host,
            KIND_DEVICE,
            name,
            std::ptr::null(),
            0,
            &raw mut object,
            &raw const err,
        );
        ensure!(code == 0, "the bench's device can't be created: {code}");
        ((*object.base).interface)(object.this, Str::new(IO))
            .table
            .cast::<IoTable>()
            .as_ref()
    };
    Ok((
        object,
        table.context("the bench's device has no registers")?,
    ))
}

fn region(root: &'static Root) -> Result<()> {
    let (object, io) = device(root)?;
    let direct: Box<dyn Direct> = black_box(Box::<Register>::default());
    let (object, io) = (black_box(object.this), black_box(io));
    let mut best = [f64::MAX; 4];
    for _ in 0..SAMPLES {
        let figures = [
            sample(CALLS, || {
                black_box(direct.read(black_box(0), black_box(0), black_box(4)));
            }),
            sample(CALLS, || {
                // SAFETY: a call by the ABI's contract on a live object.
                black_box(unsafe { (io.read)(object, black_box(0), black_box(0), black_box(4)) });
            }),
            sample(CALLS, || {
                direct.write(black_box(0), black_box(0), black_box(4), black_box(7))
            }),
            // SAFETY: as above.
            sample(CALLS, || unsafe {
                (io.write)(
                    object,
                    black_box(0),
                    black_box(0),
                    black_box(4),
                    black_box(7),
                )
            }),
        ];
        for (best, figure) in best.iter_mut().zip(figures) {
            *best = best.min(figure);
        }
    }
    for (name, direct, plugin) in [("read", best[0], best[1]), ("write", best[2], best[3])] {
        println!(
            "register {name:5} {plugin:5.2} ns through the ABI, {direct:5.2} ns by an in-process dyn call: {:+.2} ns, {:.2} times",
            plugin - direct,
            plugin / direct
        );
    }
    Ok(())
}

fn batch(host: &FakeHost, root: &'static Root) -> Result<()> {
    let backend = host.block(root, "bench-null", &[])?;
    let mut queue = backend.as_block()?.open_queue(64)?;
    let slice = host.memory().readable(0, 4096)?;
    let mut batch = Batch::with_capacity(64, 64);
    let mut done = [BlockDone::default(); 64];
    let mut best = f64::MAX;
    for _ in 0..SAMPLES {
        let whole = sample(CALLS / 32, || {
            for i in 0..DEPTH {
                batch.transfer(i, BlockOp::Read, i * 4096, &[slice]);
            }
            queue.submit(&mut batch);
            black_box(queue.reap(&mut done));
        });
        best = best.min(whole);
    }
    println!(
        "batch of {DEPTH}: {:.2} ns per request, to build, submit and reap it",
        best / DEPTH as f64
    );
    Ok(())
}

fn main() -> Result<()> {
    let (host, root) = (FakeHost::new(1 << 20), load("vmm-bench")?);
    region(root)?;
    batch(&host, root)
}
