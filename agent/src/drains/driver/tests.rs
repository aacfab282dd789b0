//! The driver, with a scripted kernel.

mod deadlines;
mod flows;
mod holds;
mod journalled;
mod notifying;

use std::{
    collections::{BTreeMap, HashSet},
    net::SocketAddr,
    sync::{Mutex, MutexGuard},
    task::Poll,
};

use ebb_core::{
    arrivals::Arrivals,
    drain_report::{DeadlineCause, DumpReason, Phase, ReleaseReason, ReleasedBy, SettleRule},
    flow::{Flow, Origin, Sample, TcpState},
    ids::{CgroupId, ContainerId, NetnsInode, PodName, PodUid, SandboxId, SocketCookie, WatchId},
    machine::Deadline,
    notification::{Notification, NotificationOutcome, SignalOutcome, SignalReport, StopSignal},
    policy::{IdleFlows, Policy, Until},
    scope::Scope,
};

use tokio::time::timeout;

use super::{
    finished::{MAX_FINISHED, SAME_ANSWER},
    *,
};

use crate::{
    drains::{journal, notify::NotificationFuture},
    kernel::{FlowLookUp, LookUpFailure, SocketChange, SocketDump, SocketEvent},
    pods::{Container, Pod, kube::Deletion},
};

const NETNS: NetnsInode = NetnsInode(4_026_532_000);

const WATCH: WatchId = WatchId(1);

const QUIET: Duration = Duration::from_millis(40);

/// What the scripted kernel does, and the requests that it got.
#[derive(Default)]
struct Script {
    samples: Vec<Sample>,
    forwards: Option<String>,
    fails: bool,
    panics: bool,
    hangs: bool,
    /// Events that the kernel has sent.
    sent: u64,
    /// State changes that it has left out.
    missed_changes: u64,
    /// Lookups fail.
    mute: bool,
    /// It closes idle flows until it is cancelled.
    closes_slowly: bool,
    /// Nothing listens in the pod.
    no_listener: bool,
    arrivals: Option<Arrivals>,
    asked: Vec<&'static str>,
}

#[derive(Default)]
struct FakeKernel(Mutex<Script>);

impl FakeKernel {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Kernel for FakeKernel {
    async fn dump(&self, _: &Scope) -> Result<SocketDump, KernelRequestError> {
        let hangs = {
            let mut script = self.script();
            script.asked.push("dump");
            assert!(!script.panics, "as the script says");
            if script.fails {
                return Err(KernelRequestError("no such namespace".into()));
            }
            script.hangs
        };
        if hangs {
            std::future::pending::<()>().await;
        }
        let script = self.script();
        Ok(SocketDump {
            taken_at: BootTime::now(),
            missed_changes: script.missed_changes,
            samples: {
                let listener = (!script.no_listener).then(listener);
                script.samples.iter().cloned().chain(listener).collect()
            },
            forwards: script.forwards.clone(),
        })
    }

    async fn arrivals(&self, _: &Scope) -> Option<Arrivals> {
        self.script().arrivals
    }

    async fn close_idle(
        &self,
        _: &Scope,
        idle: Vec<Flow>,
        over: CancellationToken,
    ) -> Result<Vec<SocketCookie>, KernelRequestError> {
        self.script().asked.push("close");
        let slow = self.script().closes_slowly;
        if slow {
            over.cancelled().await;
            self.script().asked.push("stopped closing");
            return Ok(vec![]);
        }
        let mut script = self.script();
        let closed: HashSet<_> = idle.iter().map(|f| f.cookie).collect();
        script.samples.retain(|s| !closed.contains(&s.cookie));
        Ok(closed.into_iter().collect())
    }

    async fn look_up(
        &self,
        _: &Scope,
        flows: Vec<(SocketAddr, SocketAddr)>,
    ) -> Result<FlowLookUp, LookUpFailure> {
        let mut script = self.script();
        script.asked.push("lookup");
        if script.mute {
            return Err(std::io::Error::other("no such namespace").into());
        }
        let asked_for = |s: &&Sample| flows.contains(&(s.local, s.remote));
        Ok(FlowLookUp {
            taken_at: BootTime::now(),
            sent: script.sent,
            missed_changes: script.missed_changes,
            samples: script.samples.iter().filter(asked_for).cloned().collect(),
        })
    }

    fn watch(&self, _: &Scope) -> Result<WatchId, KernelRequestError> {
        self.script().asked.push("watch");
        Ok(WATCH)
    }

    fn unwatch(&self, _: &Scope) {
        self.script().asked.push("unwatch");
    }
}

struct Harness {
    kernel: Arc<FakeKernel>,
    events: Option<mpsc::Sender<KernelEvent>>,
    notices: mpsc::UnboundedReceiver<DrainNotice>,
    drains: DrainHandle,
}

fn harness_with(kernel: FakeKernel, journal: Option<Journal>) -> Harness {
    let kernel = Arc::new(kernel);
    let (events_in, events) = mpsc::channel(64);
    let (notices_in, notices) = mpsc::unbounded_channel();
    let drains = Drains::spawn(kernel.clone(), events, journal, notices_in);
    Harness {
        kernel,
        events: Some(events_in),
        notices,
        drains,
    }
}

fn harness(samples: Vec<Sample>) -> Harness {
    harness_with(
        FakeKernel(Mutex::new(Script {
            samples,
            ..Script::default()
        })),
        None,
    )
}

impl Harness {
    /// The kernel counts an event and sends it.
    async fn event(&self, event: SocketEvent) {
        if event.watch == WATCH {
            self.kernel.script().sent += 1;
        }
        self.send(event).await;
    }

    async fn send(&self, event: SocketEvent) {
        let events = self.events.as_ref().expect("events are on");
        events
            .send(KernelEvent::Socket(event))
            .await
            .expect("the driver lives");
    }

    fn close_all(&self) {
        self.kernel.script().samples.clear();
    }

    fn asked(&self, what: &str) -> usize {
        self.kernel
            .script()
            .asked
            .iter()
            .filter(|a| **a == what)
            .count()
    }

    /// Waits until a view is as wanted.
    async fn until_view(&self, wanted: impl FnMut(&Arc<DrainsView>) -> bool) -> Arc<DrainsView> {
        let mut view = self.drains.view();
        let view = timeout(Duration::from_secs(5), view.wait_for(wanted)).await;
        view.expect("in time").expect("the driver lives").clone()
    }
}

fn pod_in(uid: &str, scope: Scope) -> Arc<Pod> {
    Arc::new(Pod {
        name: PodName {
            uid: PodUid::new(uid),
            namespace: "shop".into(),
            name: format!("web-{uid}"),
        },
        sandbox: SandboxId::new("sandbox"),
        scope,
        ips: vec!["10.0.0.1".parse().expect("an address")],
        workload: None,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        containers: vec![],
    })
}

fn pod(uid: &str) -> Arc<Pod> {
    pod_in(
        uid,
        Scope::Netns {
            inode: NETNS,
            pid: 1,
        },
    )
}

fn policy() -> Policy {
    Policy {
        quiet: QUIET,
        settle_max: QUIET * 4,
        ..Policy::default()
    }
}

fn order(pod: Arc<Pod>, policy: Policy) -> HoldOrder {
    HoldOrder {
        pod,
        policy,
        warnings: vec![],
        grace: Some(Duration::from_secs(60)),
        rpc_timeout: None,
        deletion: None,
        is_listed: true,
        is_stop: false,
        is_not_deleted: false,
        is_unanswered: false,
        traceparent: None,
    }
}

/// A StopContainer of a pod with one container.
fn stop(name: &str) -> HoldOrder {
    let container = Container {
        id: ContainerId::new("c1"),
        name: "app".into(),
        running: true,
        grace: None,
        wait_port: Ok(None),
        pre_stop_sleep: Duration::ZERO,
    };
    let pod = Pod {
        containers: vec![container],
        ..(*pod(name)).clone()
    };
    HoldOrder {
        is_stop: true,
        ..order(Arc::new(pod), policy())
    }
}

fn deletion(seen: BootTime, grace: Duration) -> Deletion {
    Deletion {
        grace: Some(grace),
        seen,
    }
}

/// A deadline by the grace period.
fn by(at: BootTime) -> Deadline {
    Deadline {
        at,
        cause: DeadlineCause::Grace,
    }
}

fn sample(cookie: u64) -> Sample {
    let local = SocketAddr::from(([10, 0, 0, 1], 80));
    let remote = SocketAddr::from(([10, 0, 0, 2], 40_000));
    Sample {
        inode: 1,
        bytes_received: 10,
        bytes_acked: 20,
        origin: Origin::Accepted,
        ..Sample::new(SocketCookie(cookie), local, remote, TcpState::Established)
    }
}

fn listener() -> Sample {
    let any = SocketAddr::from(([0, 0, 0, 0], 80));
    Sample::new(SocketCookie(0), any, any, TcpState::Listen)
}

fn event(cookie: u64, change: SocketChange) -> SocketEvent {
    SocketEvent {
        exempt: false,
        cgroup: CgroupId(77),
        netns: NETNS,
        watch: WATCH,
        cookie: SocketCookie(cookie),
        local: SocketAddr::from(([10, 0, 0, 1], 80)),
        remote: SocketAddr::from(([10, 0, 0, 2], 40_000)),
        change,
        at: BootTime::now(),
    }
}

fn opens(cookie: u64) -> SocketEvent {
    event(cookie, SocketChange::Opened)
}

fn closes(cookie: u64) -> SocketEvent {
    event(cookie, SocketChange::Closed)
}

async fn released(hold: &Hold) -> Arc<Report> {
    timeout(Duration::from_secs(10), hold.released())
        .await
        .expect("released in time")
}
