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

mod handle;
mod kernel;
mod memory;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tracing::warn;

use self::{
    handle::{Command, HoldState, Joined, Place},
    kernel::look,
    memory::Memory,
};
pub use self::{
    handle::{DrainHandle, DrainNotice, DrainsView, Hold, HoldOrder},
    kernel::{Kernel, LookError},
};
use super::{
    journal::{self, Beginning, Journal},
    machine::{Action, Event, Machine, Subject},
    policy::PATIENCE_MARGIN,
    report::Report,
};
use crate::{
    clock::BootTime,
    flow::TcpState,
    hold::wire::ReleaseReason,
    ids::{CgroupId, NetnsInode, PodUid},
    kernel::{Edge, KernelEvent},
    pods::{Pod, Scope},
};

/// Drains that are over are kept for the CLI, and to answer late holds.
const MAX_FINISHED: usize = 256;
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
    holds: u32,
    watched: bool,
    state: watch::Sender<HoldState>,
}

/// A drain that is over, with what a late hold needs of it.
struct Finished {
    id: DrainId,
    deadline: BootTime,
    released: BootTime,
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
}

/// What an action of a machine led to.
struct Answer {
    drain: DrainId,
    event: Event,
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
                    Some(Command::Release(uid, answer)) => {
                        let drain = self.by_uid.get(&uid).copied();
                        if let Some(drain) = drain {
                            self.step(drain, Event::ReleaseNow);
                        }
                        let _ = answer.send(drain.is_some());
                    }
                    Some(Command::Shutdown) | None => break,
                },
                Some(Answer { drain, event }) = self.answers.recv() => {
                    // A look is worth what was known when it came back: edges first.
                    for _ in 0..self.events.len() {
                        let event = self.events.try_recv().ok();
                        self.kernel_event(event);
                    }
                    self.step(drain, event);
                }
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {
                    self.step_all(&Event::Tick);
                }
            }
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
                self.step(drain, Event::Limit(now + limit));
                self.remember(drain);
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
        if let Some(over) = self.finished.iter().find(|f| f.report.pod.uid == *uid)
            && over.answers(now)
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

    fn begin(&mut self, order: HoldOrder, now: BootTime) -> Joined {
        let HoldOrder {
            pod,
            policy,
            warnings,
            ..
        } = &order;
        let uid = &pod.name.uid;
        let (started, deadline) = match self.memory.recall(uid, now) {
            Some(first) => {
                let limit = joining_limit(&order).map_or(first.deadline, |limit| now + limit);
                (first.started.min(now), first.deadline.min(limit))
            }
            None => (now, now + policy.deadline(order.grace, order.patience)),
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
            holds: 1,
            watched: watched.is_ok(),
            state,
        };
        self.active.insert(id, active);
        self.changed = Changed::Drains;
        self.remember(id);
        self.step(id, watched.map_or_else(Event::Untracked, |()| Event::Tick));
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

    fn watch(&self, scope: &Scope) -> Result<(), String> {
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

    fn index(&mut self, id: DrainId, pod: &Pod) {
        self.by_uid.insert(pod.name.uid.clone(), id);
        match &pod.scope {
            Scope::Netns { inode, .. } => {
                self.by_netns.insert(*inode, id);
            }
            Scope::HostNetwork(cgroups) => self.by_cgroup.extend(cgroups.iter().map(|c| (*c, id))),
            Scope::Untracked(_) => {}
        }
    }

    fn remember(&mut self, id: DrainId) {
        if let Some(Active { pod, machine, .. }) = self.active.get(&id) {
            let beginning = Beginning {
                started: machine.started(),
                deadline: machine.deadline(),
                released: None,
            };
            self.memory.remember(&pod.name.uid, beginning);
        }
    }

    fn give_up(&mut self, id: DrainId) {
        if let Some(active) = self.active.get_mut(&id) {
            active.holds = active.holds.saturating_sub(1);
            self.changed = Changed::Drains;
        }
    }

    fn kernel_event(&mut self, event: Option<KernelEvent>) {
        match event {
            Some(KernelEvent::Edge(edge)) => self.edge(&edge),
            Some(KernelEvent::Lost) => self.step_all(&Event::Lost),
            None => {
                let why = "the kernel's events have ended".to_owned();
                self.blind = Some(why.clone());
                self.step_all(&Event::Untracked(why));
            }
        }
    }

    fn edge(&mut self, edge: &Edge) {
        let drain = self
            .by_netns
            .get(&edge.netns)
            .or_else(|| self.by_cgroup.get(&edge.cgroup));
        let Some((&id, active)) = drain.and_then(|id| Some((id, self.active.get(id)?))) else {
            return;
        };
        if !active.machine.policy().holds_port(edge.local.port()) || is_in_pod(&active.pod, edge) {
            return;
        }
        let Edge {
            cookie,
            local,
            remote,
            at,
            ..
        } = *edge;
        match (edge.from, edge.to) {
            (TcpState::SynRecv, TcpState::Established) => {
                self.step(
                    id,
                    Event::FlowOpened {
                        cookie,
                        local,
                        remote,
                        at,
                    },
                );
            }
            (_, TcpState::FinWait2 | TcpState::TimeWait | TcpState::Close) => {
                self.step(id, Event::FlowClosed { cookie, at });
            }
            _ => {}
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
            // Nobody waits any more, so nobody says that the pod is still ending.
            Some(Action::CloseIdle(_)) if active.holds == 0 => {
                self.answer_with(id, std::future::ready(Event::IdleClosed(vec![])));
            }
            Some(Action::CloseIdle(idle)) => {
                let (kernel, pod) = (self.kernel.clone(), active.pod.clone());
                self.answer_with(id, async move {
                    let closed = kernel.close_idle(&pod.scope, idle).await;
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
            let event = event.await;
            let _ = answers.send(Answer { drain, event });
        });
    }

    fn finish(&mut self, id: DrainId, now: BootTime) {
        let Some(Active {
            pod,
            machine,
            holds,
            watched,
            state,
        }) = self.active.remove(&id)
        else {
            return;
        };
        if watched {
            self.kernel.unwatch(&pod.scope);
        }
        self.by_uid.retain(|_, other| *other != id);
        self.by_netns.retain(|_, other| *other != id);
        self.by_cgroup.retain(|_, other| *other != id);
        let beginning = Beginning {
            started: machine.started(),
            deadline: machine.deadline(),
            released: Some(now),
        };
        self.memory.remember(&pod.name.uid, beginning);
        let report = Arc::new(Report {
            holds,
            ..machine.report(now)
        });
        state.send_modify(|s| s.report = Some(report.clone()));
        self.finished.push_front(Finished {
            id,
            deadline: machine.deadline(),
            released: now,
            report: report.clone(),
        });
        self.finished.truncate(MAX_FINISHED);
        self.changed = Changed::Drains;
        let _ = self.notices.send(DrainNotice::Finished(report));
    }

    fn publish_if_due(&mut self) {
        match self.changed {
            Changed::Nothing => {}
            Changed::Flows if self.published.elapsed() < VIEW_PACE => {}
            Changed::Flows | Changed::Drains => self.publish(),
        }
    }

    fn publish(&mut self) {
        let now = BootTime::now();
        let active = self.active.values().map(|a| Report {
            holds: a.holds,
            ..a.machine.report(now)
        });
        let view = DrainsView {
            version: self.view.borrow().version + 1,
            at: now,
            active: active.collect(),
            finished: self.finished.iter().map(|f| f.report.clone()).collect(),
        };
        self.view.send_replace(Arc::new(view));
        self.changed = Changed::Nothing;
        self.published = Instant::now();
    }
}

/// For how long at most the pod's drain may go on now that this hold joins it, if the hold has a say in
/// that. An unknown grace period has none: the drain may know it.
fn joining_limit(order: &HoldOrder) -> Option<Duration> {
    match order.grace {
        Some(_) => Some(order.policy.deadline(order.grace, order.patience)),
        None => order.patience.map(|p| p.saturating_sub(PATIENCE_MARGIN)),
    }
}

/// Both ends are in the pod: its loopback, or its own address. On the host's network only a look can tell.
fn is_in_pod(pod: &Pod, edge: &Edge) -> bool {
    let remote = edge.remote.ip().to_canonical();
    matches!(pod.scope, Scope::Netns { .. }) && (remote.is_loopback() || pod.ips.contains(&remote))
}

fn wall_clock(t: BootTime) -> String {
    humantime::format_rfc3339_millis(t.to_system_time()).to_string()
}
