//! A guest that means harm: senseless writes to everything the board has. What counts is that the host lives and still
//! answers; the board may be in any state afterwards, so nothing but a reset comes after it.

use crate::io::{inb, inl, inw, outb, outl, outw, read32, write32};
use crate::{check, memory, power, println, serial};

/// First port and how many: the ports that do not end the VM, whatever is written there.
const PORTS: &[(u16, u16)] = &[
    (0x60, 1),     // keyboard data
    (0x70, 2),     // CMOS clock
    (0x80, 12),    // POST code, as far as a wide access stays off the reset at 0x92
    (0xb2, 2),     // APM
    (0x402, 1),    // debug port
    (0x510, 12),   // firmware configuration
    (0xafe0, 4),   // general purpose events
    (0xb000, 4),   // power management status and enable
    (0xb006, 0xa), // and its timer
    (0xcf8, 1),    // configuration address in bytes, which is nothing
    (0xcfc, 4),    // configuration data
];
const PIC_MASKS: [u16; 2] = [0x21, 0xa1];
const FW_CFG_DMA: u16 = 0x514;
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const PIRQ: u8 = 0x60;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        // Knuth's MMIX generator; its upper half is the better one.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    fn below(&mut self, end: u32) -> u32 {
        self.next() % end
    }
}

pub fn run(count: u64) -> ! {
    // Interrupts that nobody here expects would come by the 8259s, at the vectors of exceptions.
    outb(PIC_MASKS[0], 0xff);
    outb(PIC_MASKS[1], 0xff);
    let mut random = Random(0x5eed);
    for _ in 0..count {
        match random.below(8) {
            0 => fw_cfg(&mut random),
            1 => pirq(&mut random),
            2 => configuration(&mut random),
            3 => dma(&mut random),
            _ => port(&mut random),
        }
    }
    quiet();
    check!(
        inl(CONFIG_ADDRESS) == 0 && host_bridge() == 0x1237_8086,
        "hammer",
        "after {count} senseless accesses the host still answers"
    );
    println!("PASS hammer");
    serial::drain();
    power::reset()
}

fn port(random: &mut Random) {
    let (first, len) = PORTS[random.below(PORTS.len() as u32) as usize];
    let port = first + random.below(u32::from(len)) as u16;
    let value = random.next();
    match random.below(6) {
        0 => outb(port, value as u8),
        // Wider ones would reach the sleep register behind the power management's.
        1 if port & 0xff00 != 0xb000 => outw(port, value as u16),
        2 if port & 0xff00 != 0xb000 => outl(port, value),
        3 => drop(inb(port)),
        4 => drop(inw(port)),
        _ => drop(inl(port)),
    }
}

/// Addresses that are no RAM, or all but.
fn nowhere(random: &mut Random) -> u64 {
    const EDGES: [u64; 8] = [
        0xc000_0000,
        0xe000_0000,
        0xfec0_0000,
        0xfee0_0000,
        0xffff_fff8,
        0x10_0000_0000,
        u64::MAX - 7,
        u64::MAX,
    ];
    EDGES[random.below(8) as usize].saturating_add(u64::from(random.below(16)))
}

/// Requests at addresses where there is none.
fn fw_cfg(random: &mut Random) {
    let address = nowhere(random);
    outl(FW_CFG_DMA, ((address >> 32) as u32).swap_bytes());
    outl(FW_CFG_DMA + 4, (address as u32).swap_bytes());
}

/// Requests in RAM that ask for what is not there, to where nothing is.
fn dma(random: &mut Random) {
    let mark = memory::mark();
    let request = memory::dma(16).address();
    let control = random.next() & 0x00ff_001f;
    let target = nowhere(random);
    write32(request, control.swap_bytes());
    write32(request + 4, random.next().swap_bytes());
    write32(request + 8, ((target >> 32) as u32).swap_bytes());
    write32(request + 12, (target as u32).swap_bytes());
    outl(FW_CFG_DMA, 0);
    outl(FW_CFG_DMA + 4, (request as u32).swap_bytes());
    let _ = read32(request);
    memory::free_to(mark);
}

fn select(function: u32, register: u8) {
    outl(
        CONFIG_ADDRESS,
        1 << 31 | function << 8 | u32::from(register & 0xfc),
    );
}

/// Interrupt routes of the ISA bridge.
fn pirq(random: &mut Random) {
    select(1 << 3, PIRQ);
    outb(CONFIG_DATA + random.below(4) as u16, random.next() as u8);
}

/// Any register of any function.
fn configuration(random: &mut Random) {
    select(random.below(256), random.next() as u8);
    let port = CONFIG_DATA + random.below(4) as u16;
    match random.below(3) {
        0 => outb(port, random.next() as u8),
        1 => outl(CONFIG_DATA, random.next()),
        _ => drop(inl(CONFIG_DATA)),
    }
}

/// What would disturb the serial port from now on: decoding of random addresses.
fn quiet() {
    for function in 0..256 {
        select(function, 4);
        outw(CONFIG_DATA, 0);
    }
    outl(CONFIG_ADDRESS, 0);
}

fn host_bridge() -> u32 {
    select(0, 0);
    let id = inl(CONFIG_DATA);
    outl(CONFIG_ADDRESS, 0);
    id
}
