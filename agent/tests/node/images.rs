//! `ebb doctor` and the programs of real images: the doctor says how a stop ends, and the stop ends so.
//!
//! Each case is a container with the real program. A trial runs all of its containers in one pod, runs the doctor once,
//! begins a request of three seconds at each container, and stops them all at a time through the runtime.

mod amqp;
mod cases;
mod recommended;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ebb::host::doctor::{
    CheckStatus::{self, Ok as Fine, Warn},
    Diagnosis,
};
use ebb_testkit::{
    http,
    kubelet::{ContainerSpec, PodSpec, PreStop, StartedPod},
};
use futures_util::future::{join_all, try_join_all};
use libtest_mimic::Trial;
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};

use self::cases::{
    Case,
    Client::Nothing,
    FPM, NGINX,
    Outcome::{Cut, Killed, Served},
    PROGRAMS, PYTHON_DRAINS, SERVERS, case, files,
};
use crate::{
    doctor::doctor,
    scene::{SECOND, SOON, Scene, eventually, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "doctor_predicts_how_the_stops_of_servers_end",
            async |scene| check_all(scene, "servers", SERVERS).await,
        ),
        trial(
            "doctor_predicts_how_the_stops_of_inits_shells_and_runtimes_end",
            async |scene| check_all(scene, "programs", PROGRAMS).await,
        ),
        trial(
            "the_annotations_that_the_doctor_recommends_let_servers_finish_their_requests",
            recommended::check,
        ),
        trial(
            "doctor_judges_pre_stop_hooks_and_they_do_what_it_says",
            hooks,
        ),
    ]
}

/// The grace period of the stops. Longer than a request.
const GRACE: Duration = Duration::from_secs(6);

/// The port of the application behind the proxies.
const BACKEND: u16 = 7000;

/// How long each request takes.
const REQUEST: Duration = Duration::from_secs(3);

/// How long after its start each request is under way.
const UNDER_WAY: Duration = SECOND;

/// Runs the cases in one pod, and waits until they listen.
async fn run(scene: &Scene, mut spec: PodSpec, cases: &[&Case]) -> Result<StartedPod> {
    let parent = scene.directory(&spec.name)?;
    spec = spec.container(server("backend", BACKEND));
    for case in cases {
        spec = spec.container(case.container(&parent)?);
    }
    if let Some(case) = cases.iter().find(|case| case.command[0] == FPM[0]) {
        let front = &["nginx", "-e", "stderr", "-c", "/conf/front.conf"];
        let front = ContainerSpec::host("front", "SIGQUIT", front);
        spec = spec.container(front.mount(files(&parent, case)?, "/conf"));
    }
    let pod = scene.run(spec).await?;
    for case in cases.iter().filter(|case| case.client != Nothing) {
        let open = http::until_open(pod.v4(case.port)?, SOON * 3).await;
        open.with_context(|| format!("{} does not listen: {}", case.name, pod.log(case.name)))?;
    }
    Ok(pod)
}

/// Runs the cases in one pod, and compares what the doctor says and how the stops end with what the cases say.
async fn check_all(scene: Scene, name: &str, cases: &[Case]) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = run(
        &scene,
        PodSpec::new(name),
        &cases.iter().collect::<Vec<_>>(),
    )
    .await?;

    let mut wrong = eventually("the doctor sees all programs", async || {
        let (diagnosis, _) = doctor(&scene, &agent, &proxy, &[name]).await?;
        let wrong: Vec<String> = cases
            .iter()
            .filter_map(|case| misjudged(case, &diagnosis))
            .collect();
        // A program that serves no TCP may still be starting.
        let is_starting =
            |case: &&Case| case.client == Nothing && misjudged(case, &diagnosis).is_some();
        Ok((!cases.iter().any(|case| is_starting(&case))).then_some(wrong))
    })
    .await?;

    let begun = try_join_all(cases.iter().map(|case| case.begin(&pod, REQUEST))).await?;
    sleep(UNDER_WAY).await;
    let kubelet = scene.kubelet()?;
    let stops = cases.iter().zip(begun).map(async |(case, begun)| {
        let took = kubelet
            .stop_container(pod.container(case.name)?, GRACE)
            .await?;
        let served = begun.await?;
        let outcome = match (took >= GRACE, served) {
            (true, _) => Killed,
            (false, true) if case.client != Nothing => Served,
            (false, _) => Cut,
        };
        let is_right = outcome == case.outcome;
        let (name, expected) = (case.name, case.outcome);
        anyhow::Ok(
            (!is_right).then(|| format!("{name}: {outcome:?} after {took:?}, not {expected:?}")),
        )
    });
    for stop in join_all(stops).await {
        wrong.extend(stop?);
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// How the doctor's check of a case differs from what the case says.
fn misjudged(case: &Case, diagnosis: &Diagnosis) -> Option<String> {
    let name = format!("container {}", case.name);
    let Some((said, text)) = said(diagnosis, &name) else {
        return Some(format!("{name}: the doctor says nothing"));
    };
    let (status, part) = case.says;
    let is_right = said == status && text.contains(part);
    (!is_right).then(|| format!("{name}: {said:?}: {text}, not {status:?}: {part}"))
}

async fn hooks(scene: Scene) -> Result<()> {
    let parent = scene.directory("conf")?;
    let python = |name, port| case(name, port, "SIGTERM", PYTHON_DRAINS, (Fine, ""), Served);
    let nginx = case("nginx", 7201, "SIGTERM", NGINX, (Warn, ""), Served);
    let container = |case: &Case| case.container(&parent);
    let exec = |words: &[&str]| PreStop::Exec(words.iter().map(ToString::to_string).collect());
    let istio = PreStop::HttpGet {
        port: 15020,
        path: "/app-lifecycle/meshed/prestopz".into(),
    };
    let probers =
        r#"{"/app-lifecycle/meshed/prestopz":{"httpGet":{"path":"/ebb/wait","port":9690}}}"#;
    let full = [
        "serve",
        "--port",
        "7205",
        "--one-by-one",
        "--delay",
        "2000",
        "--backlog",
        "1",
    ];
    let quit = ["sh", "-c", "nginx -c /conf/nginx.conf -s quit"];
    let spec = PodSpec::new("hooked")
        .grace(12 * SECOND)
        .container(server("backend", BACKEND))
        .container(container(&nginx)?.pre_stop(exec(&quit)))
        .container(container(&python("missing", 7203))?.pre_stop(exec(&["/nowhere/drain"])))
        .container(container(&python("meshed", 7204))?.pre_stop(istio))
        .container(container(&python("istio-proxy", 7206))?.env("ISTIO_KUBE_APP_PROBERS", probers))
        .container(ContainerSpec::fixture("full", &full));
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let sleepy = PodSpec::new("sleepy")
        .grace(12 * SECOND)
        .container(container(&python("sleeper", 7202))?.pre_stop(exec(&["sleep", "2"])));
    let sleepy = scene.run(sleepy).await?;
    let pod = scene.run(spec).await?;
    http::until_open(sleepy.v4(7202)?, SOON).await?;
    for port in [7201, 7203, 7204, 7206] {
        http::until_open(pod.v4(port)?, SOON).await?;
    }
    // A queue of one has room for two connections. More are dropped.
    let full = pod.v4(7205)?;
    let dialling: Vec<_> = (0..6)
        .map(|_| tokio::spawn(timeout(2 * SECOND, TcpStream::connect(full))))
        .collect();
    join_all(dialling).await;

    let (diagnosis, _) = doctor(&scene, &agent, &proxy, &["hooked"]).await?;
    for (name, status, part) in [
        (
            "container nginx",
            Warn,
            "closes its connections at once on SIGTERM",
        ),
        ("preStop nginx", Fine, "nginx -s quit"),
        (
            "preStop missing",
            Warn,
            "runs /nowhere/drain, which the image does not have",
        ),
        ("preStop meshed", Warn, "ebb.dev/wait-port: \"9690\""),
        ("mesh", Warn, "ebb.dev/until: idle"),
        ("backlog", Warn, "queue was full"),
    ] {
        let said = said(&diagnosis, name).with_context(|| format!("{name}: {diagnosis:?}"))?;
        ensure!(
            said.0 == status && said.1.contains(part),
            "{name}: {said:?}"
        );
    }
    let (diagnosis, _) = doctor(&scene, &agent, &proxy, &["sleepy"]).await?;
    let said = said(&diagnosis, "preStop sleeper").context("the doctor says nothing")?;
    let left = said.1.contains("10.0s of 12.0s are left");
    ensure!(said.0 == Warn && left, "{said:?}");
    let explanation = agent.explain("sleepy").await?;
    let policy = explanation.now.context("the pod is gone")?;
    ensure!(policy.pre_stop_sleep_ms == Some(2_000), "{policy:?}");
    // The grace period less the sleep, less a third of that.
    ensure!(policy.deadline_ms == 6_666, "{policy:?}");

    let request = tokio::spawn(http::get(pod.v4(7201)?, "/slow?ms=3000"));
    sleep(UNDER_WAY).await;
    let stopped = scene.kubelet_at(&proxy)?.stop(&pod, 12 * SECOND).await;
    let reply = request.await?;
    let served = reply.as_ref().is_ok_and(|reply| reply.status.is_success());
    ensure!(served, "{reply:?}, {stopped:?}: {}", pod.log("nginx"));
    let missing = stopped.containers.iter().find(|c| c.name == "missing");
    let hook = missing.and_then(|c| c.pre_stop.as_ref());
    ensure!(
        hook.is_some_and(|(_, result)| result.is_err()),
        "{stopped:?}"
    );
    let stopped = scene.kubelet()?.stop(&sleepy, 12 * SECOND).await;
    ensure!(stopped.containers[0].timeout == 10 * SECOND, "{stopped:?}");
    Ok(())
}

/// The status and the whole text of a check.
fn said(diagnosis: &Diagnosis, name: &str) -> Option<(CheckStatus, String)> {
    let check = diagnosis.checks.iter().find(|check| check.name == name)?;
    let parts = [
        Some(&check.detail),
        check.why.as_ref(),
        check.change.as_ref(),
    ];
    let text: Vec<&str> = parts.into_iter().flatten().map(String::as_str).collect();
    Some((check.status, text.join("; ")))
}
