//! The wait port inside pods: `preStop.httpGet: {path: /ebb/wait, port: …}`.
//!
//! ```text
//!  lists of pods ──► plan (pure): which ports of which pods? ──► listeners, one task each
//!                                                                          │ GET, from the kubelet
//!                                                                          ▼
//!                                                       wait: for the pod of the namespace
//! ```
//!
//! The application has precedence. If another process has the port, ebb does not try again while the pod's sandbox lives.
//! When a container restarts, ebb frees the port for a while, because the container may have failed for lack of it. If
//! listening fails for another reason (descriptors have run out, for example), ebb tries again every 5 s.

mod listener;
mod plan;

use std::{
    collections::{HashMap, HashSet},
    io,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex},
    time::Duration,
};

use ebb_core::ids::PodUid;
use futures_util::FutureExt as _;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::plan::{Containers, PortPlan, WaitPort};
use super::wait::Waits;
use crate::{
    kernel::Tracker,
    linux::sync::lock,
    pods::{
        Pod, change_notifier::ChangeNotifier, policies::PodPolicies, store::Pods, table::PodTable,
    },
    telemetry::{pod_event::PodEvent, reporter::Reporter},
};

/// How long a port is freed when a container of its pod has been restarted. The kubelet's second restart comes some 30 s
/// after the first start.
const FREED_FOR: Duration = Duration::from_secs(60);

/// How long to wait after listening has failed, unless another process has the port.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// The warnings about the wait ports of pods.
pub(crate) struct WaitPortWarnings {
    of_pods: Mutex<HashMap<PodUid, Vec<String>>>,
    reporter: Reporter,
}

impl WaitPortWarnings {
    /// `reporter` gets each new warning once.
    pub(crate) fn new(reporter: Reporter) -> Self {
        Self {
            of_pods: Mutex::default(),
            reporter,
        }
    }

    pub(crate) fn of(&self, pod: &PodUid) -> Vec<String> {
        self.lock().get(pod).cloned().unwrap_or_default()
    }

    /// Replaces all warnings, and reports the new ones.
    fn set(&self, new: Vec<(Arc<Pod>, Vec<String>)>) {
        let mut all = self.lock();
        for (pod, warnings) in &new {
            let known = all.get(&pod.name.uid);
            for warning in warnings {
                if !known.is_some_and(|k| k.contains(warning)) {
                    self.reporter
                        .report(PodEvent::wait_port(&pod.name, warning));
                }
            }
        }
        *all = new
            .into_iter()
            .map(|(pod, warnings)| (pod.name.uid.clone(), warnings))
            .collect();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PodUid, Vec<String>>> {
        // A panic cannot leave a change half done.
        lock(&self.of_pods)
    }
}

/// The state of a port on which ebb listens or would.
enum PortState {
    Listening {
        /// Distinguishes it from earlier and later listeners on the same port.
        number: u64,
        containers: Containers,
        _until: DropGuard,
    },
    /// Another process has the port.
    Taken,
    /// The port is left to the pod until then.
    Freed(Instant),
    /// Listening failed `times` times, and is tried again at `until`.
    Failed { times: u32, until: Instant },
}

struct PortListeners {
    server: PodPorts,
    states: HashMap<WaitPort, PortState>,
    /// By port and number.
    listeners: JoinSet<(WaitPort, u64)>,
    /// How many listeners have been opened.
    opened: u64,
    stop: CancellationToken,
}

/// What the listeners need.
pub(crate) struct PodPorts {
    pub(crate) tracker: Tracker,
    pub(crate) pods: Arc<Pods>,
    pub(crate) policies: Arc<PodPolicies>,
    pub(crate) waits: Arc<Waits>,
    pub(crate) warnings: Arc<WaitPortWarnings>,
}

/// Listens inside the pods that want a wait port, until `stop`. Requests under way end when their holds are released.
pub(crate) async fn serve(server: PodPorts, changes: Arc<ChangeNotifier>, stop: CancellationToken) {
    let mut tables = server.pods.subscribe();
    let mut ports = PortListeners {
        server,
        states: HashMap::new(),
        listeners: JoinSet::new(),
        opened: 0,
        stop: stop.clone(),
    };
    loop {
        let table = tables.borrow_and_update().clone();
        ports.follow(&table).await;
        let due = ports.next_due();
        tokio::select! {
            // This does not fail, because `ports` holds the store.
            Ok(()) = tables.changed() => {}
            Some(ended) = ports.listeners.join_next() => {
                // The sandbox is gone or replaced: the store must list the pods again.
                if let Ok((port, number)) = ended && ports.ended(&port, number) {
                    changes.notify();
                }
            }
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            () = stop.cancelled() => break,
        }
    }
    while ports.listeners.join_next().await.is_some() {}
}

impl PortListeners {
    /// Forgets a listener that has ended, and returns whether it was still wanted.
    fn ended(&mut self, port: &WaitPort, ended: u64) -> bool {
        let is = |state: &PortState| matches!(state, PortState::Listening { number, .. } if *number == ended);
        let wanted = self.states.get(port).is_some_and(is);
        if wanted {
            self.states.remove(port);
        }
        wanted
    }

    /// Opens and closes listeners by the list of pods.
    async fn follow(&mut self, table: &PodTable) {
        let plans: Vec<(Arc<Pod>, PortPlan)> = table
            .iter()
            .map(|pod| {
                (
                    Arc::clone(pod),
                    PortPlan::of(pod, &self.server.policies.policy(pod)),
                )
            })
            .collect();
        let wanted: HashSet<&WaitPort> = plans.iter().flat_map(|(_, plan)| &plan.ports).collect();
        // Dropping a state ends its listener.
        self.states.retain(|port, _| wanted.contains(port));
        let mut warnings = Vec::new();
        for (pod, plan) in &plans {
            let mut pod_warnings = plan.warnings.clone();
            for port in &plan.ports {
                self.update(pod, port).await;
                if let Some(PortState::Taken) = self.states.get(port) {
                    pod_warnings.push(format!(
                        "wait port {}: another process in the pod has it, so ebb does not listen on it; choose a \
                         port that the application does not use",
                        port.number
                    ));
                }
            }
            if !pod_warnings.is_empty() {
                warnings.push((Arc::clone(pod), pod_warnings));
            }
        }
        self.server.warnings.set(warnings);
    }

    /// Opens a listener if the port's state allows it. Frees the port if a container has been restarted.
    async fn update(&mut self, pod: &Arc<Pod>, port: &WaitPort) {
        match self.states.get_mut(port) {
            Some(PortState::Taken) => return,
            Some(PortState::Freed(until) | PortState::Failed { until, .. })
                if Instant::now() < *until =>
            {
                return;
            }
            Some(PortState::Listening { containers, .. }) => {
                if containers.follow(pod) {
                    tracing::debug!(pod = %pod.name, "freed wait port {}, because a container was restarted", port.number);
                    let until = Instant::now() + FREED_FOR;
                    self.states.insert(port.clone(), PortState::Freed(until));
                }
                return;
            }
            Some(PortState::Freed(_) | PortState::Failed { .. }) | None => {}
        }
        let failed = match self.states.get(port) {
            Some(PortState::Failed { times, .. }) => *times,
            _ => 0,
        };
        match self.server.tracker.listen_in(&pod.scope, port.number).await {
            Ok(listener) => {
                let until = CancellationToken::new();
                self.opened += 1;
                let number = self.opened;
                let state = PortState::Listening {
                    number,
                    containers: Containers::of(pod),
                    _until: until.clone().drop_guard(),
                };
                self.states.insert(port.clone(), state);
                tracing::debug!(pod = %pod.name, "listening on wait port {}", port.number);
                let (waits, stop) = (Arc::clone(&self.server.waits), self.stop.clone());
                let (pod, port) = (Arc::clone(pod), port.clone());
                // After a panic, which is logged, the port is opened again.
                let serve = listener::serve(listener, waits, pod, until, stop);
                let serve = AssertUnwindSafe(serve).catch_unwind();
                self.listeners.spawn(async move {
                    let _ = serve.await;
                    (port, number)
                });
            }
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                self.states.insert(port.clone(), PortState::Taken);
            }
            Err(e) => {
                let state = PortState::Failed {
                    times: failed.saturating_add(1),
                    until: Instant::now() + RETRY_AFTER,
                };
                self.states.insert(port.clone(), state);
                let (pod, port) = (&pod.name, port.number);
                // The first time, the pod may just be gone. The second failure is logged as a warning, once.
                if failed == 1 {
                    tracing::warn!(%pod, "can't listen on wait port {port}, so its preStop hook does not wait: {e}");
                } else {
                    tracing::debug!(%pod, "can't listen on wait port {port}: {e}");
                }
            }
        }
    }

    /// When a port that was freed, or where listening failed, is tried again.
    fn next_due(&self) -> Option<Instant> {
        let due = self.states.values().filter_map(|state| match state {
            PortState::Freed(until) | PortState::Failed { until, .. } => Some(*until),
            PortState::Listening { .. } | PortState::Taken => None,
        });
        due.min()
    }
}
