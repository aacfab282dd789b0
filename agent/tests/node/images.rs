//! `ebb doctor` and the programs of real images: the doctor says how a stop ends, and the stop ends so.
//!
//! Each case is a container with the real program. A trial runs all of its containers in one pod, runs the doctor once,
//! begins a request of three seconds at each container, and stops them all at a time through the runtime.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ebb::host::doctor::{
    CheckStatus::{self, Ok as Fine, Unknown, Warn},
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
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_postgres::NoTls;

use self::{
    Client::{Http, Nothing, Postgres},
    Outcome::{Cut, Killed, Served},
};
use crate::{
    doctor::doctor,
    scene::{SECOND, SOON, Scene, directory, eventually, server, trial},
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
            "doctor_judges_pre_stop_hooks_and_they_do_what_it_says",
            hooks,
        ),
    ]
}

/// The grace period of the stops. Longer than a request.
const GRACE: Duration = Duration::from_secs(6);

/// How long after its start each request is under way.
const UNDER_WAY: Duration = SECOND;

/// The files of the cases.
const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/node/images");

/// How a stop ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The program finished the request and exited.
    Served,
    /// The program exited and did not finish the request.
    Cut,
    /// The program ran on, and was killed at the end of the grace period.
    Killed,
}

/// What is under way at the stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    Http,
    /// A client that is connected and idle.
    Postgres,
    /// The program serves no TCP.
    Nothing,
}

struct Case {
    name: &'static str,
    port: u16,
    /// The STOPSIGNAL of the image.
    signal: &'static str,
    /// `PORT` stands for the port.
    command: &'static [&'static str],
    client: Client,
    /// The status of the doctor's check, and a part of its text.
    says: (CheckStatus, &'static str),
    outcome: Outcome,
}

const fn case(
    name: &'static str,
    port: u16,
    signal: &'static str,
    command: &'static [&'static str],
    says: (CheckStatus, &'static str),
    outcome: Outcome,
) -> Case {
    Case {
        name,
        port,
        signal,
        command,
        client: Http,
        says,
        outcome,
    }
}

const fn with(client: Client, case: Case) -> Case {
    Case { client, ..case }
}

const NGINX: &[&str] = &["nginx", "-e", "stderr", "-c", "/conf/nginx.conf"];
const FPM: &[&str] = &["php-fpm8.2", "-n", "-y", "/conf/fpm.conf"];
const FPM_TIMEOUT: &[&str] = &["php-fpm8.2", "-n", "-y", "/conf/fpm-timeout.conf"];
const APACHE: &[&str] = &["apache2", "-f", "/conf/apache.conf", "-DFOREGROUND"];
const HAPROXY: &[&str] = &["haproxy", "-W", "-db", "-f", "/conf/haproxy.cfg"];
const HAPROXY_ALONE: &[&str] = &["haproxy", "-db", "-f", "/conf/haproxy.cfg"];
const GUNICORN: &[&str] = &[
    "python3", "-m", "gunicorn", "-b", ":PORT", "--chdir", "/conf", "app:app",
];
const POSTGRES: &[&str] = &["sh", "/conf/postgres.sh"];

macro_rules! uwsgi {
    ($($more:literal),*) => {
        &[
            "uwsgi-core", "--plugin", "/parts/usr/lib/uwsgi/plugins/python311_plugin.so", "--wsgi-file", "/conf/app.py",
            "--master", "--http-socket", ":PORT", $($more),*
        ]
    };
}

#[rustfmt::skip]
const SERVERS: &[Case] = &[
    case("nginx-term", 7001, "SIGTERM", NGINX, (Warn, "ebb.dev/stop-signal: nginx-term=SIGQUIT"), Cut),
    case("nginx-quit", 7002, "SIGQUIT", NGINX, (Fine, "finishes its requests on SIGQUIT"), Served),
    case("fpm-term", 7011, "SIGTERM", FPM_TIMEOUT, (Warn, "ebb.dev/stop-signal: fpm-term=SIGQUIT"), Cut),
    case("fpm-quit", 7012, "SIGQUIT", FPM, (Warn, "set process_control_timeout"), Cut),
    case("fpm-timeout", 7013, "SIGQUIT", FPM_TIMEOUT, (Fine, "finishes its requests on SIGQUIT"), Served),
    case("apache-term", 7021, "SIGTERM", APACHE, (Warn, "ebb.dev/stop-signal: apache-term=SIGWINCH"), Cut),
    case("apache-winch", 7022, "SIGWINCH", APACHE, (Fine, "finishes its requests on SIGWINCH"), Served),
    case("haproxy-term", 7031, "SIGTERM", HAPROXY, (Warn, "ebb.dev/stop-signal: haproxy-term=SIGUSR1"), Cut),
    case("haproxy-usr1", 7032, "SIGUSR1", HAPROXY, (Fine, "finishes its requests on SIGUSR1"), Served),
    case("haproxy-alone", 7033, "SIGTERM", HAPROXY_ALONE, (Warn, "does not handle SIGTERM, and runs on"), Killed),
    case("uwsgi-term", 7041, "SIGTERM", uwsgi!(), (Warn, "restarts on SIGTERM"), Killed),
    case("uwsgi-die", 7042, "SIGTERM", uwsgi!("--die-on-term"), (Warn, "gracefully_kill_them_all"), Cut),
    case("uwsgi-hook", 7043, "SIGTERM", uwsgi!("--hook-master-start", "unix_signal:15 gracefully_kill_them_all"),
        (Fine, "finishes its requests on SIGTERM"), Served),
    case("gunicorn-term", 7051, "SIGTERM", GUNICORN, (Fine, "finishes its requests on SIGTERM"), Served),
    case("gunicorn-quit", 7052, "SIGQUIT", GUNICORN, (Warn, "ebb.dev/stop-signal: gunicorn-quit=SIGTERM"), Cut),
    with(Postgres, case("postgres-term", 7061, "SIGTERM", POSTGRES, (Warn, "until its clients have left"), Killed)),
    with(Postgres, case("postgres-int", 7062, "SIGINT", POSTGRES, (Warn, "closes its connections at once"), Cut)),
];

const PYTHON: &[&str] = &["python3", "/conf/server.py", "PORT"];
const PYTHON_DRAINS: &[&str] = &["python3", "/conf/server.py", "PORT", "drain"];
const NODE: &[&str] = &["node", "/conf/server.js", "PORT"];
const NODE_DRAINS: &[&str] = &["node", "/conf/server.js", "PORT", "drain"];
const DHCP: &[&str] = &[
    "/parts/usr/lib/cni/dhcp",
    "daemon",
    "-socketpath",
    "/tmp/dhcp.sock",
];
const SCRIPT: &str = "python3 /conf/server.py PORT drain; true";
const EXEC: &str = "exec python3 /conf/server.py PORT drain";
const TRAP: &str =
    "python3 /conf/server.py PORT drain & child=$!; trap 'kill $child' TERM; wait; wait";
/// s6 finds its programs in /usr/bin only.
const S6: &str = "mount -t overlay -o lowerdir=/parts/usr:/usr overlay /usr && mkdir -p /tmp/scan/app \
                  && cp /conf/s6-run /tmp/scan/app/run && exec s6-svscan /tmp/scan";

macro_rules! under {
    ($($init:literal),* ; $($program:expr),*) => { &[$($init),*, $($program),*] };
}

#[rustfmt::skip]
const PROGRAMS: &[Case] = &[
    case("python", 7101, "SIGTERM", PYTHON, (Warn, "does not handle SIGTERM, and runs on"), Killed),
    case("python-drains", 7102, "SIGTERM", PYTHON_DRAINS, (Fine, "handles SIGTERM"), Served),
    case("node", 7111, "SIGTERM", NODE, (Unknown, "is then killed at the end"), Killed),
    case("node-drains", 7112, "SIGTERM", NODE_DRAINS, (Unknown, "check that the program has process.on"), Served),
    with(Nothing, case("go", 0, "SIGTERM", DHCP, (Unknown, "runs on Go"), Cut)),
    with(Nothing, case("go-quit", 0, "SIGQUIT", DHCP, (Warn, "prints its goroutines"), Cut)),
    case("shell", 7121, "SIGTERM", &["sh", "-c", SCRIPT],
        (Warn, "ebb.dev/stop-signal: shell=SIGTERM and ebb.dev/stop-signal-to: children"), Killed),
    case("bash", 7122, "SIGTERM", &["bash", "-c", SCRIPT], (Warn, "does not pass SIGTERM on to python3.11"), Killed),
    case("shell-exec", 7123, "SIGTERM", &["sh", "-c", EXEC], (Fine, "handles SIGTERM"), Served),
    case("shell-trap", 7124, "SIGTERM", &["bash", "-c", TRAP], (Unknown, "traps SIGTERM"), Served),
    case("tini", 7131, "SIGTERM", under!("tini", "--"; "python3", "/conf/server.py", "PORT", "drain"),
        (Fine, "tini passes SIGTERM on, and python3.11 handles SIGTERM"), Served),
    case("tini-shell", 7132, "SIGTERM", under!("tini", "--"; "sh", "-c", SCRIPT),
        (Warn, "python3.11 gets no signal"), Cut),
    case("tini-python", 7133, "SIGTERM", under!("tini", "--"; "python3", "/conf/server.py", "PORT"),
        (Warn, "does not handle SIGTERM, and ends at once"), Cut),
    case("tini-node", 7134, "SIGTERM", under!("tini", "--"; "node", "/conf/server.js", "PORT"),
        (Unknown, "it ends at once"), Cut),
    case("dumb-init", 7141, "SIGTERM", under!("dumb-init"; "python3", "/conf/server.py", "PORT", "drain"),
        (Fine, "dumb-init passes SIGTERM on"), Served),
    case("dumb-init-shell", 7142, "SIGTERM", under!("dumb-init"; "sh", "-c", SCRIPT), (Warn, "ends the shell"), Cut),
    case("catatonit", 7151, "SIGTERM", under!("catatonit", "--"; "python3", "/conf/server.py", "PORT", "drain"),
        (Fine, "catatonit passes SIGTERM on"), Served),
    case("s6", 7161, "SIGTERM", &["sh", "-c", S6], (Fine, "passes SIGTERM on"), Served),
];

impl Case {
    fn container(&self, files: &Path) -> ContainerSpec {
        let port = self.port.to_string();
        let words: Vec<String> = self
            .command
            .iter()
            .map(|w| w.replace("PORT", &port))
            .collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut spec = ContainerSpec::host(self.name, self.signal, &words)
            .mount(files, "/conf")
            .env("PYTHONPATH", "/parts/gunicorn")
            .env("PYTHONDONTWRITEBYTECODE", "1");
        if self.command.contains(&S6) {
            spec.security.add.push("SYS_ADMIN".into());
        }
        match self.client {
            // PostgreSQL refuses to run as root.
            Postgres => spec.user(33),
            _ => spec,
        }
    }

    /// Begins what is under way at the stop. The task tells whether it was served.
    async fn begin(&self, pod: &StartedPod) -> Result<JoinHandle<bool>> {
        let address = pod.v4(self.port)?;
        Ok(match self.client {
            Http => tokio::spawn(async move {
                let reply = timeout(SOON, http::get(address, "/slow?ms=3000")).await;
                reply.is_ok_and(|reply| reply.is_ok_and(|r| r.status.is_success()))
            }),
            Postgres => {
                let config = format!(
                    "host={} port={} user=www-data dbname=postgres",
                    address.ip(),
                    address.port()
                );
                let (client, connection) = tokio_postgres::connect(&config, NoTls).await?;
                tokio::spawn(async move {
                    // The client leaves when the task ends.
                    let _client = client;
                    let ended = timeout(SOON, connection).await;
                    ended.is_err()
                })
            }
            Nothing => tokio::spawn(async { true }),
        })
    }
}

/// Copies the files of the cases, with the port of one of them.
fn files(parent: &Path, case: &Case) -> Result<PathBuf> {
    let target = directory(parent, case.name)?;
    for entry in fs::read_dir(FILES)? {
        let entry = entry?;
        let text = fs::read_to_string(entry.path())?;
        let to = target.join(entry.file_name());
        fs::write(&to, text.replace("PORT", &case.port.to_string()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
    }
    Ok(target)
}

/// Runs the cases in one pod, and compares what the doctor says and how the stops end with what the cases say.
async fn check_all(scene: Scene, name: &str, cases: &[Case]) -> Result<()> {
    let parent = scene.directory("conf")?;
    let mut spec = PodSpec::new(name).container(server("backend", 7000));
    for case in cases {
        spec = spec.container(case.container(&files(&parent, case)?));
    }
    if cases.iter().any(|case| case.command == FPM) {
        let front = &["nginx", "-e", "stderr", "-c", "/conf/front.conf"];
        let front = ContainerSpec::host("front", "SIGQUIT", front);
        spec = spec.container(front.mount(files(&parent, &cases[0])?, "/conf"));
    }
    let agent = scene.agent(&[]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.run(spec).await?;
    for case in cases.iter().filter(|case| case.client != Nothing) {
        let open = http::until_open(pod.v4(case.port)?, SOON * 2).await;
        open.with_context(|| format!("{} does not listen: {}", case.name, pod.log(case.name)))?;
    }

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

    let begun = try_join_all(cases.iter().map(|case| case.begin(&pod))).await?;
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
    let container = |case: &Case| anyhow::Ok(case.container(&files(&parent, case)?));
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
        .container(server("backend", 7000))
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
