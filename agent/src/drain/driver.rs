//! The one task that owns all drains of the node.
//!
//! ```text
//!  holds: CRI, HTTP, CLI        kernel: edges
//!        │ Command                   │ KernelEvent
//!        ▼                           ▼
//!  ┌───────────────── Drains ──────────────────┐   look    ┌────────┐
//!  │ Machine (pod A) · Machine (pod B) · …     │ ────────► │ Kernel │ (a task each)
//!  └───────────────────────────────────────────┘ ◄──────── └────────┘
//!        │ HoldState      │ DrainsView     │ DrainNotice
//!        ▼                ▼                ▼
//!     the holds       CLI, metrics     log line, Event
//! ```
//!
//! It sleeps until something arrives or a machine wants to be woken; with no drain under way it does
//! nothing at all.

mod edges;
mod handle;
mod kernel;
mod lookups;
mod memory;
#[cfg(test)]
mod tests;
mod views;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use self::{
    handle::{Command, HoldState, Joined, Place},
    kernel::look,
    lookups::Lookups,
    memory::Memory,
};
pub use self::{
    handle::{DrainHandle, DrainNotice, DrainsView, Hold, HoldOrder},
    kernel::{Kernel, LookError},
};
use super::{
    journal::{self, Beginning, Journal},
    machine::{Action, Ends, Event, Machine, Subject},
    report::{ReleaseReason, Report},
};
use crate::{
    clock::BootTime,
    ids::{CgroupId, ContainerId, NetnsInode, PodUid, SandboxId, WatchId},
    kernel::KernelEvent,
    pods::{Pod, Scope},
};

/// Drains that are over are kept for the CLI, and to answer late holds.
const MAX_FINISHED: usize = 256;
/// How far the news of a deletion may be behind the first hold that it led to.
const NEWS_WITHIN: Duration = Duration::from_secs(1);
/// Views that differ only in counts of flows are published no more often than this.
const VIEW_PACE: Duration = Duration::from_millis(100);
/// For how long after a release the same answer is given: StopContainer follows its preStop wait, and the
/// stops of a pod's containers each other, within moments. Later holds are checked against the kernel again,
/// with the first deadline: a wait may have been asked for by hand, or for the restart of a container.
const SAME_ANSWER: Duration = if cfg!(test) {
    Duration::from_millis(300)
} else {
    Duration::from_secs(5)
};

/// Tells a drain from another one of the same pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct DrainId(u64);

/// One drain under way.
struct Active {
    pod: Arc<Pod>,
    machine: Machine,
    /// The release of the drain that this one goes on with.
    first_released: Option<BootTime>,
    holds: u32,
    /// The watch of its edges, and how many of that have been received; `None`: it is not watched.
    watch: Option<WatchId>,
    received: u64,
    /// As many edges must have been received before lookups are worth something.
    owed: Option<u64>,
    /// It has been told that flows still arrive.
    told_blocked: bool,
    /// Cancelled when it is.
    over: CancellationToken,
    state: watch::Sender<HoldState>,
}

impl Active {
    /// What is to be remembered of it while it is under way.
    fn beginning(&self) -> Beginning {
        Beginning {
            started: self.machine.started(),
            deadline: self.machine.deadline(),
            released: self.first_released,
        }
    }
}

/// A drain that is over, with what a late hold needs of it.
struct Finished {
    id: DrainId,
    deadline: BootTime,
    released: BootTime,
    /// The sandbox that the pod had.
    sandbox: SandboxId,
    /// The containers that it had.
    containers: Vec<ContainerId>,
    report: Arc<Report>,
}

impl Finished {
    /// Whether its report is also the answer to a hold that comes at `now`.
    fn answers(&self, now: BootTime) -> bool {
        let age = now.since(self.released);
        // Who released it by hand meant the whole termination.
        let by_hand = self.report.reason == Some(ReleaseReason::Manual);
        age <= SAME_ANSWER || (by_hand && age <= journal::KEEP)
    }

    /// Whether this hold is for another end of the pod than this drain was: for a preStop wait runs for the restart of
    /// a container, too. Either the pod was deleted later, or its sandbox or a container has been started since.
    fn is_past(&self, order: &HoldOrder) -> bool {
        let mut running = order.pod.containers.iter().filter(|c| c.running);
        order.is_of_later_end(self.released)
            || order.pod.sandbox != self.sandbox
            || running.any(|c| !self.containers.contains(&c.id))
    }
}

/// What an action of a machine led to.
struct Answer {
    drain: DrainId,
    outcome: Outcome,
}

enum Outcome {
    Event(Event),
    Lookups(Lookups),
    /// The edges that lookups waited for, so many in all, have had their time.
    Overdue(u64),
}

/// All drains of the node.
pub struct Drains<K> {
    kernel: Arc<K>,
    events: mpsc::Receiver<KernelEvent>,
    /// Why no edges can come any more.
    blind: Option<String>,
    commands: mpsc::UnboundedReceiver<Command>,
    /// Weak, so that the driver ends with the last handle and hold.
    own_commands: mpsc::WeakUnboundedSender<Command>,
    answers: mpsc::UnboundedReceiver<Answer>,
    answers_in: mpsc::UnboundedSender<Answer>,
    notices: mpsc::UnboundedSender<DrainNotice>,
    view: watch::Sender<Arc<DrainsView>>,
    memory: Memory,
    active: BTreeMap<DrainId, Active>,
    by_uid: HashMap<PodUid, DrainId>,
    by_netns: HashMap<NetnsInode, DrainId>,
    by_cgroup: HashMap<CgroupId, DrainId>,
    finished: VecDeque<Finished>,
    last_id: u64,
    /// Lookups to be made when all edges that are here have been taken in.
    to_look_up: Vec<(DrainId, Vec<Ends>)>,
    changed: Changed,
    published: Instant,
}

/// What of the view has changed since it was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Changed {
    Nothing,
    Flows,
    Drains,
}

impl<K: Kernel> Drains<K> {
    /// Starts the driver on the current tokio runtime. Without a journal, beginnings are remembered only
    /// as long as the agent runs. Notices nobody listens for are dropped.
    pub fn spawn(
        kernel: Arc<K>,
        events: mpsc::Receiver<KernelEvent>,
        journal: Option<Journal>,
        notices: mpsc::UnboundedSender<DrainNotice>,
    ) -> DrainHandle {
        let (commands_in, commands) = mpsc::unbounded_channel();
        let (answers_in, answers) = mpsc::unbounded_channel();
        let (view, view_out) = watch::channel(Arc::default());
        let driver = Self {
            kernel,
            events,
            blind: None,
            commands,
            own_commands: commands_in.downgrade(),
            answers,
            answers_in,
            notices,
            view,
            memory: Memory::new(journal),
            active: BTreeMap::new(),
            by_uid: HashMap::new(),
            by_netns: HashMap::new(),
            by_cgroup: HashMap::new(),
            finished: VecDeque::new(),
            last_id: 0,
            to_look_up: vec![],
            changed: Changed::Nothing,
            published: Instant::now(),
        };
        tokio::spawn(driver.run());
        DrainHandle {
            commands: commands_in,
            view: view_out,
        }
    }

    async fn run(mut self) {
        loop {
            let wake = self.next_wake();
            tokio::select! {
                event = self.events.recv(), if self.blind.is_none() => self.kernel_event(event),
                command = self.commands.recv() => match command {
                    Some(Command::Hold(order, answer)) => {
                        let _ = answer.send(self.hold(*order));
                    }
                    Some(Command::GiveUp(drain)) => self.give_up(drain),
                    Some(Command::Limit(uid, limit)) => {
                        if let Some(&drain) = self.by_uid.get(&uid) {
                            self.limit(drain, limit);
                        }
                    }
                    Some(Command::Release(uid, answer)) => {
                        let drain = self.by_uid.get(&uid).copied();
                        if let Some(drain) = drain {
                            self.step(drain, Event::ReleaseNow);
                        }
                        let _ = answer.send(drain.is_some());
                    }
                    Some(Command::Shutdown) | None => break,
                },
                Some(Answer { drain, outcome }) = self.answers.recv() => {
                    // A look is worth what was known when it came back: edges first.
                    self.take_in_edges();
                    match outcome {
                        Outcome::Event(event) => self.step(drain, event),
                        Outcome::Lookups(lookups) => self.looked_up(drain, lookups),
                        Outcome::Overdue(owed) => self.overdue(drain, owed),
                    }
                }
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {
                    self.step_all(&Event::Tick);
                }
            }
            self.take_in_edges();
            self.look_up();
            self.publish_if_due();
        }
        self.step_all(&Event::Shutdown);
        self.publish();
    }

    fn next_wake(&self) -> Option<Instant> {
        let drains = self
            .active
            .values()
            .filter_map(|a| a.machine.next_wake())
            .min();
        let drains = drains.map(|wake| Instant::now() + wake.since(BootTime::now()));
        let view = (self.changed != Changed::Nothing).then(|| self.published + VIEW_PACE);
        drains.into_iter().chain(view).min()
    }

    fn hold(&mut self, order: HoldOrder) -> Joined {
        let uid = &order.pod.name.uid;
        let now = BootTime::now();
        if let Some(&drain) = self.by_uid.get(uid) {
            if let Some(limit) = joining_limit(&order) {
                self.limit(drain, now + limit);
            }
            if let Some(active) = self.active.get_mut(&drain) {
                active.holds += 1;
                self.changed = Changed::Drains;
                let state = active.state.subscribe();
                return Joined {
                    place: self.place(drain),
                    state,
                };
            }
        }
        if let Some(over) = self.last_of(uid)
            && over.answers(now)
            && !over.is_past(&order)
        {
            let state = HoldState {
                deadline: over.deadline,
                report: Some(over.report.clone()),
            };
            return Joined {
                place: self.place(over.id),
                state: watch::channel(state).1,
            };
        }
        self.begin(order, now)
    }

    /// The last drain of this pod that is over.
    fn last_of(&self, pod: &PodUid) -> Option<&Finished> {
        self.finished.iter().find(|f| f.report.pod.uid == *pod)
    }

    fn begin(&mut self, order: HoldOrder, now: BootTime) -> Joined {
        let HoldOrder {
            pod,
            policy,
            warnings,
            ..
        } = &order;
        let uid = &pod.name.uid;
        let is_past = self.last_of(uid).is_some_and(|over| over.is_past(&order));
        let first = self.memory.recall(uid, now).filter(|first| {
            let released = first.released;
            !is_past && released.is_none_or(|released| !order.is_of_later_end(released))
        });
        let (started, deadline) = match first {
            Some(first) => {
                let limit = joining_limit(&order).map_or(first.deadline, |limit| now + limit);
                (first.started.min(now), first.deadline.min(limit))
            }
            None => (now, now + policy.deadline(order.limits())),
        };
        self.last_id += 1;
        let id = DrainId(self.last_id);
        let subject = Subject {
            pod: pod.name.clone(),
            started_at: wall_clock(started),
            warnings: warnings.clone(),
        };
        let machine = Machine::new(subject, policy.clone(), started, deadline, now);
        let (state, joined) = watch::channel(HoldState {
            deadline,
            report: None,
        });
        // Watch, then look: what happens in between is seen twice rather than never.
        let watched = self.watch(&pod.scope);
        self.index(id, pod);
        let began = Arc::new(Report {
            holds: 1,
            ..machine.report(now)
        });
        let _ = self.notices.send(DrainNotice::Began(began));
        let active = Active {
            pod: pod.clone(),
            machine,
            first_released: first.and_then(|first| first.released),
            holds: 1,
            watch: watched.as_ref().ok().copied(),
            received: 0,
            owed: None,
            told_blocked: false,
            over: CancellationToken::new(),
            state,
        };
        self.active.insert(id, active);
        self.changed = Changed::Drains;
        self.remember(id);
        self.step(id, watched.map_or_else(Event::Untracked, |_| Event::Tick));
        Joined {
            place: self.place(id),
            state: joined,
        }
    }

    fn place(&self, drain: DrainId) -> Place {
        Place {
            drain,
            commands: self.own_commands.upgrade(),
        }
    }

    fn watch(&self, scope: &Scope) -> Result<WatchId, String> {
        if let Scope::Untracked(why) = scope {
            return Err(why.clone());
        }
        if let Some(why) = &self.blind {
            return Err(why.clone());
        }
        self.kernel
            .watch(scope)
            .map_err(|e| format!("its connections can't be watched: {e}"))
    }

    fn remember(&mut self, id: DrainId) {
        if let Some(active) = self.active.get(&id) {
            let beginning = active.beginning();
            self.memory.remember(&active.pod.name.uid, beginning);
        }
    }

    /// Brings a drain's end forward.
    fn limit(&mut self, id: DrainId, limit: BootTime) {
        self.step(id, Event::Limit(limit));
        self.remember(id);
    }

    fn give_up(&mut self, id: DrainId) {
        if let Some(active) = self.active.get_mut(&id) {
            active.holds = active.holds.saturating_sub(1);
            self.changed = Changed::Drains;
        }
    }

    fn step_all(&mut self, event: &Event) {
        for id in self.active.keys().copied().collect::<Vec<_>>() {
            self.step(id, event.clone());
        }
    }

    fn step(&mut self, id: DrainId, event: Event) {
        let now = BootTime::now();
        let Some(active) = self.active.get_mut(&id) else {
            return;
        };
        let before = active.machine.revision();
        let action = active.machine.step(event, now);
        if active.machine.revision() != before {
            self.changed = self.changed.max(Changed::Flows);
        }
        if active.machine.still_arriving() && !active.told_blocked {
            active.told_blocked = true;
            let report = Arc::new(Report {
                late_peers: active.machine.still_connecting(),
                ..active.machine.report(now)
            });
            let _ = self.notices.send(DrainNotice::Blocked(report));
        }
        let deadline = active.machine.deadline();
        active
            .state
            .send_if_modified(|s| std::mem::replace(&mut s.deadline, deadline) != deadline);
        match action {
            Some(Action::Look) => {
                let look = look(self.kernel.clone(), &active.pod, active.machine.policy());
                self.answer_with(id, async move {
                    look.await.map_or_else(Event::LookFailed, Event::Looked)
                });
            }
            Some(Action::LookUp(flows)) => self.to_look_up.push((id, flows)),
            // Nobody waits any more, so nobody says that the pod is still ending.
            Some(Action::CloseIdle(_)) if active.holds == 0 => {
                self.answer_with(id, std::future::ready(Event::IdleClosed(vec![])));
            }
            Some(Action::CloseIdle(idle)) => {
                let (kernel, pod) = (self.kernel.clone(), active.pod.clone());
                let over = active.over.clone();
                self.answer_with(id, async move {
                    let closed = kernel.close_idle(&pod.scope, idle, over).await;
                    Event::IdleClosed(closed.unwrap_or_else(|e| {
                        warn!(pod = %pod.name, "can't close idle flows: {e}");
                        vec![]
                    }))
                });
            }
            Some(Action::Release(_)) => self.finish(id, now),
            None => {}
        }
    }

    /// Has an action carried out beside the driver, and its outcome told to the drain's machine.
    fn answer_with(&self, drain: DrainId, event: impl Future<Output = Event> + Send + 'static) {
        let answers = self.answers_in.clone();
        tokio::spawn(async move {
            let outcome = Outcome::Event(event.await);
            let _ = answers.send(Answer { drain, outcome });
        });
    }

    fn finish(&mut self, id: DrainId, now: BootTime) {
        let Some(active) = self.active.remove(&id) else {
            return;
        };
        // Who goes on asking does not make it the same termination for ever: the first release counts.
        let beginning = Beginning {
            released: active.first_released.or(Some(now)),
            ..active.beginning()
        };
        self.memory.remember(&active.pod.name.uid, beginning);
        let Active {
            pod,
            machine,
            holds,
            watch,
            over,
            state,
            ..
        } = active;
        over.cancel();
        if watch.is_some() {
            self.kernel.unwatch(&pod.scope);
        }
        self.by_uid.retain(|_, other| *other != id);
        self.by_netns.retain(|_, other| *other != id);
        self.by_cgroup.retain(|_, other| *other != id);
        let report = Arc::new(Report {
            holds,
            ..machine.report(now)
        });
        state.send_modify(|s| s.report = Some(report.clone()));
        self.finished.push_front(Finished {
            id,
            deadline: machine.deadline(),
            released: now,
            sandbox: pod.sandbox.clone(),
            containers: pod.containers.iter().map(|c| c.id.clone()).collect(),
            report: report.clone(),
        });
        self.finished.truncate(MAX_FINISHED);
        self.changed = Changed::Drains;
        let _ = self.notices.send(DrainNotice::Finished(report));
    }
}

/// For how long at most the pod's drain may go on now that this hold joins it, if the hold has a say in
/// that. An unknown grace period has none: the drain may know it.
fn joining_limit(order: &HoldOrder) -> Option<Duration> {
    match order.grace {
        Some(_) => Some(order.policy.deadline(order.limits())),
        None => order.limits().longest(Duration::ZERO, false),
    }
}

fn wall_clock(t: BootTime) -> String {
    humantime::format_rfc3339_millis(t.to_system_time()).to_string()
}
