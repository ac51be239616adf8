//! The thread of an I/O completion queue: it fetches the commands of the submission queues that use it, gives the backend one
//! batch, posts what is complete, and interrupts once.

use std::sync::Arc;

use vmm_plugin_api::Pace;

use crate::command::Completion;
use crate::doorbells::Misuse;
use crate::engine::{Engine, Finished};
use crate::lane::{Gone, Lane, Next, wait_backend};
use crate::rings::{CompletionQueue, Submission};
use crate::shared::{Shared, WorkNote};

/// Most commands fetched from one submission queue before the next has its turn.
const BURST: u32 = 64;

/// What the thread works with.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    queue: CompletionQueue,
    submissions: Vec<Submission>,
    engine: Engine,
    pace: Pace,
    /// Commands fetched since the thread last slept.
    fetched: usize,
}

impl Worker {
    pub(crate) fn new(shared: Arc<Shared>, queue: CompletionQueue, engine: Engine) -> Self {
        Self {
            pace: Pace::new(shared.host.clone()),
            shared,
            queue,
            submissions: Vec::new(),
            engine,
            fetched: 0,
        }
    }

    /// Serves the queue until a note says otherwise.
    pub(crate) fn run(mut self) {
        let shared = self.shared.clone();
        let Some(lane) = shared.lane(self.queue.id) else {
            return;
        };
        let _gone = Gone(lane);
        loop {
            if lane.take_attention() && !self.obey(lane) {
                shared.put_engine(self.engine);
                return;
            }
            self.turn(lane);
        }
    }

    /// Does what the mailbox says; false: the thread ends. While paused it does not return.
    fn obey(&mut self, lane: &Lane<WorkNote>) -> bool {
        loop {
            match lane.next() {
                Next::Work => return true,
                Next::Park => {
                    self.finish(true, |worker| worker.engine.in_flight() > 0);
                    lane.park();
                }
                Next::Note(WorkNote::Exit { visible }) => {
                    self.finish(visible, |worker| worker.engine.in_flight() > 0);
                    lane.done();
                    return false;
                }
                Next::Note(WorkNote::Add(submission)) => {
                    self.submissions.push(submission);
                    lane.done();
                }
                Next::Note(WorkNote::Remove(id)) => {
                    let busy = |worker: &Self| {
                        let mut all = worker.submissions.iter();
                        all.any(|s| s.id == id && s.in_flight > 0)
                    };
                    self.finish(true, busy);
                    self.submissions.retain(|s| s.id != id);
                    lane.done();
                }
                Next::Note(WorkNote::Shadow(shadow)) => {
                    self.queue.set_shadow(shadow);
                    for submission in &mut self.submissions {
                        submission.set_shadow(shadow);
                    }
                    lane.done();
                }
            }
        }
    }

    /// Works until there is nothing to do, then sleeps.
    fn turn(&mut self, lane: &Lane<WorkNote>) {
        while !lane.wanted() {
            let fetched = self.fetch();
            self.fetched += fetched;
            self.engine.submit();
            self.engine.complete();
            let finished = !self.engine.finished.is_empty();
            self.post(true);
            if fetched > 0 || finished {
                continue;
            }
            lane.fall_asleep();
            if self.must_stay_awake() {
                lane.stay_awake();
                continue;
            }
            let busy = self.engine.in_flight() > 0;
            self.pace.sleeps(std::mem::take(&mut self.fetched));
            lane.sleep(busy.then_some(&self.engine.backend));
            self.pace.woken();
        }
    }

    /// Fetches and starts commands, as many as there is room for; how many there were.
    fn fetch(&mut self) -> usize {
        self.refresh_head();
        let mode = self.shared.mode();
        let mut fetched = 0;
        let Self {
            shared,
            queue,
            submissions,
            engine,
            ..
        } = self;
        let mut room = queue
            .room()
            .saturating_sub((engine.in_flight() + engine.finished.len()) as u32);
        for submission in submissions {
            if let Err(misuse) = submission.refresh(&shared.doorbells) {
                shared.misused(misuse);
            }
            for _ in 0..BURST {
                if room == 0 || !engine.has_room() {
                    break;
                }
                let Some(command) = submission.fetch() else {
                    break;
                };
                submission.in_flight += 1;
                room -= 1;
                fetched += 1;
                engine.start(submission.id, command, mode);
            }
        }
        fetched
    }

    fn refresh_head(&mut self) {
        let result = self.queue.refresh(&self.shared.doorbells);
        self.check(result);
    }

    fn check(&self, result: Result<(), Misuse>) {
        match result {
            Ok(()) => {
                let bell = &self.shared.doorbells.completion[usize::from(self.queue.id)];
                self.shared
                    .interrupts
                    .taken(self.queue.id, || bell.unread());
            }
            Err(misuse) => self.shared.misused(misuse),
        }
    }

    /// Asks the guest to ring, and looks whether there is something to do all the same.
    fn must_stay_awake(&mut self) -> bool {
        if self.queue.vector.is_some() && !self.shared.interrupts.msix() {
            let result = self.queue.follow_head(&self.shared.doorbells);
            self.check(result);
        }
        if !self.engine.has_room() {
            // A completion makes room.
            return false;
        }
        let busy = self.engine.in_flight() as u32;
        if self.queue.room() <= busy {
            self.queue.want_doorbell(&self.shared.doorbells);
            self.refresh_head();
            return self.queue.room() > busy;
        }
        let mut more = false;
        for submission in &mut self.submissions {
            submission.want_doorbell();
            match submission.refresh(&self.shared.doorbells) {
                Ok(commands) => more |= commands,
                Err(misuse) => self.shared.misused(misuse),
            }
        }
        more
    }

    /// Posts what is finished, and interrupts for it; with `visible` false the guest is told nothing.
    fn post(&mut self, visible: bool) {
        let Self {
            shared,
            queue,
            submissions,
            engine,
            ..
        } = self;
        for finished in engine.finished.drain(..) {
            let Finished {
                queue: id,
                command,
                mut status,
            } = finished;
            let submission = submissions.iter_mut().find(|s| s.id == id);
            let head = submission.map_or(0, |s| {
                s.in_flight -= 1;
                s.head()
            });
            if !status.is_success() {
                status = shared.failed(id, &command, status);
            }
            // Commands are fetched as far as there is room for what they complete with.
            if visible && queue.room() > 0 {
                queue.post(&Completion {
                    result: 0,
                    queue: id,
                    head,
                    command: command.id(),
                    status,
                });
            }
        }
        if !queue.publish(&shared.doorbells) {
            return;
        }
        if let Some(vector) = queue.vector {
            let bell = &shared.doorbells.completion[usize::from(queue.id)];
            shared.interrupts.raise(queue.id, vector, || bell.unread());
        }
    }

    /// Completes what is in flight for as long as `busy` says. `visible`: the guest sees it done.
    fn finish(&mut self, visible: bool, busy: impl Fn(&Self) -> bool) {
        loop {
            self.engine.submit();
            self.engine.complete();
            self.post(visible);
            if !busy(self) {
                return;
            }
            wait_backend(&self.engine.backend);
        }
    }
}
