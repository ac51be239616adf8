//! Clients that the host's I/O thread serves, around one output ring and one input queue.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use vmm_plugin_api::{Counter, Events, Host};

use crate::client::Client;
use crate::input::Input;
use crate::output::Output;

/// Token of the output's wake-up and of the timer that paces it.
const WAKE: u64 = 0;
/// First token of clients; those below are for the backend.
const FIRST_CLIENT: u64 = 16;

/// How long the I/O thread lets output gather after it has sent some: a guest that writes byte by byte then costs one system call
/// per interval instead of two per byte. The first byte after silence goes at once.
const GATHER_NS: u64 = 2_000_000;
/// How long the end of the VM waits for clients to take the last output.
const FINISH: Duration = Duration::from_secs(1);

/// Output ring, input queue and clients.
pub(crate) struct Console {
    host: Host,
    output: Output,
    input: Input,
    clients: Mutex<Clients>,
    lost: Counter,
}

struct Clients {
    by_token: BTreeMap<u64, Client>,
    next: u64,
    /// Position up to which output has been offered to every client.
    seen: u64,
    /// The timer runs: nobody has to wake the I/O thread for output.
    gathering: bool,
}

impl Console {
    /// A console that keeps `buffer` bytes of output.
    pub(crate) fn new(buffer: u64, host: &Host) -> Result<Self> {
        let output = Output::new(usize::try_from(buffer)?)?;
        host.watch(output.wake_fd(), Events::READ, WAKE)?;
        Ok(Self {
            host: host.clone(),
            output,
            input: Input::new()?,
            clients: Mutex::new(Clients {
                by_token: BTreeMap::new(),
                next: FIRST_CLIENT,
                seen: 0,
                gathering: false,
            }),
            lost: host.counter("lost_bytes"),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes output from the guest.
    pub(crate) fn write(&self, bytes: &[u8]) -> usize {
        self.output.write(bytes);
        bytes.len()
    }

    /// Gives input to the guest.
    pub(crate) fn read(&self, buf: &mut [u8]) -> Option<usize> {
        let taken = self.input.take(buf);
        if taken.room {
            self.output.wake();
        }
        taken.len
    }

    /// Readable while there is input.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.input.fd()
    }

    /// Connected clients.
    pub(crate) fn clients(&self) -> usize {
        self.lock().by_token.len()
    }

    /// Serves another client over a nonblocking stream.
    pub(crate) fn add(&self, stream: OwnedFd) -> Result<()> {
        let mut clients = self.lock();
        let token = clients.next;
        clients.next += 1;
        clients
            .by_token
            .insert(token, Client::new(stream, &self.output));
        // The watch reports room for output at once, and then the client gets what is kept.
        let watched = clients.by_token.get(&token).map_or(Ok(()), |client| {
            self.host
                .watch(client.stream().as_fd(), Events::READ | Events::WRITE, token)
        });
        if watched.is_err() {
            clients.by_token.remove(&token);
        }
        watched?;
        self.serve(&mut clients);
        Ok(())
    }

    /// Handles an event of the console's own or of a client. I/O thread.
    pub(crate) fn ready(&self, token: u64, events: Events) {
        let mut clients = self.lock();
        if token != WAKE {
            let lost = clients
                .by_token
                .get_mut(&token)
                .map(|c| c.ready(events, &self.input, &self.output));
            self.settle(&mut clients, token, lost.unwrap_or(0));
            return;
        }
        if events.timer() {
            clients.gathering = false;
            if clients.by_token.is_empty() || self.output.sleep(clients.seen) {
                return;
            }
        } else {
            self.output.awake();
        }
        self.serve(&mut clients);
    }

    /// Offers new output to all clients, looks after those that waited for room for their input, and lets output gather.
    fn serve(&self, clients: &mut Clients) {
        let seen = std::mem::replace(&mut clients.seen, self.output.end());
        let tokens: Vec<u64> = clients.by_token.keys().copied().collect();
        for token in tokens {
            let lost = clients
                .by_token
                .get_mut(&token)
                .map_or(0, |c| c.send(&self.output));
            self.settle(clients, token, lost);
        }
        let silent = clients.seen == seen;
        if clients.gathering || clients.by_token.is_empty() || silent && self.output.sleep(seen) {
            return;
        }
        let timer = self
            .host
            .timer(WAKE, Some(self.host.clock().saturating_add(GATHER_NS)));
        match timer {
            Ok(()) => clients.gathering = true,
            Err(error) => self.host.fault("timer", &format!("{error:#}")),
        }
    }

    /// Watches a client for what it waits for, or lets it go.
    fn settle(&self, clients: &mut Clients, token: u64, lost: u64) {
        let Some(client) = clients.by_token.get(&token) else {
            return;
        };
        if lost > 0 {
            self.lost.add(lost);
            if client.lost == lost {
                self.host.log(
                    log::Level::Warn,
                    format_args!("a client reads too slowly: output older than the buffer is lost to it (`lost_bytes` counts)"),
                );
            }
        }
        let interest = client.interest(self.input.room(1) > 0);
        let watched = match interest {
            _ if client.gone() => Err(None),
            Some(events) => self
                .host
                .watch(client.stream().as_fd(), events, token)
                .map_err(Some),
            None => {
                self.host.unwatch(token);
                Ok(())
            }
        };
        if let Err(error) = watched {
            if let Some(error) = error {
                self.host.log(
                    log::Level::Error,
                    format_args!("a client is cut off: {error:#}"),
                );
            }
            self.host.unwatch(token);
            clients.by_token.remove(&token);
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.host.unwatch(WAKE);
        let end = Instant::now() + FINISH;
        let mut clients = self.lock();
        for (&token, client) in &mut clients.by_token {
            self.host.unwatch(token);
            client.finish(&self.output, end);
        }
    }
}
