//! Tests of the node: pods run in it, and it leaves nothing behind.
//!
//! Every trial starts this executable again as the outer process of a new sandbox, runs one scenario in it, and then
//! checks the machine.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebb_testkit::clients::{ClientKind, ClientLoad, Clients, RequestCounts};
use ebb_testkit::kubelet::{ContainerSpec, PodSpec, PreStop};
use ebb_testkit::{Node, helpers, http, sandbox};
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::process::{Pid, Signal, kill_process};

const SCENARIO: &str = "EBB_NODE_TEST_SCENARIO";
const SECOND: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    if let Some(code) = helpers::dispatch() {
        return code;
    }
    if let Ok(name) = std::env::var(SCENARIO) {
        return sandbox::inside(|| run(&name));
    }
    let trials = vec![
        Trial::test(
            "pods_of_two_containers_answer_on_both_families_and_stop_fast",
            || ends_well("pods"),
        ),
        Trial::test("a_host_network_pod_answers_on_the_nodes_addresses", || {
            ends_well("host_network")
        }),
        Trial::test("pods_outlive_a_stopped_and_a_killed_containerd", || {
            ends_well("containerd")
        }),
        Trial::test(
            "the_time_of_a_pre_stop_hook_is_subtracted_from_the_grace_period",
            || ends_well("pre_stop"),
        ),
        Trial::test("clients_count_every_request_that_is_cut_off", || {
            ends_well("clients")
        }),
        Trial::test("an_interrupted_run_leaves_nothing", interrupted),
        Trial::test(
            "a_killed_run_leaves_no_process_and_the_next_run_removes_the_rest",
            killed,
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Runs a scenario, inside the sandbox.
fn run(name: &str) -> ExitCode {
    let runtime = tokio::runtime::Runtime::new().expect("a machine with threads");
    let result = runtime.block_on(async {
        match name {
            "pods" => pods().await,
            "host_network" => host_network().await,
            "containerd" => containerd().await,
            "pre_stop" => pre_stop().await,
            "clients" => clients().await,
            _ => linger().await,
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn pods() -> Result<()> {
    let begun = Instant::now();
    let node = Node::start().await?;
    eprintln!("node ready after {:?}", begun.elapsed());
    let kubelet = node.kubelet()?;
    let web = node.directory("web")?;
    fs::write(web.join("index.html"), "from a mount\n")?;
    let spec = PodSpec::new("web")
        .annotation("ebb.dev/until", "idle")
        .container(ContainerSpec::nginx("nginx").mount(&web, "/usr/share/nginx/html"))
        .container(ContainerSpec::fixture("app", &["serve", "--port", "8080"]));
    let begun = Instant::now();
    let pod = kubelet.run(&spec).await?;
    eprintln!("pod started in {:?}: {:?}", begun.elapsed(), pod.ips);
    for (address, body) in [
        (pod.v4(80)?, "from a mount\n"),
        (pod.v6(80)?, "from a mount\n"),
        (pod.v4(8080)?, "ok\n"),
        (pod.v6(8080)?, "ok\n"),
    ] {
        http::until_open(address, 5 * SECOND).await?;
        ensure!(
            http::get(address, "/").await?.body == body,
            "{address} does not answer {body:?}"
        );
    }

    let app = pod.container("app")?;
    let command = ["/usr/bin/ebb-fixture", "get", "http://127.0.0.1:80/"];
    let output = kubelet.exec(app, &command, 5 * SECOND).await?;
    ensure!(
        output.stdout == b"from a mount\n",
        "exec in the pod: {output:?}"
    );
    let procs = fs::read_to_string(pod.container_cgroup(app).join("cgroup.procs"))?;
    let pid = kubelet.pid(app).await?;
    ensure!(
        procs.lines().any(|line| line == pid.to_string()),
        "{pid} is not among {procs:?}"
    );

    let second = kubelet
        .run(&PodSpec::new("other").container(ContainerSpec::nginx("nginx")))
        .await?;
    ensure!(
        second.ips != pod.ips && second.ips.len() == 2,
        "addresses {:?}",
        second.ips
    );

    let stop = kubelet.stop(&pod, 30 * SECOND).await;
    eprintln!("{stop:?}");
    ensure!(stop.error().is_none(), "{stop:?}");
    ensure!(stop.took < 2 * SECOND, "stopping took {:?}", stop.took);
    ensure!(
        http::get(pod.v4(80)?, "/").await.is_err(),
        "a stopped pod answers"
    );
    kubelet.remove(&pod).await?;
    ensure!(!pod.cgroup().exists(), "{} is left", pod.cgroup().display());
    Ok(())
}

async fn host_network() -> Result<()> {
    let node = Node::start().await?;
    let kubelet = node.kubelet()?;
    let spec = PodSpec::new("agent")
        .host_network()
        .container(ContainerSpec::fixture(
            "app",
            &["serve", "--port", "8099", "--dual"],
        ));
    let pod = kubelet.run(&spec).await?;
    for address in [pod.v4(8099)?, pod.v6(8099)?] {
        http::until_open(address, 5 * SECOND).await?;
        ensure!(http::get(address, "/").await?.body == "ok\n");
    }
    ensure!(kubelet.stop(&pod, SECOND).await.error().is_none());
    Ok(())
}

async fn containerd() -> Result<()> {
    let mut node = Node::start().await?;
    let kubelet = node.kubelet()?;
    let pod = kubelet
        .run(&PodSpec::new("web").container(ContainerSpec::nginx("nginx")))
        .await?;
    http::until_open(pod.v4(80)?, 5 * SECOND).await?;
    let pid = kubelet.pid(pod.container("nginx")?).await?;
    for kill in [false, true] {
        let containerd = node.containerd();
        if kill {
            containerd.kill().await?
        } else {
            containerd.stop().await?
        };
        ensure!(
            kubelet.is_ready().await.is_err(),
            "containerd answers after its end"
        );
        http::get(pod.v4(80)?, "/").await?;
        node.containerd().resume().await?;
        ensure!(
            kubelet.pid(pod.container("nginx")?).await? == pid,
            "the container was started anew"
        );
    }
    ensure!(kubelet.stop(&pod, 5 * SECOND).await.error().is_none());
    Ok(())
}

async fn pre_stop() -> Result<()> {
    let node = Node::start().await?;
    let kubelet = node.kubelet()?;
    let hook = |path: &str| PreStop::HttpGet {
        port: 8080,
        path: path.into(),
    };
    let spec = PodSpec::new("web")
        .container(ContainerSpec::fixture("app", &["serve"]))
        .container(ContainerSpec::nginx("quick").pre_stop(hook("/slow?ms=1200")));
    let pod = kubelet.run(&spec).await?;
    http::until_open(pod.v4(8080)?, 5 * SECOND).await?;
    let mut only_nginx = pod.clone();
    only_nginx
        .containers
        .retain(|container| container.name == "quick");
    let stop = kubelet.stop(&only_nginx, 10 * SECOND).await;
    let nginx = stop
        .containers
        .first()
        .context("no container was stopped")?;
    ensure!(nginx.timeout == 9 * SECOND, "{stop:?}");
    ensure!(
        nginx
            .pre_stop
            .as_ref()
            .is_some_and(|(_, result)| result.is_ok()),
        "{stop:?}"
    );
    Ok(())
}

/// A pod with a one-by-one server and a server that exits at once on SIGTERM: the clients count every connection that
/// is cut off.
async fn clients() -> Result<()> {
    let node = Node::start().await?;
    let kubelet = node.kubelet()?;
    let spec = PodSpec::new("web")
        .container(ContainerSpec::fixture("app", &["serve", "--port", "8080"]))
        .container(ContainerSpec::fixture(
            "queue",
            &["serve", "--port", "8081", "--one-by-one", "--delay", "300"],
        ));
    let pod = kubelet.run(&spec).await?;
    let (app, queue) = (pod.v4(8080)?, pod.v4(8081)?);
    http::until_open(app, 5 * SECOND).await?;
    http::until_open(queue, 5 * SECOND).await?;

    let mut served = Clients::new();
    served.start(
        app,
        ClientLoad::Slow {
            path: "/slow?ms=200".into(),
            clients: 3,
        },
    );
    served.start(
        app,
        ClientLoad::Download {
            path: "/stream?chunks=5&ms=20".into(),
            rate: None,
            clients: 2,
        },
    );
    served.start(
        app,
        ClientLoad::Idle {
            path: "/".into(),
            quiet: SECOND / 5,
            clients: 2,
        },
    );
    served.start(
        queue,
        ClientLoad::Backlog {
            path: "/".into(),
            clients: 3,
        },
    );
    let every = Duration::from_millis(20);
    served.start(
        app,
        ClientLoad::Stale {
            path: "/".into(),
            every,
            during: SECOND / 5,
        },
    );
    let tallies = served.finish().await;
    let sum = RequestCounts::sum(tallies.values());
    ensure!(
        sum.failed == 0 && sum.requests >= 3 + 2 + 4 + 3 + 5,
        "{tallies:?}"
    );
    ensure!(tallies.len() == 5, "{tallies:?}");

    let mut cut = Clients::new();
    cut.start(
        app,
        ClientLoad::Slow {
            path: "/slow?ms=20000".into(),
            clients: 3,
        },
    );
    cut.start(
        app,
        ClientLoad::Download {
            path: "/stream?chunks=100&ms=200".into(),
            rate: None,
            clients: 2,
        },
    );
    cut.start(
        app,
        ClientLoad::Idle {
            path: "/".into(),
            quiet: 2 * SECOND,
            clients: 2,
        },
    );
    cut.start(
        queue,
        ClientLoad::Backlog {
            path: "/".into(),
            clients: 8,
        },
    );
    cut.in_place().await;
    cut.start(
        app,
        ClientLoad::Stale {
            path: "/".into(),
            every,
            during: SECOND,
        },
    );
    let stop = kubelet.stop(&pod, 10 * SECOND).await;
    ensure!(stop.took < 2 * SECOND, "{stop:?}");
    let tallies = cut.finish().await;
    eprintln!("{tallies:#?}");
    ensure!(
        tallies[&ClientKind::Slow].failed == 3 && tallies[&ClientKind::Download].failed == 2,
        "{tallies:?}"
    );
    ensure!(
        tallies[&ClientKind::Idle].closed_idle + tallies[&ClientKind::Idle].failed == 2,
        "{tallies:?}"
    );
    ensure!(
        tallies[&ClientKind::Stale].failed > 0 && tallies[&ClientKind::Backlog].failed >= 6,
        "{tallies:?}"
    );
    Ok(())
}

/// Starts a pod, prints `running` and waits for ever.
async fn linger() -> Result<()> {
    let node = Node::start().await?;
    node.kubelet()?
        .run(&PodSpec::new("web").container(ContainerSpec::nginx("nginx")))
        .await?;
    println!("running");
    std::future::pending().await
}

/// Runs a scenario in a new sandbox, and checks what it leaves.
fn ends_well(scenario: &str) -> Result<(), Failed> {
    let interfaces = interfaces();
    let mut child = start(scenario)?;
    let status = child.wait()?;
    if !status.success() {
        return Err(format!("{scenario}: {status}").into());
    }
    nothing_left(child.id())?;
    if interfaces != self::interfaces() {
        return Err("a network interface is left on the machine".into());
    }
    Ok(())
}

fn interrupted() -> Result<(), Failed> {
    let mut child = start_lingering()?;
    signal(&child, Signal::INT)?;
    let status = child.wait()?;
    if status.code() != Some(130) {
        return Err(format!("ended with {status}").into());
    }
    nothing_left(child.id())
}

fn killed() -> Result<(), Failed> {
    let mut child = start_lingering()?;
    signal(&child, Signal::KILL)?;
    child.wait()?;
    let deadline = Instant::now() + 2 * SECOND;
    let processes = || {
        let mut left = sandbox::left_behind(child.id());
        left.retain(|thing| thing.starts_with("process") || thing.starts_with("mount"));
        left
    };
    while !processes().is_empty() {
        if Instant::now() > deadline {
            return Err(format!("left: {:?}", processes()).into());
        }
        sleep(Duration::from_millis(20));
    }
    ends_well("host_network")?;
    nothing_left(child.id())
}

fn start(scenario: &str) -> Result<Child, Failed> {
    Ok(Command::new(std::env::current_exe()?)
        .env(SCENARIO, scenario)
        .stdout(Stdio::piped())
        .spawn()?)
}

fn start_lingering() -> Result<Child, Failed> {
    let mut child = start("linger")?;
    let stdout = child.stdout.take().ok_or("no stdout")?;
    match BufReader::new(stdout).lines().next() {
        Some(Ok(line)) if line == "running" => Ok(child),
        other => Err(format!("the run did not start: {other:?}").into()),
    }
}

fn signal(child: &Child, signal: Signal) -> Result<(), Failed> {
    let pid = Pid::from_raw(child.id().cast_signed()).ok_or("no pid")?;
    Ok(kill_process(pid, signal)?)
}

fn nothing_left(outer: u32) -> Result<(), Failed> {
    let left = sandbox::left_behind(outer);
    if left.is_empty() {
        Ok(())
    } else {
        Err(format!("left behind: {left:#?}").into())
    }
}

fn interfaces() -> BTreeSet<String> {
    let entries = fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
