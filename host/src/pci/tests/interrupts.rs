//! INTx and MSI-X.

use super::*;
use crate::hypervisor::Msi;

#[test]
fn shared_lines_count_their_pins() {
    let board = Board::new();
    // Devices 4 and 8 share a link; 5 and 9 share the line with them by another link.
    let functions: Vec<_> = [4, 8, 5]
        .map(|device| board.add("d", &format!("0.{device}.0"), &desc()))
        .into();
    let gsi = intx_gsi(4, 1);
    assert_eq!((gsi, intx_gsi(8, 1)), (intx_gsi(8, 1), intx_gsi(4, 1)));
    let sharing: Vec<_> = functions
        .iter()
        .filter(|f| intx_gsi(f.bdf().device(), 1) == gsi)
        .collect();
    assert!(sharing.len() >= 2);
    for function in &sharing {
        function.level(true).unwrap();
        function.level(true).unwrap();
    }
    assert!(board.vm.line(gsi));
    assert_eq!(board.vm.seen.lock().unwrap().line_changes, 1);
    for (left, function) in (0..sharing.len()).rev().zip(&sharing) {
        function.level(false).unwrap();
        assert_eq!(board.vm.line(gsi), left > 0);
    }
}

#[test]
fn a_link_that_moves_takes_its_level_along() {
    let board = Board::new();
    let function = board.add("dev.a", "0.4.0", &desc());
    let other = board.add("dev.b", "0.8.0", &desc());
    let link = intx_link(4, 1);
    assert_eq!(link, intx_link(8, 1));
    board.lines.route(link, Some(5));
    function.level(true).unwrap();
    other.level(true).unwrap();
    assert!(board.vm.line(5) && !board.vm.line(intx_gsi(4, 1)));
    // The new line is held by another pin already: it stays high when the link leaves it.
    let sci = board.lines.pin(9).unwrap();
    sci.set(true);
    board.lines.route(link, Some(9));
    assert!(!board.vm.line(5) && board.vm.line(9));
    board.lines.route(link, None);
    assert!(board.vm.line(9));
    sci.set(false);
    assert!(!board.vm.line(9));
    // Nobody hears a link without a line; what is still high arrives when it gets one.
    function.level(false).unwrap();
    board.lines.route(link, Some(3));
    assert!(board.vm.line(3));
    other.level(false).unwrap();
    assert!(!board.vm.line(3));
}

#[test]
fn intx_is_silent_while_disabled_or_replaced_by_msix() {
    let board = Board::new();
    let function = board.add("dev.a", "0.4.0", &desc());
    let gsi = intx_gsi(4, 1);
    function.level(true).unwrap();
    assert!(board.vm.line(gsi));
    assert_eq!(board.read(4, 6, 2), 0x18);
    board.write(4, COMMAND, 2, 1 << 10);
    assert!(!board.vm.line(gsi));
    // The status bit tells regardless of the disable bit.
    assert_eq!(board.read(4, 6, 2), 0x18);
    board.write(4, COMMAND, 2, 0);
    assert!(board.vm.line(gsi));
    board.write(4, MSIX + 2, 2, 0x8000);
    assert!(!board.vm.line(gsi) && function.msix_enabled());
    board.write(4, MSIX + 2, 2, 0);
    assert!(board.vm.line(gsi) && !function.msix_enabled());
    function.level(false).unwrap();
    assert_eq!(board.read(4, 6, 2), 0x10);
    function.level(true).unwrap();
    board.root.reset();
    assert!(!board.vm.line(gsi));
    let none = board.add(
        "dev.b",
        "0.6.0",
        &PciFunctionDesc {
            intx: false,
            ..desc()
        },
    );
    assert!(none.level(true).unwrap_err().to_string().contains("dev.b"));
}

#[test]
fn the_master_bit_is_seen() {
    let board = Board::new();
    let function = board.add("dev.a", "0.4.0", &desc());
    assert!(!function.bus_master());
    board.write(4, COMMAND, 2, 4);
    assert!(function.bus_master());
    board.root.reset();
    assert!(!function.bus_master());
}

/// Programs one MSI-X table entry through its BAR.
fn program(mmio: &mut BusReader, table: u64, vector: u64, msi: Msi, masked: bool) {
    mmio.write(table + 16 * vector, 8, msi.address);
    mmio.write(table + 16 * vector + 8, 4, u64::from(msi.data));
    mmio.write(table + 16 * vector + 12, 4, u64::from(masked));
}

#[test]
fn masks_hold_interrupts_back_and_show_them_pending() {
    let board = Board::new();
    let function = board.add("dev.a", "0.4.0", &desc());
    board
        .root
        .assign_resources(&APERTURES, &board.buses)
        .unwrap();
    let table = u64::from(board.read(4, 0x14, 4));
    let pending = table + 70 * 16;
    let mut mmio = board.mmio();
    let msi = |data| Msi {
        address: 0xfee0_0000,
        data,
    };
    board.write(4, MSIX + 2, 2, 0x8000);
    // Power-on: masked. An interrupt raised now waits.
    assert_eq!(mmio.read(table + 12, 4), 1);
    function.raise(69).unwrap();
    assert_eq!(mmio.read(pending, 8), 0);
    assert_eq!(mmio.read(pending + 8, 8), 1 << 5);
    assert_eq!(mmio.read(pending + 8, 4), 1 << 5);
    assert_eq!(board.vm.routes(), []);
    program(&mut mmio, table, 69, msi(0x31), false);
    assert_eq!(board.vm.routes(), [msi(0x31)]);
    assert_eq!(board.vm.seen.lock().unwrap().sent, [msi(0x31)]);
    assert_eq!(mmio.read(pending + 8, 8), 0);
    // A new message while it is live.
    mmio.write(table + 69 * 16 + 8, 4, 0x32);
    assert_eq!(board.vm.routes(), [msi(0x32)]);
    // The function mask, and the count that the descriptor keeps meanwhile.
    board.write(4, MSIX + 2, 2, 0xc000);
    assert_eq!(board.vm.routes(), []);
    function.raise(69).unwrap();
    function.raise(69).unwrap();
    assert_eq!(mmio.read(pending + 8, 8), 1 << 5);
    board.write(4, MSIX + 2, 2, 0x8000);
    assert_eq!(board.vm.seen.lock().unwrap().sent, [msi(0x31), msi(0x32)]);
    // A vector whose descriptor is asked for only after the guest has set it up.
    program(&mut mmio, table, 3, msi(0x40), false);
    assert_eq!(board.vm.routes(), [msi(0x32)]);
    let fd = rustix::fd::AsRawFd::as_raw_fd(&function.msix_fd(3).unwrap());
    assert_eq!(board.vm.routes().len(), 2);
    assert_eq!(
        rustix::fd::AsRawFd::as_raw_fd(&function.msix_fd(3).unwrap()),
        fd
    );
    board.root.reset();
    assert_eq!(board.vm.routes(), []);
    assert!(
        function
            .raise(70)
            .unwrap_err()
            .to_string()
            .contains("vector 70 is out of range")
    );
}

#[test]
fn a_message_that_the_hypervisor_refuses_stays_pending() {
    let board = Board::new();
    let function = board.add("dev.a", "0.4.0", &desc());
    board
        .root
        .assign_resources(&APERTURES, &board.buses)
        .unwrap();
    let table = u64::from(board.read(4, 0x14, 4));
    let mut mmio = board.mmio();
    board.write(4, MSIX + 2, 2, 0x8000);
    function.raise(0).unwrap();
    board.vm.seen.lock().unwrap().refuse_msi = true;
    program(
        &mut mmio,
        table,
        0,
        Msi {
            address: 0xdead_0000,
            data: 1,
        },
        false,
    );
    assert_eq!(mmio.read(table + 70 * 16, 8), 1);
    board.vm.seen.lock().unwrap().refuse_msi = false;
    let good = Msi {
        address: 0xfee0_0000,
        data: 1,
    };
    program(&mut mmio, table, 0, good, false);
    assert!(board.vm.seen.lock().unwrap().sent.contains(&good));
    assert_eq!(mmio.read(table + 70 * 16, 8), 0);
}
