//! `vmm.host.thread/1`, as a plugin calls it.

#![allow(unsafe_code)] // calls a table of the ABI

use vmm_abi::Str;
use vmm_abi::host::{THREAD, ThreadTable};

use super::objects::Stage;

#[test]
fn a_plugins_thread_gathers_and_stops() {
    let host = Stage::new().host();
    // SAFETY: a call by the table's contract.
    let iface = unsafe { (host.service)(host.ctx, Str::new(THREAD)) };
    // SAFETY: the name stands for this table.
    let table = unsafe { iface.table.cast::<ThreadTable>().as_ref() }.unwrap();
    let ctx = host.ctx as usize;
    let gather = move |on| {
        // SAFETY: a call by the table's contract.
        unsafe { (table.gather)(ctx as *mut _, on) }
    };
    let policy = || {
        let path = "/proc/thread-self/stat";
        let text = std::fs::read_to_string(path).unwrap();
        // proc(5): policy is field 41, and the third is what follows the name in parentheses.
        let rest = text.rsplit_once(") ").unwrap().1;
        rest.split(' ').nth(41 - 3).unwrap().to_owned()
    };
    let seen = std::thread::spawn(move || {
        let mut seen = Vec::new();
        for on in [1, 0, 0, 1, 1] {
            seen.push((gather(on), policy()));
        }
        seen
    });
    let expected = [
        (0, "3"),
        (0, "0"),
        (-libc::ENOTSUP, "0"),
        (0, "3"),
        (-libc::ENOTSUP, "3"),
    ];
    let seen = seen.join().unwrap();
    let seen: Vec<(i32, &str)> = seen.iter().map(|(code, text)| (*code, &**text)).collect();
    assert_eq!(seen, expected);
}
