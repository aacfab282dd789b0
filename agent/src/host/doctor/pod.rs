//! Advice on one pod: what it is going to lose, held or not.

use std::fs;

use super::{
    Check, Diagnosis,
    Status::{Fail, Ok as Fine, Warn},
    gather::Where,
};
use crate::{
    api::client::{AgentClient, AgentError},
    host::{
        files::followed,
        pid1::{Effect, Signals, signal_number},
    },
    pods::{cri::Cri, info::parse_info},
    report::{
        text::{duration, one_line},
        view::{Explanation, PodList, PodView, SCHEMA},
    },
};

/// How long the cluster autoscaler waits for the pods of a node that it takes away, in milliseconds, unless it was told
/// otherwise (`--max-graceful-termination-sec`).
const AUTOSCALER_WAITS: u64 = 600_000;

/// What is known of a container.
#[derive(Clone, Debug, Default)]
struct Container {
    name: String,
    /// The image's STOPSIGNAL, if it has one.
    stop_signal: Option<String>,
    /// `comm` of its first process.
    program: Option<String>,
    signals: Option<Signals>,
}

/// Checks the pod that is called so.
///
/// # Errors
///
/// [`AgentError`]: the agent is away, or knows no such pod.
pub async fn advise(
    at: &Where,
    agent: &AgentClient,
    wanted: &str,
) -> Result<Diagnosis, AgentError> {
    let query = serde_urlencoded::to_string([("pod", wanted)]).unwrap_or_default();
    let explanation: Explanation = agent.get_json(&format!("/v1/explain?{query}")).await?;
    let list: PodList = agent.get_json("/v1/pods").await?;
    let uid = &explanation.pod.uid;
    let Some(pod) = list.pods.into_iter().find(|p| p.pod.uid == *uid) else {
        return Ok(Diagnosis {
            schema: SCHEMA.into(),
            pod: Some(explanation.pod.to_string()),
            checks: vec![Check::new(
                "pod",
                Fail,
                "it is not on this node any more; see `ebb explain`",
            )],
        });
    };
    let mut checks = Vec::new();
    let runtime = match followed(&at.root, &at.runtime()) {
        Ok(socket) => Cri::connect(&socket).await.map_err(anyhow::Error::from),
        Err(e) => Err(e.into()),
    };
    match runtime {
        Err(e) => checks.push(Check::new("runtime", Fail, one_line(&e))),
        Ok(cri) => {
            for container in pod.containers.iter().filter(|c| c.running) {
                let seen = look(at, &cri, container).await;
                checks.push(stop_signal(&seen));
            }
        }
    }
    checks.extend(connections(&pod, &explanation));
    Ok(Diagnosis {
        schema: SCHEMA.into(),
        pod: Some(explanation.pod.to_string()),
        checks,
    })
}

async fn look(at: &Where, cri: &Cri, container: &crate::report::view::ContainerView) -> Container {
    let mut seen = Container {
        name: container.name.clone(),
        ..Container::default()
    };
    let Ok(Some(status)) = cri.container_status(&container.id).await else {
        return seen;
    };
    if let Some(pid) = parse_info(&status.info).ok().and_then(|i| i.pid) {
        let process = at.root.join("proc").join(pid.to_string());
        let read = |file| fs::read_to_string(process.join(file)).ok();
        seen.program = read("comm").map(|c| c.trim_end().to_owned());
        seen.signals = read("status").and_then(|s| Signals::parse(&s));
    }
    let image = status.status.map(|s| s.image_ref).unwrap_or_default();
    seen.stop_signal = cri.image_stop_signal(&image).await.ok().flatten();
    seen
}

/// Whether a container hears its stop signal, and ends well by it.
fn stop_signal(container: &Container) -> Check {
    let name = format!("container {}", container.name);
    let signal = container.stop_signal.as_deref().unwrap_or("SIGTERM");
    let Some(signals) = container.signals else {
        return Check::new(&name, Warn, "its first process can't be seen from here");
    };
    let Some(number) = signal_number(signal) else {
        return Check::new(
            &name,
            Warn,
            format!("its image's STOPSIGNAL {signal:?} is none that ebb knows"),
        );
    };
    let nginx = container.program.as_deref() == Some("nginx");
    match signals.effect(number) {
        // nginx(8): TERM and INT are the fast shutdown, QUIT the graceful one.
        Effect::Caught if nginx && matches!(number, 2 | 15) => Check::new(
            &name,
            Warn,
            format!(
                "nginx closes its connections at once on {signal}: set STOPSIGNAL SIGQUIT in its image"
            ),
        ),
        Effect::Caught => Check::new(&name, Fine, format!("its first process catches {signal}")),
        Effect::None => Check::new(
            &name,
            Warn,
            format!(
                "its first process does not catch {signal}, so it goes on until it is killed at the end of the grace \
                 period: handle the signal, or have a small init forward it to the program (`exec` in a shell script)"
            ),
        ),
        Effect::Ends => Check::new(
            &name,
            Warn,
            format!(
                "{signal} ends its process at once, with whatever is under way: handle the signal"
            ),
        ),
    }
}

/// What the pod's connections and its policy say about its end.
fn connections(pod: &PodView, explanation: &Explanation) -> Vec<Check> {
    let mut checks = Vec::new();
    if let Some(why) = &pod.untracked {
        checks.push(Check::new(
            "connections",
            Warn,
            format!("can't be seen: {why}; held for the settle time alone"),
        ));
    }
    for warning in &pod.warnings {
        checks.push(Check::new("policy", Warn, warning));
    }
    let Some(now) = &explanation.now else {
        return checks;
    };
    let setting = |name: &str| {
        let setting = now.settings.iter().find(|s| s.name == name);
        setting.map_or("", |s| s.value.as_str())
    };
    if setting("drain") == "off" {
        checks.push(Check::new(
            "policy",
            Warn,
            "ebb.dev/drain is off: its stop is never held",
        ));
    }
    // Connections that outlive the hold, by those that are open and those that were cut the last time.
    let cut = explanation.drain.iter().flat_map(|d| &d.cut);
    let oldest = cut.filter_map(|c| c.age_ms).chain(pod.oldest_ms).max();
    let deadline = duration(now.deadline_ms);
    checks.push(match oldest {
        Some(oldest) if oldest > now.deadline_ms => Check::new(
            "grace period",
            Warn,
            format!(
                "connections have lasted {}, and a hold ends after {deadline}: set terminationGracePeriodSeconds to \
                 more than they need, or idle-flows: close if they are only kept alive",
                duration(oldest)
            ),
        ),
        Some(oldest) => Check::new(
            "grace period",
            Fine,
            format!("the oldest connection has lasted {}, and a hold {deadline} at most", duration(oldest)),
        ),
        None => Check::new("grace period", Fine, format!("a hold lasts {deadline} at most; no connection is open")),
    });
    if let Some(grace) = now.grace_ms.filter(|grace| *grace > AUTOSCALER_WAITS) {
        checks.push(Check::new(
            "grace period",
            Warn,
            format!(
                "it may take {}, and the cluster autoscaler ends a node after {}, whatever still runs: raise its \
                 --max-graceful-termination-sec, or keep such pods off the nodes that it takes away",
                duration(grace),
                duration(AUTOSCALER_WAITS)
            ),
        ));
    }
    if let Some(flows) = pod.flows
        && flows.idle > 0
        && setting("until") == "zero"
        && setting("idle-flows") == "keep"
    {
        checks.push(Check::new(
            "keep-alive",
            Warn,
            format!(
                "{} idle connections would hold it until their clients close them: consider \
                 ebb.dev/idle-flows: close, or ebb.dev/until: idle",
                flows.idle
            ),
        ));
    }
    if let Some(peer) = explanation
        .drain
        .as_ref()
        .and_then(|d| d.late_peers.first())
    {
        checks.push(Check::new(
            "readiness",
            Warn,
            format!(
                "{} still connected {} times while it drained: what is in front of it learns late that it is going \
                 (readiness, endpoints, DNS), or the probes are on a port that ebb.dev/ignore-ports should name",
                peer.address, peer.flows
            ),
        ));
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        flow::FlowCounts,
        host::doctor::Status,
        ids::{PodName, PodUid},
        report::view::{Network, Origin, PolicyView, Setting},
    };

    fn container(program: &str, stop_signal: Option<&str>, caught: &str, pid: u32) -> Container {
        let status = format!("NSpid:\t99\t{pid}\nSigIgn:\t0\nSigCgt:\t{caught}\n");
        Container {
            name: "app".into(),
            stop_signal: stop_signal.map(Into::into),
            program: Some(program.into()),
            signals: Signals::parse(&status),
        }
    }

    #[test]
    fn a_first_process_without_a_handler_is_pointed_out() {
        let says = |c: &Container| {
            let check = stop_signal(c);
            (check.status, check.detail)
        };
        // SIGTERM is bit 14, SIGQUIT bit 2.
        let (status, _) = says(&container("app", None, "4000", 1));
        assert_eq!(status, Fine);
        let (status, why) = says(&container("sh", None, "0", 1));
        assert_eq!(status, Warn);
        assert!(why.contains("does not catch SIGTERM"), "{why}");
        let (status, why) = says(&container("app", Some("SIGQUIT"), "4000", 1));
        assert_eq!(status, Warn);
        assert!(why.contains("does not catch SIGQUIT"), "{why}");
        let (status, why) = says(&container("app", None, "0", 7));
        assert_eq!(status, Warn);
        assert!(why.contains("ends its process at once"), "{why}");
    }

    #[test]
    fn nginx_is_stopped_gracefully_by_sigquit_only() {
        let nginx = |signal| stop_signal(&container("nginx", signal, "4006", 1));
        assert_eq!(nginx(Some("SIGQUIT")).status, Fine);
        assert!(nginx(Some("SIGTERM")).detail.contains("STOPSIGNAL SIGQUIT"));
        assert!(nginx(None).detail.contains("STOPSIGNAL SIGQUIT"));
    }

    fn advice(change: impl FnOnce(&mut PodView, &mut PolicyView)) -> Vec<(String, Status)> {
        let name = PodName {
            uid: PodUid::new("u"),
            namespace: "shop".into(),
            name: "web".into(),
        };
        let mut pod = PodView {
            pod: name.clone(),
            network: Network::Pod,
            ips: vec![],
            containers: vec![],
            flows: Some(FlowCounts::default()),
            peers: Some(0),
            exempt: Some(0),
            oldest_ms: None,
            untracked: None,
            warnings: vec![],
        };
        let setting = |name: &str, value: &str| Setting {
            name: name.into(),
            value: value.into(),
            from: Origin::Default,
        };
        let mut now = PolicyView {
            settings: vec![
                setting("drain", "on"),
                setting("until", "zero"),
                setting("idle-flows", "keep"),
            ],
            warnings: vec![],
            grace_ms: Some(30_000),
            reserve_ms: 5_000,
            deadline_ms: 25_000,
        };
        change(&mut pod, &mut now);
        let explanation = Explanation {
            schema: SCHEMA.into(),
            pod: name,
            agent_since: String::new(),
            deleting: None,
            now: Some(now),
            drain: None,
            stops: vec![],
        };
        let checks = connections(&pod, &explanation).into_iter();
        checks.map(|c| (c.name, c.status)).collect()
    }

    #[test]
    fn connections_that_outlast_the_hold_and_idle_ones_are_pointed_out() {
        let check = |name: &str, status| (name.to_owned(), status);
        assert_eq!(advice(|_, _| ()), [check("grace period", Fine)]);
        let young = advice(|pod, _| pod.oldest_ms = Some(24_000));
        assert_eq!(young, [check("grace period", Fine)]);
        let old = advice(|pod, _| pod.oldest_ms = Some(26_000));
        assert_eq!(old, [check("grace period", Warn)]);
        let idle = FlowCounts {
            idle: 3,
            ..FlowCounts::default()
        };
        let kept = advice(|pod, _| pod.flows = Some(idle));
        assert_eq!(
            kept,
            [check("grace period", Fine), check("keep-alive", Warn)]
        );
        let closed = advice(|pod, now| {
            pod.flows = Some(idle);
            now.settings[2].value = "close".into();
        });
        assert_eq!(closed, [check("grace period", Fine)]);
        let graces = [check("grace period", Fine), check("grace period", Warn)];
        assert_eq!(advice(|_, now| now.grace_ms = Some(600_001)), graces);
        assert_eq!(advice(|_, now| now.grace_ms = Some(600_000)), graces[..1]);
        let off = advice(|_, now| now.settings[0].value = "off".into());
        assert_eq!(off, [check("policy", Warn), check("grace period", Fine)]);
    }
}
