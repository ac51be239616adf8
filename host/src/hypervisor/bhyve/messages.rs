//! Message signalled interrupts, and the thread that turns eventfds into them: bhyve takes a message by a request only.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;

use super::abi::*;
use super::node::{self, Node};
use super::vcpu::Shared;
use crate::hypervisor::{Msi, MsiRoute};
use crate::thread;

/// Routes of a VM: 2048 vectors are what a function can have, and descriptors end sooner.
const ROUTES: usize = 4096;
/// What the epoll says when the thread is to end.
const END: u64 = u64::MAX;

/// Delivers `msi` now.
pub(super) fn send(node: &Node, msi: Msi) -> io::Result<()> {
    // The message is the first field, the address the second, against custom.
    let mut argument = VmLapicMsi {
        msg: u64::from(msi.data),
        addr: msi.address,
    };
    node.request(&node::LAPIC_MSI, &mut argument).map(drop)
}

/// All routes of a VM.
pub(super) struct Messages {
    routes: Arc<Routes>,
    thread: Option<JoinHandle<()>>,
}

struct Routes {
    epoll: OwnedFd,
    end: OwnedFd,
    /// A route's place is what the epoll says when its eventfd is readable.
    slots: Mutex<Vec<Option<Arc<Route>>>>,
}

struct Route {
    fd: OwnedFd,
    /// `None`: it has ended. Held while a count is taken and delivered, so that no count is taken after the end, and each goes where
    /// the route leads when it is taken.
    msi: Mutex<Option<Msi>>,
}

impl Messages {
    /// Starts the thread.
    pub(super) fn start(shared: Arc<Shared>) -> Result<Self> {
        let routes = Arc::new(Routes {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)
                .context("Cannot create an epoll for interrupts")?,
            end: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .context("Cannot create an eventfd")?,
            slots: Mutex::default(),
        });
        let (end, flags) = (epoll::EventData::new_u64(END), epoll::EventFlags::IN);
        epoll::add(&routes.epoll, &routes.end, end, flags).context("Cannot wait for interrupts")?;
        let own = Arc::clone(&routes);
        let thread = thread::spawn("messages", move || own.serve(&shared))
            .context("The system has no thread left")?;
        Ok(Self {
            routes,
            thread: Some(thread),
        })
    }

    pub(super) fn connect(&self, fd: BorrowedFd<'_>, msi: Msi) -> Result<MsiRoute> {
        let fd = fd
            .try_clone_to_owned()
            .context("Cannot duplicate a descriptor")?;
        let route = Arc::new(Route {
            fd,
            msi: Mutex::new(Some(msi)),
        });
        let mut slots = self.routes.lock();
        let free = slots.iter().position(Option::is_none);
        let index = free.unwrap_or(slots.len());
        ensure!(index < ROUTES, "All {ROUTES} interrupt routes are in use");
        if index == slots.len() {
            slots.push(None);
        }
        let data = epoll::EventData::new_u64(index as u64);
        epoll::add(&self.routes.epoll, &route.fd, data, epoll::EventFlags::IN)
            .context("Cannot wait for an interrupt's eventfd")?;
        slots[index] = Some(route);
        Ok(MsiRoute(u32::try_from(index)?))
    }

    pub(super) fn update(&self, route: &MsiRoute, msi: Msi) -> Result<()> {
        let slots = self.routes.lock();
        let known = slots.get(route.0 as usize).and_then(Option::as_ref);
        let known = known.with_context(|| format!("No interrupt route {}", route.0))?;
        *known.lock() = Some(msi);
        Ok(())
    }

    pub(super) fn disconnect(&self, route: &MsiRoute) -> Result<()> {
        let mut slots = self.routes.lock();
        let known = slots.get_mut(route.0 as usize).and_then(Option::take);
        let known = known.with_context(|| format!("No interrupt route {}", route.0))?;
        *known.lock() = None;
        // The file stays open elsewhere, and an epoll keeps it for as long.
        epoll::delete(&self.routes.epoll, &known.fd).context("Cannot let go of an eventfd")
    }
}

impl Drop for Messages {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.routes.end, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the panic hook already.
            let _ = thread.join();
        }
    }
}

impl Routes {
    fn serve(&self, shared: &Shared) {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        let mut complained = false;
        loop {
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                None,
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    log::error!("interrupts of devices are lost: waiting for them failed: {error}");
                    return;
                }
            }
            for event in &events {
                let place = event.data.u64();
                if place == END {
                    return;
                }
                let route = self.lock().get(place as usize).cloned().flatten();
                // It may have ended since: another that has its place finds nothing to read.
                let Some(Err(error)) = route.map(|route| route.deliver(&shared.node)) else {
                    continue;
                };
                if !complained && !node::is_destroyed(&error) {
                    complained = true;
                    log::warn!("bhyve refused an interrupt of a device: {error}");
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Arc<Route>>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Route {
    fn lock(&self) -> MutexGuard<'_, Option<Msi>> {
        self.msi.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the counts that there are as one interrupt, as an edge would be.
    fn deliver(&self, node: &Node) -> io::Result<()> {
        let msi = self.lock();
        let Some(msi) = *msi else {
            return Ok(());
        };
        match take(self.fd.as_fd()) {
            true => send(node, msi),
            false => Ok(()),
        }
    }
}

/// Whether the eventfd, which does not block, had counts.
fn take(fd: BorrowedFd<'_>) -> bool {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).is_ok()
}
