//! Guest writes that only signal. bhyve has no eventfds of its own in this place: the write is an exit, and the vCPU's thread
//! adds one to the eventfd before any device is looked for.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use arc_swap::ArcSwap;

use crate::hypervisor::{Doorbell, Space};

/// All that are bound. Read by each vCPU at each write of its guest, without a lock, and changed when a guest places a device.
#[derive(Default)]
pub(super) struct Doorbells {
    /// Ascending by [`place`].
    table: ArcSwap<Vec<Bound>>,
    changes: Mutex<()>,
}

#[derive(Clone)]
struct Bound {
    bell: Doorbell,
    fd: Arc<OwnedFd>,
}

fn place(space: Space, address: u64) -> (bool, u64) {
    (space == Space::Mmio, address)
}

impl Bound {
    fn place(&self) -> (bool, u64) {
        place(self.bell.space, self.bell.address)
    }

    fn hears(&self, width: u8, value: u64) -> bool {
        let (own_width, own_value) = (self.bell.width, self.bell.value);
        (own_width == 0 || own_width == width) && own_value.is_none_or(|own| own == value)
    }
}

/// Whether one write could be for both.
fn collide(a: &Doorbell, b: &Doorbell) -> bool {
    let widths = a.width == 0 || b.width == 0 || a.width == b.width;
    let values = a.value.is_none() || b.value.is_none() || a.value == b.value;
    place(a.space, a.address) == place(b.space, b.address) && widths && values
}

impl Doorbells {
    /// Signals the eventfd for this write, if there is one.
    pub(super) fn ring(&self, space: Space, address: u64, width: u8, value: u64) -> bool {
        let table = self.table.load();
        let place = place(space, address);
        let first = table.partition_point(|bound| bound.place() < place);
        let here = table[first..].iter();
        let found = here
            .take_while(|bound| bound.place() == place)
            .find(|bound| bound.hears(width, value));
        let Some(bound) = found else {
            return false;
        };
        // A full counter means what one more count would.
        let _ = rustix::io::write(&bound.fd, &1u64.to_ne_bytes());
        true
    }

    pub(super) fn bind(&self, bell: Doorbell, fd: BorrowedFd<'_>) -> Result<()> {
        let fd = fd
            .try_clone_to_owned()
            .context("Cannot duplicate a descriptor")?;
        let _changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = self.table.load().to_vec();
        if table.iter().any(|bound| collide(&bound.bell, &bell)) {
            bail!("{bell:x?} is bound already");
        }
        let fd = Arc::new(fd);
        table.push(Bound { bell, fd });
        table.sort_by_key(Bound::place);
        self.table.store(Arc::new(table));
        Ok(())
    }

    pub(super) fn unbind(&self, bell: Doorbell) -> Result<()> {
        let _changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = self.table.load().to_vec();
        let at = table.iter().position(|bound| bound.bell == bell);
        let at = at.with_context(|| format!("{bell:x?} is not bound"))?;
        table.remove(at);
        self.table.store(Arc::new(table));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn bell(address: u64, width: u8, value: Option<u64>) -> Doorbell {
        Doorbell {
            space: Space::Mmio,
            address,
            width,
            value,
        }
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
    }

    #[test]
    fn a_write_rings_its_own_bell_alone() {
        let bells = Doorbells::default();
        let fds: Vec<OwnedFd> = (0..3)
            .map(|_| eventfd(0, EventfdFlags::NONBLOCK).unwrap())
            .collect();
        bells.bind(bell(0x40, 2, Some(8)), fds[0].as_fd()).unwrap();
        bells.bind(bell(0x40, 2, Some(7)), fds[1].as_fd()).unwrap();
        bells.bind(bell(0x30, 0, None), fds[2].as_fd()).unwrap();
        assert!(bells.ring(Space::Mmio, 0x40, 2, 7));
        assert!(bells.ring(Space::Mmio, 0x30, 1, 5) && bells.ring(Space::Mmio, 0x30, 4, 6));
        for (space, address, width, value) in [
            (Space::Mmio, 0x40, 4, 7),
            (Space::Mmio, 0x40, 2, 9),
            (Space::Pio, 0x30, 1, 5),
            (Space::Mmio, 0x50, 2, 7),
        ] {
            assert!(!bells.ring(space, address, width, value));
        }
        let counts: Vec<_> = fds.iter().map(count).collect();
        assert_eq!(counts, [0, 1, 2]);
    }

    #[test]
    fn a_bell_is_bound_once_and_unbound_once() {
        let bells = Doorbells::default();
        let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let own = bell(0x40, 2, Some(7));
        bells.bind(own, fd.as_fd()).unwrap();
        for other in [own, bell(0x40, 0, Some(7)), bell(0x40, 2, None)] {
            assert!(bells.bind(other, fd.as_fd()).is_err(), "{other:?}");
        }
        bells.bind(bell(0x40, 4, Some(7)), fd.as_fd()).unwrap();
        bells.unbind(own).unwrap();
        assert!(bells.unbind(own).is_err() && !bells.ring(Space::Mmio, 0x40, 2, 7));
    }
}
