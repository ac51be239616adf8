//! Creating and deleting I/O queues (sections 5.3 to 5.6), and the threads that serve them.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use vmm_plugin_api::Doorbell;

use crate::admin::Answer;
use crate::command::Command;
use crate::data::PAGE;
use crate::doorbells::{QUEUES, Shadow, submission_offset};
use crate::features::Features;
use crate::interrupts::VECTORS;
use crate::registers::MAX_ENTRIES;
use crate::rings::{CompletionQueue, Submission};
use crate::shared::{Shared, WorkNote};
use crate::status::Status;
use crate::worker::Worker;
use crate::{REGISTERS_BAR, lane::Lane};

/// Physically contiguous: the only kind of queue there is (`CAP.CQR`).
const CONTIGUOUS: u32 = 1;
/// The completion queue interrupts.
const INTERRUPTS: u32 = 2;

/// The queues that exist, by identifier. Place 0 of each table stays empty.
pub(crate) struct IoQueues {
    shared: Arc<Shared>,
    /// The completion queue that each submission queue uses.
    submissions: [Option<u16>; QUEUES],
    /// The thread of each completion queue.
    completions: [Option<JoinHandle<()>>; QUEUES],
    shadow: Option<Shadow>,
    /// Submission queues whose doorbell signals the thread's bell.
    bound: [bool; QUEUES],
}

/// Identifier and entries of the queue that a command creates.
fn identity(command: &Command, limit: usize) -> Result<(u16, u32), Status> {
    let (id, entries) = (command.dword(10) as u16, (command.dword(10) >> 16) + 1);
    if id == 0 || usize::from(id) > limit {
        return Err(Status::INVALID_QUEUE_IDENTIFIER);
    }
    if !(2..=MAX_ENTRIES).contains(&entries) {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    Ok((id, entries))
}

/// Guest address of the queue that a command creates.
fn address(command: &Command) -> Result<u64, Status> {
    if command.dword(11) & CONTIGUOUS == 0 {
        return Err(Status::INVALID_FIELD);
    }
    if !command.prp1().is_multiple_of(PAGE) {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    Ok(command.prp1())
}

impl IoQueues {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            submissions: [None; QUEUES],
            completions: [const { None }; QUEUES],
            shadow: None,
            bound: [false; QUEUES],
        }
    }

    /// Whether there are any.
    pub(crate) fn any(&self) -> bool {
        self.completions.iter().any(Option::is_some)
    }

    pub(crate) fn create_completion(&mut self, command: &Command, features: &Features) -> Answer {
        let (id, entries) = identity(command, features.queues())?;
        if self.completions[usize::from(id)].is_some() {
            return Err(Status::INVALID_QUEUE_IDENTIFIER);
        }
        let vector = (command.dword(11) >> 16) as u16;
        if vector >= VECTORS {
            return Err(Status::INVALID_INTERRUPT_VECTOR);
        }
        self.entry_sizes()?;
        let address = address(command)?;
        let shared = &self.shared;
        let interrupts = command.dword(11) & INTERRUPTS != 0;
        let queue = CompletionQueue::new(
            shared.memory,
            id,
            address,
            entries,
            interrupts.then_some(vector),
            self.shadow,
        );
        let queue = queue.map_err(|_| Status::INVALID_FIELD)?;
        self.completions[usize::from(id)] = Some(self.start(queue, vector, entries)?);
        Ok(0)
    }

    /// Starts the thread of a completion queue.
    fn start(
        &self,
        queue: CompletionQueue,
        vector: u16,
        entries: u32,
    ) -> Result<JoinHandle<()>, Status> {
        let shared = self.shared.clone();
        let id = queue.id;
        let start = || -> vmm_plugin_api::Result<JoinHandle<()>> {
            shared.interrupts.open(vector)?;
            let lane = shared.make_lane(id)?;
            let worker = Worker::new(shared.clone(), queue, shared.take_engine()?);
            shared.doorbells.completion[usize::from(id)].open(entries, id);
            lane.open();
            let thread = shared.host.spawn(&format!("nvme-q{id}"), || worker.run());
            Ok(thread.inspect_err(|_| lane.close())?)
        };
        start().map_err(|error| {
            shared.doorbells.completion[usize::from(id)].close();
            let text = format_args!("can't serve completion queue {id}: {error:#}");
            shared.host.log(log::Level::Error, text);
            Status::INTERNAL_ERROR
        })
    }

    pub(crate) fn create_submission(&mut self, command: &Command, features: &Features) -> Answer {
        let (id, entries) = identity(command, features.queues())?;
        if self.submissions[usize::from(id)].is_some() {
            return Err(Status::INVALID_QUEUE_IDENTIFIER);
        }
        let server = (command.dword(11) >> 16) as u16;
        if server == 0 || usize::from(server) > features.queues() {
            return Err(Status::INVALID_QUEUE_IDENTIFIER);
        }
        if self.completions[usize::from(server)].is_none() {
            return Err(Status::COMPLETION_QUEUE_INVALID);
        }
        self.entry_sizes()?;
        let address = address(command)?;
        let memory = self.shared.memory;
        let queue = Submission::new(memory, id, address, entries, self.shadow);
        let queue = queue.map_err(|_| Status::INVALID_FIELD)?;
        let shared = self.shared.clone();
        let lane = shared.lane(server).ok_or(Status::INTERNAL_ERROR)?;
        shared.doorbells.submission[usize::from(id)].open(entries, server);
        self.submissions[usize::from(id)] = Some(server);
        lane.ask(WorkNote::Add(queue));
        if self.shadow.is_some() {
            self.bind(id, lane);
        }
        Ok(0)
    }

    fn entry_sizes(&self) -> Result<(), Status> {
        if self.shared.registers.configuration().entry_sizes_fit() {
            Ok(())
        } else {
            Err(Status::INVALID_FIELD)
        }
    }

    /// Section 5.6: what has been fetched is completed; what has not been is not.
    pub(crate) fn delete_submission(&mut self, command: &Command) -> Answer {
        let id = command.dword(10) as u16;
        let place = self.submissions.get_mut(usize::from(id));
        let server = place
            .and_then(Option::take)
            .ok_or(Status::INVALID_QUEUE_IDENTIFIER)?;
        self.shared.doorbells.submission[usize::from(id)].close();
        let shared = self.shared.clone();
        if let Some(lane) = shared.lane(server) {
            lane.ask(WorkNote::Remove(id));
            self.unbind(id, lane.bell());
        }
        Ok(0)
    }

    pub(crate) fn delete_completion(&mut self, command: &Command) -> Answer {
        let id = command.dword(10) as u16;
        let exists = self.completions.get(usize::from(id));
        if !exists.is_some_and(Option::is_some) {
            return Err(Status::INVALID_QUEUE_IDENTIFIER);
        }
        if self.submissions.contains(&Some(id)) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        self.end(id, true);
        self.join(id);
        Ok(0)
    }

    /// Tells a completion queue's thread, if there is one, to finish and end; [`IoQueues::join`] waits for that.
    fn end(&self, id: u16, visible: bool) {
        if self.completions[usize::from(id)].is_some()
            && let Some(lane) = self.shared.lane(id)
        {
            lane.tell(WorkNote::Exit { visible });
        }
    }

    fn join(&mut self, id: u16) {
        let Some(thread) = self.completions[usize::from(id)].take() else {
            return;
        };
        // A panic in it has been reported as a fault by the thread itself.
        let _ = thread.join();
        let bell = &self.shared.doorbells.completion[usize::from(id)];
        bell.close();
        self.shared.interrupts.taken(id, || bell.unread());
    }

    /// Ends all queues, with what is in flight finished; the guest sees it done if `visible`.
    pub(crate) fn close(&mut self, visible: bool) {
        let shared = self.shared.clone();
        // All threads finish what they have at the same time.
        for id in 0..QUEUES as u16 {
            self.end(id, visible);
        }
        for id in 0..QUEUES as u16 {
            self.join(id);
            if let Some(server) = self.submissions[usize::from(id)].take() {
                shared.doorbells.submission[usize::from(id)].close();
                if let Some(lane) = shared.lane(server) {
                    self.unbind(id, lane.bell());
                }
            }
        }
        self.shadow = None;
        shared.write_through.store(false, Ordering::Relaxed);
    }

    /// The guest has set up shadow doorbells.
    pub(crate) fn set_shadow(&mut self, shadow: Shadow) {
        let shared = self.shared.clone();
        self.shadow = Some(shadow);
        for (id, _) in (0u16..).zip(&self.completions).filter(|(_, t)| t.is_some()) {
            if let Some(lane) = shared.lane(id) {
                lane.ask(WorkNote::Shadow(shadow));
            }
        }
        for id in 0..QUEUES as u16 {
            let server = self.submissions[usize::from(id)];
            if let Some(lane) = server.and_then(|server| shared.lane(server)) {
                self.bind(id, lane);
            }
        }
    }

    /// Makes a submission queue's doorbell signal its thread: with the shadow the value that is written does not matter.
    fn bind(&mut self, id: u16, lane: &Lane<WorkNote>) {
        if self.bound[usize::from(id)] {
            return;
        }
        match self.shared.host.doorbell(doorbell(id), lane.bell()) {
            Ok(bound) => self.bound[usize::from(id)] = bound,
            Err(error) => self.shared.host.log(
                log::Level::Debug,
                format_args!("queue {id} is notified through registers: {error:#}"),
            ),
        }
    }

    fn unbind(&mut self, id: u16, bell: BorrowedFd<'_>) {
        if !std::mem::take(&mut self.bound[usize::from(id)]) {
            return;
        }
        if let Err(error) = self.shared.host.end_doorbell(doorbell(id), bell) {
            let text = format_args!("queue {id}: {error:#}");
            self.shared.host.log(log::Level::Error, text);
        }
    }
}

fn doorbell(id: u16) -> Doorbell {
    Doorbell {
        region: REGISTERS_BAR,
        offset: submission_offset(id),
        width: 0,
        value: None,
    }
}
