//! The admin thread: it enables and disables the controller, and carries out admin commands (section 5).

use std::sync::Arc;

use vmm_plugin_api::{Batch, BlockDone, BlockOp, BlockQueueHandle, GuestSlice};

use crate::command::{Command, Completion, DataPointer};
use crate::data::{self, Direction, MAX_TRANSFER, PAGE};
use crate::doorbells::Shadow;
use crate::events::{Event, Events};
use crate::features::Features;
use crate::io_queues::IoQueues;
use crate::lane::{Gone, Next, wait_backend};
use crate::registers::{FATAL, READY, SHUT_DOWN};
use crate::rings::{CompletionQueue, Submission};
use crate::shared::{AdminNote, Shared};
use crate::status::Status;
use crate::{identify, log_pages};

const DELETE_SUBMISSION: u8 = 0x00;
const CREATE_SUBMISSION: u8 = 0x01;
const GET_LOG_PAGE: u8 = 0x02;
const DELETE_COMPLETION: u8 = 0x04;
const CREATE_COMPLETION: u8 = 0x05;
const IDENTIFY: u8 = 0x06;
const ABORT: u8 = 0x08;
const SET_FEATURES: u8 = 0x09;
const GET_FEATURES: u8 = 0x0a;
const ASYNC_EVENT_REQUEST: u8 = 0x0c;
const DOORBELL_BUFFER: u8 = 0x7c;

/// The admin commands that the controller carries out.
pub(crate) const COMMANDS: [u8; 11] = [
    DELETE_SUBMISSION,
    CREATE_SUBMISSION,
    GET_LOG_PAGE,
    DELETE_COMPLETION,
    CREATE_COMPLETION,
    IDENTIFY,
    ABORT,
    SET_FEATURES,
    GET_FEATURES,
    ASYNC_EVENT_REQUEST,
    DOORBELL_BUFFER,
];

/// The entries of the smallest admin queue (section 3.1.8).
const SMALLEST: u32 = 2;

/// What a command completes with: its result, or why it failed.
pub(crate) type Answer = Result<u32, Status>;

/// The two admin queues.
struct Pair {
    submission: Submission,
    completion: CompletionQueue,
}

/// What the thread works with.
pub(crate) struct Admin {
    shared: Arc<Shared>,
    /// While the controller is enabled and has not been shut down.
    pair: Option<Pair>,
    /// Resets by the guest that have been carried out.
    resets: u64,
    /// Enabling has failed, or the guest has shut the controller down: only a reset goes on.
    halted: bool,
    queues: IoQueues,
    features: Features,
    events: Events,
    /// The namespace has changed since the guest has read the log page that lists it.
    namespace_changed: bool,
    /// For the flush of a shutdown.
    backend: BlockQueueHandle,
}

impl Admin {
    pub(crate) fn new(shared: Arc<Shared>, backend: BlockQueueHandle) -> Self {
        Self {
            queues: IoQueues::new(shared.clone()),
            features: Features::new(&shared),
            events: Events::default(),
            namespace_changed: false,
            pair: None,
            resets: 0,
            halted: false,
            backend,
            shared,
        }
    }

    /// Serves the controller until a note says otherwise.
    pub(crate) fn run(mut self) {
        let shared = self.shared.clone();
        let lane = &shared.admin;
        let _gone = Gone(lane);
        loop {
            if lane.take_attention() && !self.obey() {
                return;
            }
            self.follow_registers();
            if self.serve() || lane.wanted() {
                continue;
            }
            lane.fall_asleep();
            if self.has_work() {
                lane.stay_awake();
            } else {
                lane.sleep(None);
            }
        }
    }

    /// Does what the mailbox says; false: the thread ends. While paused it does not return.
    fn obey(&mut self) -> bool {
        let shared = self.shared.clone();
        loop {
            match shared.admin.next() {
                Next::Work => return true,
                Next::Park => shared.admin.park(),
                Next::Note(AdminNote::PowerOn) => {
                    self.disable(false);
                    shared.registers.power_on();
                    *crate::shared::lock(&shared.errors) = Default::default();
                    shared.admin.done();
                }
                Next::Note(AdminNote::Exit) => {
                    self.queues.close(true);
                    shared.admin.done();
                    return false;
                }
            }
        }
    }

    /// Acts on what the guest has written to the configuration register.
    fn follow_registers(&mut self) {
        let shared = self.shared.clone();
        let resets = shared.registers.resets();
        if std::mem::replace(&mut self.resets, resets) != resets {
            self.disable(false);
        }
        let configuration = shared.registers.configuration();
        if configuration.enabled() && self.pair.is_none() && !self.halted {
            let pair = if configuration.supported() {
                self.open_pair()
            } else {
                None
            };
            match pair {
                Some(pair) => {
                    self.pair = Some(pair);
                    // What the guest will identify is no change to it.
                    let _ = shared.take_resized();
                    shared.registers.add_status(READY, resets);
                }
                None => {
                    self.halted = true;
                    shared.registers.add_status(FATAL, resets);
                    shared.complain(format_args!(
                        "the guest's driver enables the controller with a configuration or admin queues that it can't have"
                    ));
                }
            }
        }
        if shared.registers.take_shutdown() {
            self.shut_down();
        }
    }

    fn open_pair(&mut self) -> Option<Pair> {
        let shared = &self.shared;
        let (submission, submissions) = shared.registers.admin_submission();
        let (completion, completions) = shared.registers.admin_completion();
        if submissions < SMALLEST || completions < SMALLEST {
            return None;
        }
        let pair = Pair {
            submission: Submission::new(shared.memory, 0, submission, submissions, None).ok()?,
            completion: CompletionQueue::new(
                shared.memory,
                0,
                completion,
                completions,
                Some(0),
                None,
            )
            .ok()?,
        };
        if let Err(error) = shared.interrupts.open(0) {
            shared.complain(format_args!("{error:#}"));
            return None;
        }
        shared.doorbells.submission[0].open(submissions, 0);
        shared.doorbells.completion[0].open(completions, 0);
        Some(pair)
    }

    /// A controller reset (section 7.3.2): when it returns, nothing touches guest memory.
    fn disable(&mut self, visible: bool) {
        self.queues.close(visible);
        let shared = &self.shared;
        shared.doorbells.close();
        shared.interrupts.reset();
        let _ = shared.take_misuse();
        self.namespace_changed = false;
        self.pair = None;
        self.halted = false;
        self.events = Events::default();
        self.features = Features::new(shared);
        shared.registers.clear_status();
    }

    /// Section 7.6.2: finishes and flushes everything.
    fn shut_down(&mut self) {
        self.queues.close(true);
        // One that was not enabled can be.
        self.halted |= self.pair.take().is_some();
        self.flush();
        self.shared.registers.set_shutdown_status(SHUT_DOWN);
    }

    fn flush(&mut self) {
        if !self.shared.cached() {
            return;
        }
        let mut batch = Batch::with_capacity(1, 0);
        batch.control(0, BlockOp::Flush, 0, 0);
        let mut done = [BlockDone::default()];
        loop {
            let taken = self.backend.submit(&mut batch);
            if self.backend.reap(&mut done) == 1 {
                break;
            }
            // It takes nothing, or has completed nothing in submit and tells of nothing later: it has failed.
            if (taken == 0 && !batch.is_empty()) || self.backend.fd().is_none() {
                done[0].result = -libc::EIO;
                break;
            }
            wait_backend(&self.backend);
        }
        if done[0].result != 0 {
            self.shared.host.log(
                log::Level::Error,
                format_args!(
                    "the guest shuts the disk down, but it can't be flushed: {}",
                    std::io::Error::from_raw_os_error(-done[0].result)
                ),
            );
        }
    }

    /// Whether there is a command to fetch and room for what it completes with.
    fn has_work(&mut self) -> bool {
        let shared = self.shared.clone();
        let Some(pair) = &mut self.pair else {
            return false;
        };
        if pair.completion.room() == 0 {
            pair.completion.want_doorbell(&shared.doorbells);
            // Misuse is reported when the commands are looked at.
            let _ = pair.completion.refresh(&shared.doorbells);
            return pair.completion.room() > 0;
        }
        pair.submission
            .refresh(&shared.doorbells)
            .unwrap_or_default()
    }

    /// Carries out the commands that are there; whether there were any.
    fn serve(&mut self) -> bool {
        let shared = self.shared.clone();
        let misuse = shared.take_misuse();
        if misuse & 1 != 0 {
            self.events.add(Event::InvalidRegister);
        }
        if misuse & 2 != 0 {
            self.events.add(Event::InvalidValue);
        }
        if shared.take_resized() && self.pair.is_some() {
            self.namespace_changed = true;
            if self.features.reports_namespaces() {
                self.events.add(Event::NamespaceChanged);
            }
        }
        let mut any = false;
        while let Some(pair) = &mut self.pair {
            for result in [
                pair.completion.refresh(&shared.doorbells),
                pair.submission.refresh(&shared.doorbells).map(|_| ()),
            ] {
                if let Err(misuse) = result {
                    shared.misused(misuse);
                }
            }
            self.deliver_events();
            let Some(pair) = &mut self.pair else { break };
            if pair.completion.room() == 0 || shared.admin.wanted() {
                break;
            }
            let Some(command) = pair.submission.fetch() else {
                break;
            };
            any = true;
            if command.opcode() == ASYNC_EVENT_REQUEST && !command.fused() {
                if let Err(status) = self.events.request(command.id()) {
                    self.post(&command, Err(status));
                }
                self.check_temperature();
            } else {
                let answer = self.execute(&command);
                self.post(&command, answer);
            }
        }
        self.publish();
        any
    }

    fn deliver_events(&mut self) {
        while let Some(pair) = &mut self.pair
            && pair.completion.room() > 0
            && let Some((command, result)) = self.events.deliver()
        {
            self.post_entry(command, result, Status::SUCCESS);
        }
    }

    fn check_temperature(&mut self) {
        if self.features.temperature_warning() && self.features.reports_temperature() {
            self.events.add(Event::Temperature);
        }
    }

    fn post(&mut self, command: &Command, answer: Answer) {
        let (result, status) = match answer {
            Ok(result) => (result, Status::SUCCESS),
            Err(status) => (0, self.shared.failed(0, command, status)),
        };
        self.post_entry(command.id(), result, status);
    }

    fn post_entry(&mut self, command: u16, result: u32, status: Status) {
        if let Some(pair) = &mut self.pair {
            pair.completion.post(&Completion {
                result,
                queue: 0,
                head: pair.submission.head(),
                command,
                status,
            });
        }
    }

    fn publish(&mut self) {
        let shared = &self.shared;
        if let Some(pair) = &mut self.pair
            && pair.completion.publish(&shared.doorbells)
        {
            let bell = &shared.doorbells.completion[0];
            shared.interrupts.raise(0, 0, || bell.unread());
        }
    }

    fn execute(&mut self, command: &Command) -> Answer {
        // Section 4.2: admin commands are not fused, and over PCIe they use PRPs.
        if command.fused() || !matches!(command.data(), Ok(DataPointer::Prp(..))) {
            return Err(Status::INVALID_FIELD);
        }
        match command.opcode() {
            DELETE_SUBMISSION => self.queues.delete_submission(command),
            CREATE_SUBMISSION => self.queues.create_submission(command, &self.features),
            DELETE_COMPLETION => self.queues.delete_completion(command),
            CREATE_COMPLETION => self.queues.create_completion(command, &self.features),
            IDENTIFY => {
                let page = identify::page(&self.shared, command)?;
                self.give(command, &page, page.len() as u64)
            }
            GET_LOG_PAGE => self.log_page(command),
            ABORT => self.abort(command),
            SET_FEATURES => {
                let in_use = self.queues.any();
                let answer = self.features.set(&self.shared, command, in_use)?;
                self.check_temperature();
                Ok(answer)
            }
            GET_FEATURES => self.features.get(command, &self.shared),
            DOORBELL_BUFFER => self.doorbell_buffer(command),
            _ => Err(Status::INVALID_OPCODE),
        }
    }

    /// Gives the guest `len` bytes: `bytes`, and zeroes behind them.
    fn give(&self, command: &Command, bytes: &[u8], len: u64) -> Answer {
        let mut segments: Vec<GuestSlice> = Vec::new();
        let direction = Direction::ToGuest;
        data::map(
            self.shared.memory,
            command.data()?,
            len,
            direction,
            &mut segments,
        )?;
        let mut rest = bytes;
        for segment in segments {
            let written = segment.write(0, rest);
            segment.part(written, segment.len()).fill(0);
            rest = &rest[written..];
        }
        Ok(0)
    }

    fn log_page(&mut self, command: &Command) -> Answer {
        let changed = self.namespace_changed;
        let page = log_pages::page(&self.shared, &self.features, changed, command)?;
        let dwords =
            u64::from(command.dword(10) >> 16) | u64::from(command.dword(11) & 0xffff) << 16;
        let len = 4 * (dwords + 1);
        let offset = usize::try_from(command.qword(12)).unwrap_or(usize::MAX);
        let from = page.get(offset..).ok_or(Status::INVALID_FIELD)?;
        if len > MAX_TRANSFER || !offset.is_multiple_of(4) {
            return Err(Status::INVALID_FIELD);
        }
        self.give(command, from, len)?;
        let retain = command.dword(10) & 1 << 15 != 0;
        if !retain {
            let page = command.dword(10) as u8;
            self.events.acknowledge(page);
            self.namespace_changed &= page != log_pages::CHANGED_NAMESPACES;
        }
        Ok(0)
    }

    /// Section 5.1. A command that the backend has is not called back; an event request is.
    fn abort(&mut self, command: &Command) -> Answer {
        const NOT_ABORTED: u32 = 1;
        let (queue, id) = (command.dword(10) as u16, (command.dword(10) >> 16) as u16);
        if queue != 0 || !self.events.abort(id) {
            return Ok(NOT_ABORTED);
        }
        // One place in the queue is the abort command's own.
        if self.pair.as_ref().is_some_and(|p| p.completion.room() < 2) {
            self.events.request(id)?;
            return Ok(NOT_ABORTED);
        }
        self.post_entry(id, 0, Status::ABORT_REQUESTED);
        Ok(0)
    }

    /// Section 5.7. The admin queue keeps using registers, as drivers do.
    fn doorbell_buffer(&mut self, command: &Command) -> Answer {
        let (doorbells, events) = (command.prp1(), command.prp2());
        if !doorbells.is_multiple_of(PAGE) || !events.is_multiple_of(PAGE) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        if doorbells == 0 || events == 0 {
            return Err(Status::INVALID_FIELD);
        }
        let shadow = Shadow::new(self.shared.memory, doorbells, events)
            .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        self.queues.set_shadow(shadow);
        Ok(0)
    }
}
