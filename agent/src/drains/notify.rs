//! Tells the application of a pod that its pod ends: by a signal to its processes, and by an HTTP request.
//!
//! The drain machine decides when, and that each comes once. This module carries it out.

mod request;
mod signal;

use std::{future::Future, path::PathBuf, pin::Pin, sync::Arc, time::Duration};

use ebb_core::notification::{
    Notification, NotificationOutcome, SignalOutcome, SignalReport, SignalTarget, StopSignals,
};
use futures_util::{StreamExt as _, stream};
use k8s_cri::v1::ContainerState;
use tokio::{task::spawn_blocking, time::timeout};
use tracing::{info, warn};

use crate::pods::{Container, Pod, cri::Cri, info::parse_info, store::Pods};

/// How long the runtime may take to list the pods, and then to return the process of each container.
const RUNTIME_ANSWERS_WITHIN: Duration = Duration::from_secs(1);

/// How many requests about containers run at a time.
const AT_ONCE: usize = 8;

/// How long one notification may take in all. The drain waits for it, if it could end otherwise.
const LONGEST: Duration = Duration::from_secs(5);

/// The future outcome of a notification.
pub type NotificationFuture = Pin<Box<dyn Future<Output = NotificationOutcome> + Send>>;

/// Sends notifications to applications.
pub trait Notifier: Send + Sync + 'static {
    /// Carries out this notification of a pod.
    fn notify(&self, pod: Arc<Pod>, notification: Notification) -> NotificationFuture;
}

/// Sends a notification, and logs the outcome. Always ends soon: a panic and a timeout are failures.
pub(super) async fn notify(
    notifier: Option<Arc<dyn Notifier>>,
    pod: Arc<Pod>,
    notification: Notification,
) -> NotificationOutcome {
    let of_pod = Arc::clone(&pod);
    let failed = {
        let notification = notification.clone();
        move |why: String| failure(&of_pod, &notification, &why)
    };
    let outcome = match notifier {
        None => failed("this agent can't reach the runtime's containers".into()),
        Some(notifier) => {
            let attempt = tokio::spawn(notifier.notify(Arc::clone(&pod), notification.clone()));
            match timeout(LONGEST, attempt).await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(e)) => failed(format!("the attempt panicked or was aborted: {e}")),
                Err(_) => failed(format!("not done within {LONGEST:?}")),
            }
        }
    };
    log(&pod, &notification, &outcome);
    outcome
}

/// The outcome if nothing was sent.
fn failure(pod: &Pod, notification: &Notification, why: &str) -> NotificationOutcome {
    match notification {
        Notification::Request(_) => NotificationOutcome::Requested(Err(why.to_owned())),
        Notification::Signal(signals, _) => {
            let running = pod.containers.iter().filter(|c| c.running);
            let reports = running.filter_map(|c| {
                Some(SignalReport {
                    container: c.name.clone(),
                    signal: signals.of(&c.name)?,
                    pid: None,
                    outcome: SignalOutcome::Failed,
                    detail: Some(why.to_owned()),
                })
            });
            NotificationOutcome::Signaled(reports.collect())
        }
    }
}

fn log(pod: &Pod, notification: &Notification, outcome: &NotificationOutcome) {
    let pod = &pod.name;
    match (notification, outcome) {
        (Notification::Request(request), NotificationOutcome::Requested(Ok(status))) => {
            info!(%pod, "{request} answered {status}");
        }
        (Notification::Request(request), NotificationOutcome::Requested(Err(why))) => {
            warn!(%pod, "{request} failed: {why}");
        }
        (_, NotificationOutcome::Signaled(reports)) => {
            for report in reports {
                match report.outcome {
                    SignalOutcome::Sent => info!(%pod, "{report}"),
                    _ => warn!(%pod, "{report}"),
                }
            }
        }
        (Notification::Signal(..), NotificationOutcome::Requested(_)) => {}
    }
}

/// Finds the processes by the runtime, and sends requests in the pods' namespaces.
pub(crate) struct ContainerNotifier {
    cri: Cri,
    pods: Arc<Pods>,
    /// `/proc` of the node's PID namespace.
    proc: PathBuf,
}

impl ContainerNotifier {
    pub(crate) fn new(cri: Cri, pods: Arc<Pods>, proc: PathBuf) -> Self {
        Self { cri, pods, proc }
    }
}

impl Notifier for ContainerNotifier {
    fn notify(&self, pod: Arc<Pod>, notification: Notification) -> NotificationFuture {
        match notification {
            Notification::Request(request) => Box::pin(async move {
                let made = spawn_blocking(move || request::make(&pod, &request));
                let made = made.await.unwrap_or_else(|e| Err(e.to_string()));
                NotificationOutcome::Requested(made)
            }),
            Notification::Signal(signals, to) => {
                let (cri, pods) = (self.cri.clone(), Arc::clone(&self.pods));
                let proc = self.proc.clone();
                Box::pin(async move {
                    let reports = send_signals(&cri, &pods, proc, &pod, &signals, to).await;
                    NotificationOutcome::Signaled(reports)
                })
            }
        }
    }
}

/// Sends each running container of the pod its signal.
async fn send_signals(
    cri: &Cri,
    pods: &Pods,
    proc: PathBuf,
    pod: &Pod,
    signals: &StopSignals,
    to: SignalTarget,
) -> Vec<SignalReport> {
    // A container that was started or has exited since the drain began is in a new list only.
    let table = pods.refresh_or_cached(RUNTIME_ANSWERS_WITHIN).await;
    let newer = table.ok().and_then(|t| t.by_uid(&pod.name.uid).cloned());
    let newer = newer.filter(|newer| newer.sandbox == pod.sandbox);
    let containers = newer.as_deref().unwrap_or(pod).containers.clone();
    let wanted = containers
        .into_iter()
        .filter(|c| c.running)
        .filter_map(|c| signals.of(&c.name).map(|signal| (c, signal)));
    let wanted: Vec<_> = wanted.collect();
    let sent = stream::iter(wanted)
        .map(|(container, signal)| {
            let proc = proc.clone();
            async move {
                let failed = |why| SignalReport {
                    container: container.name.clone(),
                    signal,
                    pid: None,
                    outcome: SignalOutcome::Failed,
                    detail: Some(why),
                };
                let pid = match main_process(cri, &container).await {
                    Ok(Some(pid)) => pid,
                    Ok(None) => {
                        return vec![SignalReport {
                            outcome: SignalOutcome::Exited,
                            detail: None,
                            ..failed(String::new())
                        }];
                    }
                    Err(why) => return vec![failed(why)],
                };
                let target = signal::SignaledContainer {
                    proc,
                    container: container.id.clone(),
                    name: container.name.clone(),
                    pid,
                };
                let sent = spawn_blocking(move || target.send(signal, to)).await;
                sent.unwrap_or_else(|e| vec![failed(e.to_string())])
            }
        })
        .buffered(AT_ONCE);
    sent.collect::<Vec<_>>().await.concat()
}

/// The main process of a container; `None` if the container does not run any more.
async fn main_process(cri: &Cri, container: &Container) -> Result<Option<u32>, String> {
    let answer = timeout(RUNTIME_ANSWERS_WITHIN, cri.container_status(&container.id)).await;
    let answer = answer.map_err(|_| "the runtime does not tell its process in time")?;
    let Some(answer) = answer.map_err(|e| e.to_string())? else {
        return Ok(None);
    };
    let status = answer.status.as_ref();
    if status.is_some_and(|s| s.state() != ContainerState::ContainerRunning) {
        return Ok(None);
    }
    let info = parse_info(&answer.info).map_err(|e| e.to_string())?;
    Ok(info.pid)
}
