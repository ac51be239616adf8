//! Registers and interrupts, as the data sheet and drivers that probe for a 16550A want them.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends where its helpers fail

mod port;

use port::*;
use vmm_plugin_api::testing::FakeHost;
use vmm_plugin_uart::VMM_PLUGIN;

/// Fills the receiver by loopback.
fn loop_back(port: &Port, bytes: impl IntoIterator<Item = u8>) {
    port.put(MCR, LOOPBACK);
    for byte in bytes {
        port.put(DATA, byte);
    }
}

#[test]
fn is_where_a_pc_has_it() {
    let host = FakeHost::new(4096);
    for (name, address) in [
        ("com1", 0x3f8),
        ("com2", 0x2f8),
        ("com3", 0x3e8),
        ("com4", 0x2e8),
    ] {
        let device = host
            .device(&VMM_PLUGIN, "lpc-uart", &[("port", name.into())])
            .unwrap();
        let region = device.regions()[0];
        assert_eq!((region.address, region.size), (address, 8), "{name}");
    }
}

/// The steps by which Linux's 8250 driver tells a 16550A from its relatives.
#[test]
fn probes_as_a_16550a() {
    let port = Port::alone();
    port.put(IER, 0);
    assert_eq!(port.get(IER), 0);
    port.put(IER, 0x0f);
    assert_eq!(port.get(IER), 0x0f);
    port.put(IER, 0xff);
    assert_eq!(
        port.get(IER),
        0x0f,
        "bits that the chip does not have read as zero"
    );
    port.put(IER, 0);

    port.put(MCR, LOOPBACK | 0x0a);
    assert_eq!(
        port.get(MSR) & 0xf0,
        0x90,
        "RTS and OUT2 come back as CTS and DCD"
    );
    port.put(MCR, 0);

    port.put(FCR, 0x01);
    assert_eq!(port.get(IIR) >> 6, 3, "FIFOs work");
    port.put(LCR, 0x80);
    port.put(FCR, 0x21);
    assert_eq!(
        port.get(IIR) & 0xe0,
        0xc0,
        "not the 64-byte FIFOs of a 16750"
    );
    port.put(LCR, 0);
    port.put(FCR, 0);
    assert_eq!(port.get(IIR) >> 6, 0);

    port.put(LCR, 0x83);
    port.put(DATA, 0x0c);
    port.put(IER, 0x34);
    assert_eq!(
        (port.get(DATA), port.get(IER)),
        (0x0c, 0x34),
        "the divisor is kept"
    );
    port.put(LCR, 0x03);
    assert_eq!(
        (port.get(LCR), port.get(IER)),
        (0x03, 0),
        "and hides when DLAB is off"
    );
    port.put(SCR, 0x5a);
    assert_eq!(port.get(SCR), 0x5a);
    assert_eq!(
        port.get(LSR),
        0x60,
        "the transmitter is empty, nothing is received"
    );
}

#[test]
fn transmitter_interrupt_comes_with_each_write_and_goes_when_identified() {
    let port = Port::alone();
    port.put(FCR, 0x01);
    port.put(IER, 0x02);
    assert_eq!(
        port.get(IIR),
        0xc2,
        "enabling it with an empty transmitter raises it"
    );
    assert_eq!(port.get(IIR), 0xc1, "reading IIR takes it away");
    port.put(IER, 0x00);
    port.put(IER, 0x02);
    assert_eq!(port.get(IIR), 0xc2, "and enabling it again brings it back");

    assert!(!port.device.pin(0));
    port.put(DATA, b'x');
    assert!(
        !port.device.pin(0),
        "OUT2 is off: the chip is not connected to the pin"
    );
    port.put(MCR, DTR_RTS_OUT2);
    assert!(port.device.pin(0));
    assert_eq!(port.get(IIR), 0xc2);
    assert!(!port.device.pin(0));
    port.put(DATA, b'y');
    assert!(port.device.pin(0));
    assert_eq!(port.device.pin_rises(0), 2);
    port.put(MCR, DTR_RTS_OUT2 | LOOPBACK);
    assert!(!port.device.pin(0), "loopback takes OUT2 off the pin");
    assert_eq!(port.device.counter("sent_bytes"), 2);
}

#[test]
fn receiver_interrupts_at_each_trigger_level_and_times_out_below() {
    let port = Port::alone();
    port.put(IER, 0x01);
    for (bits, level) in [(0x00, 1), (0x40, 4), (0x80, 8), (0xc0, 14)] {
        port.put(FCR, 0x03 | bits);
        assert_eq!(port.get(IIR), 0xc1);
        loop_back(&port, 0..level - 1);
        assert_eq!(
            port.get(IIR),
            if level == 1 { 0xc1 } else { 0xcc },
            "below level {level}"
        );
        loop_back(&port, [level - 1]);
        assert_eq!(port.get(IIR), 0xc4, "at level {level}");
        assert_eq!(port.get(DATA), 0);
        assert_eq!(
            port.get(IIR),
            if level == 1 { 0xc1 } else { 0xcc },
            "the rest does not wait for more"
        );
        assert_eq!(port.take(), (1..level).collect::<Vec<_>>());
        assert_eq!(port.get(IIR), 0xc1);
    }
}

#[test]
fn overrun_is_reported_once_and_loses_what_the_chip_loses() {
    let port = Port::alone();
    port.put(IER, 0x05);
    port.put(FCR, 0xc1);
    loop_back(&port, 0..17);
    assert_eq!(
        port.get(IIR),
        0xc6,
        "line status comes before received data"
    );
    assert_eq!(port.get(LSR), 0x63);
    assert_eq!(port.get(LSR), 0x61, "reading clears the error");
    assert_eq!(
        port.take(),
        (0..16).collect::<Vec<_>>(),
        "a FIFO keeps what it has"
    );

    port.put(FCR, 0);
    loop_back(&port, [1, 2]);
    assert_eq!(port.get(LSR), 0x63);
    assert_eq!(
        port.take(),
        [2],
        "without a FIFO the last byte replaces the one before"
    );
    loop_back(&port, [1]);
    port.put(FCR, 0x01);
    assert_eq!(port.take(), [0u8; 0], "turning the FIFO on empties it");
}

#[test]
fn modem_lines_report_changes_until_read() {
    let port = Port::alone();
    assert_eq!(port.get(MSR), 0xb0, "the other end is there");
    port.put(MCR, LOOPBACK);
    assert_eq!(port.get(MSR), 0x0b);
    assert_eq!(port.get(MSR), 0x00);
    port.put(IER, 0x08);
    assert_eq!(port.get(IIR), 0x01);
    port.put(MCR, LOOPBACK | 0x04);
    assert_eq!(
        port.get(MSR),
        0x40,
        "the ring indicator counts only when it ends"
    );
    port.put(MCR, LOOPBACK | 0x01);
    assert_eq!(port.get(IIR), 0x00);
    assert_eq!(port.get(MSR), 0x26);
    assert_eq!(port.get(IIR), 0x01);
}

#[test]
fn wide_accesses_are_bytes_in_order() {
    let port = Port::alone();
    port.device.write(0, SCR, 1, 0x77);
    port.device.write(0, LCR, 2, 0x0b03);
    assert_eq!((port.get(LCR), port.get(MCR)), (0x03, 0x0b));
    assert_eq!(port.device.read(0, 4, 4), 0x77b0_600b);
    assert_eq!(
        port.device.read(0, SCR, 2),
        0xff77,
        "there is nothing beyond the last register"
    );
    port.device.write(0, SCR, 8, u64::MAX);
    assert_eq!(port.get(SCR), 0xff);
}

/// A handler that refills the transmitter as long as it interrupts, fed without end, as with a second CPU that prints.
#[test]
fn a_handler_that_never_runs_dry_gets_a_rest() {
    let port = Port::alone();
    port.put(FCR, 0xc1);
    port.put(MCR, DTR_RTS_OUT2);
    port.put(IER, 0x02);
    for round in 0..3 {
        port.wait("the interrupt", || port.device.pin(0));
        let mut passes = 0;
        while port.get(IIR) & 1 == 0 {
            passes += 1;
            (0..16).for_each(|i| port.put(DATA, i));
            assert!(passes < 512, "Linux gives up here: too much work for irq4");
        }
        assert!(
            passes >= 256,
            "round {round}: one full buffer of 4 KiB needs {passes} passes"
        );
        assert!(!port.device.pin(0));
    }
    assert_eq!(port.device.counter("sent_bytes"), 3 * 256 * 16);
}

#[test]
fn state_survives_save_and_load() {
    let port = Port::alone();
    port.put(FCR, 0x81);
    port.put(LCR, 0x83);
    port.put(DATA, 0x06);
    port.put(LCR, 0x03);
    port.put(SCR, 0x42);
    loop_back(&port, *b"seventeen letters");
    port.put(MCR, DTR_RTS_OUT2);
    port.put(IER, 0x07);
    port.device.pause().unwrap();
    let (version, state) = port.device.save().unwrap();
    assert_eq!(version, 1);

    let other = Port {
        host: FakeHost::new(4096),
        device: port
            .host
            .device(&VMM_PLUGIN, "lpc-uart", &[("port", "com1".into())])
            .unwrap(),
    };
    other.device.load(version, &state).unwrap();
    other.device.start().unwrap();
    assert!(
        other.device.pin(0),
        "the interrupt that was pending is pending"
    );
    assert_eq!(other.device.save().unwrap(), (version, state.clone()));
    assert_eq!(other.get(IIR), 0xc6);
    assert_eq!(other.get(LSR), 0x63);
    assert_eq!(other.take(), b"seventeen letter");
    assert_eq!(
        (other.get(SCR), other.get(LCR), other.get(MCR)),
        (0x42, 0x03, DTR_RTS_OUT2)
    );

    for bad in [
        &state[..11],
        &[0; 11],
        &[0xff; 12],
        &[[0; 12].as_slice(), &[1; 17]].concat(),
    ] {
        assert!(other.device.load(1, bad).is_err(), "{bad:?}");
    }
    let error = other.device.load(2, &state).unwrap_err().to_string();
    assert!(error.contains("version 1, not 2"), "{error}");
}

#[test]
fn reset_is_power_on() {
    let port = Port::alone();
    port.put(FCR, 0x01);
    port.put(IER, 0x0f);
    port.put(MCR, DTR_RTS_OUT2);
    port.put(SCR, 9);
    assert!(port.device.pin(0));
    port.device.pause().unwrap();
    port.device.reset().unwrap();
    assert!(!port.device.pin(0));
    port.device.resume().unwrap();
    let registers = [DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR].map(|r| port.get(r));
    assert_eq!(registers, [0, 0, 1, 0, 0, 0x60, 0xb0, 0]);
}

/// xorshift64*: the same accesses in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

#[test]
fn random_accesses_break_nothing() {
    let port = Port::alone();
    let mut random = Random(0x1234_5678_9abc_def1);
    for step in 0..300_000 {
        let r = random.next();
        let (offset, width) = (r >> 8 & 7, 1 << (r >> 16 & 3));
        if r & 1 == 0 {
            port.device.write(0, offset, width, random.next());
        } else {
            let lsr = port.get(LSR);
            assert_eq!(
                lsr & 0x9c,
                0,
                "no parity, framing, break or FIFO error exists here"
            );
            let _ = port.device.read(0, offset, width);
        }
        if step % 1000 == 0 {
            port.device.pause().unwrap();
            let (version, state) = port.device.save().unwrap();
            port.device.load(version, &state).unwrap();
            if step % 5000 == 0 {
                port.device.reset().unwrap();
            }
            port.device.resume().unwrap();
            port.host.poll(std::time::Duration::ZERO);
        }
    }
    assert_eq!(port.host.faults(), Vec::<String>::new());
}
