//! Input and output through a real unix socket: what the guest sees of a client, and the client of the guest.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends where its helpers fail

mod port;

use std::io::{Read, Write};
use std::time::Duration;

use port::*;

/// Bytes that repeat late enough to show any loss or swap.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

#[test]
fn what_the_guest_prints_arrives() {
    let dir = tempfile::tempdir().unwrap();
    let (port, mut client) = Port::on_socket(dir.path());
    let text = pattern(100_000);
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; 100_000];
        client.read_exact(&mut got).map(|()| got)
    });
    for &byte in &text {
        port.put(DATA, byte);
    }
    port.wait("the client", || reader.is_finished());
    assert!(reader.join().unwrap().unwrap() == text);
    assert_eq!(port.device.counter("sent_bytes"), 100_000);
    assert_eq!(port.device.counter("dropped_bytes"), 0);
}

/// A guest that takes its time for every interrupt reads 1 MiB through 16 bytes of FIFO.
#[test]
fn a_large_paste_arrives_byte_for_byte() {
    const LEN: usize = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let (port, mut client) = Port::on_socket(dir.path());
    port.put(FCR, 0xc1);
    port.put(MCR, DTR_RTS_OUT2);
    port.put(IER, 0x05);
    let sent = pattern(LEN);
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || client.write_all(&sent).map(|()| client)
    });
    let mut got = Vec::with_capacity(LEN);
    while got.len() < LEN {
        port.wait("the receive interrupt", || port.device.pin(0));
        if got.len().is_multiple_of(65536) {
            // Long out of its handler: nothing may be dropped meanwhile.
            (0..20).for_each(|_| {
                port.host.poll(Duration::from_millis(1));
            });
        }
        while port.get(IIR) & 1 == 0 {
            assert_eq!(port.get(LSR) & 0x02, 0, "overrun after {} bytes", got.len());
            for _ in 0..16 {
                if port.get(LSR) & 1 == 0 {
                    break;
                }
                got.push(port.get(DATA));
            }
        }
    }
    writer.join().unwrap().unwrap();
    assert!(got == sent);
    assert_eq!(port.device.counter("received_bytes"), LEN as u64);
}

#[test]
fn without_fifo_nothing_is_lost_either() {
    let dir = tempfile::tempdir().unwrap();
    let (port, mut client) = Port::on_socket(dir.path());
    client.write_all(&pattern(500)).unwrap();
    let mut got = Vec::new();
    port.wait("500 bytes", || {
        if port.get(LSR) & 1 != 0 {
            got.push(port.get(DATA));
        }
        got.len() == 500
    });
    assert!(got == pattern(500));
}

/// The receiver is full while nobody reads: the I/O thread must sleep, not spin.
#[test]
fn a_full_receiver_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (port, mut client) = Port::on_socket(dir.path());
    port.put(FCR, 0x01);
    client.write_all(&pattern(100)).unwrap();
    port.wait("a byte", || port.get(LSR) & 1 != 0);
    (0..20).for_each(|_| {
        port.host.poll(Duration::from_millis(1));
    });
    let calls: usize = (0..50)
        .map(|_| port.host.poll(Duration::from_millis(1)))
        .sum();
    assert_eq!(
        calls, 0,
        "the I/O thread is called without having anything to do"
    );
    let mut got = Vec::new();
    port.wait("the rest", || {
        got.extend(port.take());
        got.len() == 100
    });
    assert!(got == pattern(100));
}

#[test]
fn input_waits_while_the_guest_asks_for_silence_or_loops_back() {
    let dir = tempfile::tempdir().unwrap();
    let (port, mut client) = Port::on_socket(dir.path());
    port.put(FCR, 0x01);
    let quiet = |what: &str| {
        (0..20).for_each(|_| {
            port.host.poll(Duration::from_millis(1));
        });
        assert_eq!(port.get(LSR) & 1, 0, "{what}");
    };
    port.put(MCR, 0x0b);
    port.put(MCR, 0x09);
    client.write_all(b"hello").unwrap();
    quiet("RTS is off");
    port.put(MCR, LOOPBACK);
    quiet("loopback");
    port.device.pause().unwrap();
    port.put(MCR, 0x0b);
    quiet("the VM is paused");
    port.device.resume().unwrap();
    let mut got = Vec::new();
    port.wait("hello", || {
        got.extend(port.take());
        got.len() == 5
    });
    assert_eq!(got, b"hello");
}

#[test]
fn a_guest_that_never_heard_of_rts_gets_input() {
    let dir = tempfile::tempdir().unwrap();
    let (port, mut client) = Port::on_socket(dir.path());
    port.put(MCR, 0x01);
    client.write_all(b"q").unwrap();
    port.wait("a byte", || port.get(LSR) & 1 != 0);
    assert_eq!(port.get(DATA), b'q');
}
