//! The checks of one pod: will it lose requests even if ebb holds its stop?

mod connections;
mod network;

use std::{collections::HashMap, fs, path::Path, time::Duration};

use ebb_core::{format::one_line, notification::StopSignals};
use ebb_protocol::{
    client::{AgentClient, AgentError},
    views::{ContainerView, Explanation, PodList, PodView, SCHEMA},
};

use super::{
    Check,
    CheckStatus::Fail,
    Diagnosis,
    gather::DoctorOptions,
    hooks::{self, HookFacts, missing_program},
    programs::{
        advice::{self, SignalSource, StopFacts},
        process::Process,
    },
};
use crate::{
    linux::files::resolve_in,
    pods::{
        cri::Cri,
        discover::{PORTS, PRE_STOP},
        info::{environment, parse_info},
    },
};

/// The variable of Istio's sidecar with the requests that its injector has replaced.
const ISTIO_PROBERS: &str = "ISTIO_KUBE_APP_PROBERS";

/// A running container, as the runtime and `/proc` show it.
#[derive(Debug, Default)]
struct ContainerFacts {
    /// Its main process, in the node's PID namespace.
    pid: Option<u32>,
    process: Option<Process>,
    /// The stop signal that the runtime names. Runtimes before KEP-4960 name none.
    stop_signal: Option<String>,
    /// The image's STOPSIGNAL, if it has one.
    image_signal: Option<String>,
    /// The preStop hook, and the ports, as the kubelet's annotations have them.
    hook: Option<String>,
    ports: Option<String>,
    environment: HashMap<String, String>,
}

/// Checks the pod that `wanted` names.
///
/// # Errors
///
/// [`AgentError`] if the agent does not answer, or knows no such pod.
pub(crate) async fn advise(
    options: &DoctorOptions,
    agent: &AgentClient,
    wanted: &str,
) -> Result<Diagnosis, AgentError> {
    let query = serde_urlencoded::to_string([("pod", wanted)]).unwrap_or_default();
    let explanation: Explanation = agent.get_json(&format!("/v1/explain?{query}")).await?;
    let list: PodList = agent.get_json("/v1/pods").await?;
    let uid = &explanation.pod.uid;
    let diagnosis = |checks| Diagnosis {
        schema: SCHEMA.into(),
        pod: Some(explanation.pod.to_string()),
        checks,
    };
    let Some(pod) = list.pods.into_iter().find(|p| p.pod.uid == *uid) else {
        let gone = "it is not on this node any more; see `ebb explain`";
        return Ok(diagnosis(vec![Check::new("pod", Fail, gone)]));
    };
    let runtime = match resolve_in(&options.root, &options.runtime()) {
        Ok(socket) => Cri::connect(&socket).await.map_err(anyhow::Error::from),
        Err(e) => Err(e.into()),
    };
    let mut checks = match runtime {
        Err(e) => vec![Check::new("runtime", Fail, one_line(e.as_ref()))],
        Ok(cri) => containers(options, &cri, &pod, &explanation).await,
    };
    checks.extend(connections::checks(&pod, &explanation));
    Ok(diagnosis(checks))
}

async fn containers(
    options: &DoctorOptions,
    cri: &Cri,
    pod: &PodView,
    explanation: &Explanation,
) -> Vec<Check> {
    let proc = options.root.join("proc");
    let mut running = Vec::new();
    for container in pod.containers.iter().filter(|c| c.running) {
        running.push((container, facts(&proc, cri, container).await));
    }
    let now = explanation.now.as_ref();
    let setting = |name: &str| {
        let mut settings = now.into_iter().flat_map(|now| &now.settings);
        settings
            .find(|s| s.name == name)
            .map_or("", |s| s.value.as_str())
    };
    // With `until: settled`, ebb sends no signal.
    let annotated_signals: StopSignals = match setting("until") {
        "settled" => StopSignals::default(),
        _ => setting("stop-signal").parse().unwrap_or_default(),
    };
    let annotated_target = setting("stop-signal-to").parse().unwrap_or_default();
    let istio_probers = running
        .iter()
        .find_map(|(_, facts)| facts.environment.get(ISTIO_PROBERS).cloned());
    let mut checks = Vec::new();
    let first_pid = running.iter().find_map(|(_, facts)| facts.pid);
    for (container, facts) in running {
        let (signal, source) = stop_signal(facts.stop_signal, facts.image_signal);
        checks.push(advice::check(&StopFacts {
            container: container.name.clone(),
            has_siblings: pod.containers.len() > 1,
            process: facts.process,
            signal,
            source,
            annotated_signal: annotated_signals.of(&container.name),
            annotated_target,
        }));
        let Some(hook) = facts.hook else { continue };
        let missing = facts.pid.and_then(|pid| {
            let root = proc.join(pid.to_string()).join("root");
            missing_program(
                &root,
                facts.environment.get("PATH").map(String::as_str),
                &hook,
            )
        });
        checks.extend(hooks::checks(&HookFacts {
            container: container.name.clone(),
            hook,
            ports: facts.ports,
            grace: now.and_then(|now| now.grace_ms).map(Duration::from_millis),
            missing,
            istio_probers: istio_probers.clone(),
        }));
    }
    let names: Vec<&str> = pod.containers.iter().map(|c| c.name.as_str()).collect();
    checks.extend(network::mesh(
        &names,
        setting("until"),
        setting("idle-flows"),
    ));
    let netstat = first_pid.map(|pid| proc.join(pid.to_string()).join("net/netstat"));
    let netstat = netstat.and_then(|path| fs::read_to_string(path).ok());
    if pod.network == ebb_protocol::views::Network::Pod {
        checks.extend(netstat.and_then(|text| network::backlog(&text)));
    }
    checks
}

async fn facts(proc: &Path, cri: &Cri, container: &ContainerView) -> ContainerFacts {
    let Ok(Some(answer)) = cri.container_status(&container.id).await else {
        return ContainerFacts::default();
    };
    let status = answer.status.unwrap_or_default();
    let pid = parse_info(&answer.info).ok().and_then(|i| i.pid);
    ContainerFacts {
        pid,
        process: pid.and_then(|pid| Process::read(proc, pid)),
        stop_signal: cri.stop_signal(&container.id).await.ok().flatten(),
        image_signal: cri
            .image_stop_signal(&status.image_ref)
            .await
            .ok()
            .flatten(),
        hook: status.annotations.get(PRE_STOP).cloned(),
        ports: status.annotations.get(PORTS).cloned(),
        environment: environment(&answer.info),
    }
}

/// The signal that stops a container, and where it comes from. The runtime's status of the container names the signal in
/// force; if that is not the image's, it is the pod's `lifecycle.stopSignal` (KEP-4960).
fn stop_signal(in_force: Option<String>, of_image: Option<String>) -> (String, SignalSource) {
    match (in_force, of_image) {
        (Some(signal), image) if signal != image.as_deref().unwrap_or("SIGTERM") => {
            (signal, SignalSource::Pod)
        }
        (_, Some(image)) => (image, SignalSource::Image),
        (_, None) => ("SIGTERM".into(), SignalSource::Default),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_is_not_the_images_is_that_of_the_pod() {
        for (in_force, of_image, signal, source) in [
            (None, None, "SIGTERM", SignalSource::Default),
            (Some("SIGTERM"), None, "SIGTERM", SignalSource::Default),
            (None, Some("SIGQUIT"), "SIGQUIT", SignalSource::Image),
            (
                Some("SIGQUIT"),
                Some("SIGQUIT"),
                "SIGQUIT",
                SignalSource::Image,
            ),
            (
                Some("SIGUSR1"),
                Some("SIGQUIT"),
                "SIGUSR1",
                SignalSource::Pod,
            ),
            (Some("SIGUSR1"), None, "SIGUSR1", SignalSource::Pod),
        ] {
            let found = stop_signal(in_force.map(Into::into), of_image.map(Into::into));
            assert_eq!(found, (signal.to_owned(), source));
        }
    }
}
