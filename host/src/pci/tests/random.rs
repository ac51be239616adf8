//! A guest that writes anything anywhere.

use super::*;

/// A small generator, so that a failure repeats.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Whatever a guest writes, the buses stay without overlap, nobody else's range is touched, and every doorbell
/// the hypervisor holds lies inside the BAR it belongs to.
#[test]
fn random_guest_writes_are_contained() {
    for seed in 1..=8 {
        let board = Board::new();
        let mut random = Random(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        let functions: Vec<_> = (2..8)
            .map(|device| board.add(&format!("dev.{device}"), &format!("0.{device}.0"), &desc()))
            .collect();
        let fds: Vec<_> = functions.iter().map(|_| bell()).collect();
        for (function, fd) in functions.iter().zip(&fds) {
            function.doorbell(12, 0x3000, 2, None, fd.as_fd()).unwrap();
            function.doorbell(10, 0x10, 2, None, fd.as_fd()).unwrap();
        }
        let fixed = board.buses.mmio.claims();
        board
            .root
            .assign_resources(&APERTURES, &board.buses)
            .unwrap();
        let (mut pio, mut mmio) = (board.buses.pio.reader(), board.mmio());
        for step in 0..3000 {
            let device = 2 + random.below(6) as u32;
            let width = 1 << random.below(3);
            let interesting = [
                0,
                1,
                0x1000,
                0xc000_0000,
                0xe000_0000,
                0xfec0_0000,
                0xffff_ffff,
                0xcf8,
                0xdff0_0000,
            ];
            let value = if random.below(2) == 0 {
                interesting[random.below(interesting.len() as u64) as usize]
            } else {
                random.next() as u32
            };
            match random.below(6) {
                0 => board.write(device, random.below(0x100) as u16, width, value),
                1 => board.write(device, 0x10 + 4 * random.below(6) as u16, 4, value),
                2 => board.write(device, COMMAND, 2, value & 0x7 | 3),
                3 => board.write(device, MSIX + 2, 2, value),
                4 => {
                    let claims = board.buses.mmio.claims();
                    let (first, last, _) = &claims[random.below(claims.len() as u64) as usize];
                    let at = first + random.below(last - first + 1);
                    mmio.write(at, 1 << random.below(4), random.next());
                    mmio.read(at, 1 << random.below(4));
                }
                _ => {
                    pio.write(0xcf8 + random.below(8), width, random.next());
                    pio.read(0xcf8 + random.below(8), width);
                }
            }
            if step % 10 == 0 {
                functions[random.below(6) as usize]
                    .raise(random.below(70) as u16)
                    .unwrap();
                functions[random.below(6) as usize]
                    .level(random.below(2) == 0)
                    .unwrap();
            }
            let claims = board.buses.mmio.claims();
            assert!(
                claims.windows(2).all(|pair| pair[0].1 < pair[1].0),
                "seed {seed} step {step}: {claims:x?}"
            );
            assert!(
                fixed.iter().all(|claim| claims.contains(claim)),
                "seed {seed} step {step}"
            );
            let bells = board.vm.doorbells();
            let placed = functions.iter().filter(|f| f.bus_master()).flat_map(|f| {
                [
                    f.placed(12).map(|at| at.0 + 0x3000),
                    f.placed(10).map(|at| at.0 + 0x10),
                ]
            });
            let mut expected: Vec<u64> = placed.flatten().collect();
            expected.sort_unstable();
            assert_eq!(
                bells.iter().map(|bell| bell.1).collect::<Vec<_>>(),
                expected,
                "seed {seed} step {step}"
            );
        }
        board.root.reset();
        assert_eq!(board.buses.mmio.claims(), fixed);
        assert_eq!((board.vm.doorbells(), board.vm.routes()), (vec![], vec![]));
        assert!((0..24).all(|gsi| !board.vm.line(gsi)));
    }
}
