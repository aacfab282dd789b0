//! The wait port inside pods: `preStop.httpGet: {path: /ebb/wait, port: …}`.
//!
//! ```text
//!  looks at the runtime ──► plan (pure): which ports of which pods? ──► listeners, a task each
//!                                                                          │ GET, from the kubelet
//!                                                                          ▼
//!                                                       wait: for the pod that the namespace is of
//! ```
//!
//! A port belongs to the application if it wants it. One that is taken is left alone for as long as the
//! pod's sandbox lives, and one that a restarted container may have wanted is given back for a while. Where it can't be
//! had for any other reason (descriptors have run out, say), it is tried again and again.

mod listener;
mod plan;

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::plan::{Place, Plan};
use crate::{
    agent::Agent,
    ids::{ContainerId, PodUid},
    lock::lock,
    pods::{Pod, changes::Changes, table::PodTable},
    report::{news::News, tell::Teller},
};

/// For how long a port is given back when a container of its pod has been restarted: it may have failed for
/// want of the port. A kubelet's second restart comes some 30 s after the first start.
const GIVEN_BACK: Duration = Duration::from_secs(60);

/// How long to wait after a port could not be had for another reason than that somebody has it.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// What is wrong with the wait ports of pods, for those who show pods.
#[derive(Debug, Default)]
pub struct Warnings(Mutex<HashMap<PodUid, Vec<String>>>);

impl Warnings {
    /// Those of one pod.
    pub fn of(&self, pod: &PodUid) -> Vec<String> {
        self.lock().get(pod).cloned().unwrap_or_default()
    }

    /// Replaces all, and tells of the new ones.
    fn set(&self, new: Vec<(Arc<Pod>, Vec<String>)>, teller: &Teller) {
        let mut all = self.lock();
        for (pod, warnings) in &new {
            let known = all.get(&pod.name.uid);
            for warning in warnings {
                if !known.is_some_and(|k| k.contains(warning)) {
                    teller.tell(News::wait_port(&pod.name, warning));
                }
            }
        }
        *all = new
            .into_iter()
            .map(|(pod, warnings)| (pod.name.uid.clone(), warnings))
            .collect();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PodUid, Vec<String>>> {
        // It is replaced in one step.
        lock(&self.0)
    }
}

/// What is known of a place where ebb listens, or would.
enum State {
    Listening {
        /// Tells it from another one at the same place, earlier or later.
        number: u64,
        /// The containers at that time, by name.
        containers: HashMap<String, HashSet<ContainerId>>,
        _until: DropGuard,
    },
    /// Somebody else has it.
    Taken,
    /// Given back until then.
    GivenBack(Instant),
    /// It could not be had so many times, and is to be tried again then.
    Failed { times: u32, until: Instant },
}

struct Ports {
    agent: Arc<Agent>,
    places: HashMap<Place, State>,
    /// By place and number.
    listeners: JoinSet<(Place, u64)>,
    /// Listeners made so far.
    made: u64,
    stop: CancellationToken,
}

/// Listens inside the pods that ask for it, until `stop`; requests under way are ended by the release of their
/// holds.
pub async fn serve(agent: Arc<Agent>, changes: Arc<Changes>, stop: CancellationToken) {
    let mut looks = agent.pods.subscribe();
    let mut ports = Ports {
        agent,
        places: HashMap::new(),
        listeners: JoinSet::new(),
        made: 0,
        stop: stop.clone(),
    };
    loop {
        let table = looks.borrow_and_update().clone();
        ports.follow(&table).await;
        let due = ports.next_due();
        tokio::select! {
            // Gone only with the pods.
            Ok(()) = looks.changed() => {}
            Some(ended) = ports.listeners.join_next() => {
                // Its sandbox is gone, or will be seen to be another one.
                if let Ok((place, number)) = ended && ports.ended(&place, number) {
                    changes.tell();
                }
            }
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            () = stop.cancelled() => break,
        }
    }
    while ports.listeners.join_next().await.is_some() {}
}

impl Ports {
    /// Forgets a listener that has ended, and says whether it was still wanted.
    fn ended(&mut self, place: &Place, ended: u64) -> bool {
        let is =
            |state: &State| matches!(state, State::Listening { number, .. } if *number == ended);
        let wanted = self.places.get(place).is_some_and(is);
        if wanted {
            self.places.remove(place);
        }
        wanted
    }

    /// Brings the listeners to where the pods are.
    async fn follow(&mut self, table: &PodTable) {
        let plans: Vec<(Arc<Pod>, Plan)> = table
            .iter()
            .map(|pod| {
                (
                    Arc::clone(pod),
                    Plan::of(pod, &self.agent.own_policy_of(pod)),
                )
            })
            .collect();
        let wanted: HashSet<&Place> = plans.iter().flat_map(|(_, plan)| &plan.places).collect();
        // Those listeners end with their state.
        self.places.retain(|place, _| wanted.contains(place));
        let mut warnings = Vec::new();
        for (pod, plan) in &plans {
            let mut wrong = plan.warnings.clone();
            for place in &plan.places {
                self.visit(pod, place).await;
                if let Some(State::Taken) = self.places.get(place) {
                    wrong.push(format!(
                        "wait port {}: another process in the pod has it, so ebb leaves it alone; choose one that \
                         the application does not use",
                        place.port
                    ));
                }
            }
            if !wrong.is_empty() {
                warnings.push((Arc::clone(pod), wrong));
            }
        }
        self.agent
            .wait_port_warnings
            .set(warnings, &self.agent.teller);
    }

    /// Listens where ebb does not listen yet and may, and gives back what may be wanted.
    async fn visit(&mut self, pod: &Arc<Pod>, place: &Place) {
        match self.places.get(place) {
            Some(State::Taken) => return,
            Some(State::GivenBack(until) | State::Failed { until, .. })
                if Instant::now() < *until =>
            {
                return;
            }
            Some(State::Listening { containers, .. }) => {
                if plan::was_restarted(pod, containers) {
                    tracing::debug!(pod = %pod.name, "a container was restarted; wait port {} is free for it", place.port);
                    let until = Instant::now() + GIVEN_BACK;
                    self.places.insert(place.clone(), State::GivenBack(until));
                }
                return;
            }
            Some(State::GivenBack(_) | State::Failed { .. }) | None => {}
        }
        let failed = match self.places.get(place) {
            Some(State::Failed { times, .. }) => *times,
            _ => 0,
        };
        match self.agent.tracker.listen_in(&pod.scope, place.port).await {
            Ok(listener) => {
                let until = CancellationToken::new();
                self.made += 1;
                let number = self.made;
                let state = State::Listening {
                    number,
                    containers: plan::by_name(pod),
                    _until: until.clone().drop_guard(),
                };
                self.places.insert(place.clone(), state);
                tracing::debug!(pod = %pod.name, "listening on wait port {}", place.port);
                let (agent, stop) = (Arc::clone(&self.agent), self.stop.clone());
                let (pod, place) = (Arc::clone(pod), place.clone());
                self.listeners.spawn(async move {
                    listener::serve(listener, agent, pod, until, stop).await;
                    (place, number)
                });
            }
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                self.places.insert(place.clone(), State::Taken);
            }
            Err(e) => {
                let state = State::Failed {
                    times: failed.saturating_add(1),
                    until: Instant::now() + TRY_AGAIN,
                };
                self.places.insert(place.clone(), state);
                let (pod, port) = (&pod.name, place.port);
                // The pod may be gone already: by the second time that is known. Then it is said, once.
                if failed == 1 {
                    tracing::warn!(%pod, "can't listen on wait port {port}, so its preStop hook does not wait: {e}");
                } else {
                    tracing::debug!(%pod, "can't listen on wait port {port}: {e}");
                }
            }
        }
    }

    /// When a port that was given back or could not be had is to be tried again.
    fn next_due(&self) -> Option<Instant> {
        let due = self.places.values().filter_map(|state| match state {
            State::GivenBack(until) | State::Failed { until, .. } => Some(*until),
            State::Listening { .. } | State::Taken => None,
        });
        due.min()
    }
}
