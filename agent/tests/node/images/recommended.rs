//! What the doctor recommends helps: ebb stops pods with the recommended annotations, and their servers finish their
//! requests.
//!
//! The hold alone would let them do so. So a client that stays keeps ebb from stopping the containers: a server that
//! exits before has done so because of ebb's signal.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use ebb::host::doctor::CheckStatus;
use ebb_core::notification::{SignalOutcome, SignalReport, SignalTarget};
use ebb_testkit::kubelet::{PodSpec, StartedPod};
use futures_util::future::{join_all, try_join_all};
use k8s_cri::v1::ContainerState;
use tokio::try_join;

use super::{
    BACKEND,
    cases::{Case, PROGRAMS, SERVERS},
    run, said,
};
use crate::{
    agent::{Agent, Proxy},
    doctor::doctor,
    hold::stop,
    notify::{until_known, until_report},
    peer::Peer,
    scene::{SECOND, Scene, eventually},
};

/// How long each request takes: it is under way when ebb sends its signals.
const REQUEST: Duration = Duration::from_secs(8);

pub(super) async fn check(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let servers = Recommended::of(SERVERS, SignalTarget::Main);
    let shells = Recommended::of(PROGRAMS, SignalTarget::Children);
    let asked = servers.request.as_ref().context("no request on drain")?;
    let told = PodSpec::new("told").annotation("ebb.dev/on-drain", &asked.1);
    let children = PodSpec::new("told-children").annotation("ebb.dev/stop-signal-to", "children");
    try_join!(
        servers.check(&scene, &agent, &proxy, told),
        shells.check(&scene, &agent, &proxy, children),
    )?;
    Ok(())
}

/// The cases of one pod, with the recommended annotations.
struct Recommended {
    /// Each with `CONTAINER=SIGNAL`.
    signals: Vec<(&'static Case, &'static str)>,
    request: Option<(&'static Case, String)>,
}

impl Recommended {
    fn of(cases: &'static [Case], target: SignalTarget) -> Self {
        let signals = cases.iter().filter_map(|case| {
            let (signal, to) = case.recommended_signal()?;
            (to == target).then_some((case, signal))
        });
        let mut requests = cases
            .iter()
            .filter_map(|case| Some((case, case.recommended_request()?)));
        Self {
            signals: signals.collect(),
            request: requests.next(),
        }
    }

    fn cases(&self) -> Vec<&'static Case> {
        let told = self.signals.iter().map(|(case, _)| *case);
        told.chain(self.request.as_ref().map(|(case, _)| *case))
            .collect()
    }

    /// Runs a pod with the cases and stops it through ebb.
    async fn check(
        &self,
        scene: &Scene,
        agent: &Agent,
        proxy: &Proxy,
        spec: PodSpec,
    ) -> Result<()> {
        let name = spec.name.clone();
        let signals: Vec<&str> = self.signals.iter().map(|(_, signal)| *signal).collect();
        ensure!(!signals.is_empty(), "the doctor recommends no signal");
        let spec = spec.annotation("ebb.dev/stop-signal", &signals.join(","));
        let cases = self.cases();
        let pod = run(scene, spec, &cases).await?;
        until_known(agent, &name).await?;
        self.check_doctor(scene, agent, proxy, &name).await?;

        let stays = Peer::served(pod.v4(BACKEND)?).await?;
        let mut keeps_alive = match &self.request {
            Some((case, _)) => Some(Peer::connect(pod.v4(case.port)?).await?),
            None => None,
        };
        if let Some(client) = &mut keeps_alive {
            ensure!(!is_told_to_leave(client).await?, "told before the drain");
        }
        let begun = try_join_all(cases.iter().map(|case| case.begin(&pod, REQUEST))).await?;
        let stopping = stop(scene.kubelet_at(proxy)?, &pod, 60 * SECOND);
        let report = until_report(agent, &name, "the signals are sent", |report| {
            let sent = report.notified.signals.as_ref();
            sent.is_some_and(|sent| !sent.is_empty())
        })
        .await?;
        let sent = report.notified.signals.unwrap_or_default();
        let is_sent = |signal: &&str| sent.iter().any(|report| is_of(report, signal));
        ensure!(
            sent.len() == signals.len() && signals.iter().all(is_sent),
            "{sent:?}, not {signals:?}"
        );
        if let Some(client) = &mut keeps_alive {
            let answer = report.notified.request;
            let status = answer.as_ref().and_then(|answer| answer.status);
            ensure!(status == Some(200), "{answer:?}");
            ensure!(is_told_to_leave(client).await?, "not told by the drain");
        }
        // A signal that cuts a request also ends it.
        let mut ended = cases.iter().zip(&begun).filter(|(_, b)| b.is_finished());
        if let Some((case, _)) = ended.next() {
            bail!(
                "the request to {} ended with the signal, or before",
                case.name
            );
        }
        for (case, served) in cases.iter().zip(join_all(begun).await) {
            ensure!(served?, "{} was cut: {}", case.name, pod.log(case.name));
        }
        self.until_exited(scene, &pod).await?;
        ensure!(!stopping.is_finished(), "released with a client");
        drop(stays);
        let stopped = stopping.await?;
        ensure!(stopped.error().is_none(), "{stopped:?}");
        let report = agent.drain(&name).await?;
        ensure!(report.cut_total == Some(0), "{report:?}");
        Ok(())
    }

    /// Checks that the doctor finds the signals right.
    async fn check_doctor(
        &self,
        scene: &Scene,
        agent: &Agent,
        proxy: &Proxy,
        pod: &str,
    ) -> Result<()> {
        let (diagnosis, _) = doctor(scene, agent, proxy, &[pod]).await?;
        for (case, _) in &self.signals {
            let said = said(&diagnosis, &format!("container {}", case.name));
            let (status, text) = said.context("the doctor says nothing")?;
            ensure!(
                status == CheckStatus::Ok && text.contains("before its stop, ebb sends it"),
                "{}: {status:?}: {text}",
                case.name
            );
        }
        Ok(())
    }

    /// Waits until the containers that get a signal have exited.
    async fn until_exited(&self, scene: &Scene, pod: &StartedPod) -> Result<()> {
        let kubelet = scene.kubelet()?;
        for (case, signal) in &self.signals {
            let container = pod.container(case.name)?;
            eventually(&format!("the exit on {signal}"), async || {
                let status = kubelet.status(container).await?;
                Ok((status.state() == ContainerState::ContainerExited).then_some(()))
            })
            .await?;
        }
        Ok(())
    }
}

/// Whether `CONTAINER=SIGNAL` was sent.
fn is_of(report: &SignalReport, wanted: &str) -> bool {
    let sent = format!("{}={}", report.container, report.signal);
    sent == wanted && report.outcome == SignalOutcome::Sent
}

/// Makes a request on an idle connection: whether the reply has `Connection: close`.
async fn is_told_to_leave(client: &mut Peer) -> Result<bool> {
    client.send("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await?;
    let reply = client.answer("ok\n").await?.to_ascii_lowercase();
    Ok(reply.contains("\r\nconnection: close\r\n"))
}
