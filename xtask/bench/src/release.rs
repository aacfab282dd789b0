//! `release`: the time from the last close of a pod's connections to the end of its hold.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb_testkit::kubelet::PodSpec;
use serde_json::Value;

use crate::{
    beside::wait_connection,
    ebb::AgentProcess,
    idle_conns::SinkPod,
    netns,
    results::{AtMost, BenchResults, Goal},
    say, stats,
    testbed::Testbed,
};

const PORT: u16 = 8080;

/// How long a pod is held before the bench closes its last connection: longer than the first dumps take.
const HELD_FOR: Duration = Duration::from_millis(150);

/// How long a wait may take to begin a drain.
const BEGINS_WITHIN: Duration = Duration::from_secs(10);

/// How long a wait may take to return.
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);

/// The latencies of a release, in microseconds.
struct MeasuredRelease {
    /// From the kernel's time stamp of the last close to the release, by ebb's report.
    lag: f64,
    /// From the client's close to the first byte of the reply to `/v1/wait`, the server's close and all wake-ups included.
    outside: f64,
}

/// Each release uses a new pod: the agent answers a second hold of the same pod from its history.
pub(crate) fn measure(testbed: &Testbed, results: &mut BenchResults) -> Result<()> {
    let sinks = SinkPod::start(testbed, "others", testbed.scale.others)?;
    let others = sinks.dial(testbed, testbed.scale.others)?;
    say(&format!(
        "{} releases with {} other connections open: the last client closes, `/v1/wait` returns",
        testbed.scale.releases, testbed.scale.others
    ));
    let agent = testbed.agent()?;
    let mut released = Vec::new();
    for i in 0..testbed.scale.releases {
        let one = one(testbed, &agent, &format!("release-{i}"));
        released.push(one.with_context(|| format!("release {i}"))?);
    }
    agent.stop()?;
    drop(others);
    testbed.end(&sinks.pod)?;

    let lags: Vec<f64> = released.iter().map(|r| r.lag).collect();
    let outside: Vec<f64> = released.iter().map(|r| r.outside).collect();
    for (key, values, p, what, target) in [
        (
            "release.p50_us",
            &lags,
            0.5,
            "last close, by the kernel's time stamp, to release",
            AtMost(300.0),
        ),
        ("release.p99_us", &lags, 0.99, "…", AtMost(3000.0)),
        (
            "release.outside_p50_us",
            &outside,
            0.5,
            "close() of the client to the first byte of the reply to the wait",
            Goal::None,
        ),
        ("release.outside_p99_us", &outside, 0.99, "…", Goal::None),
    ] {
        results.add(key, stats::percentile(values, p)?, "µs", what, target)?;
    }
    let (n, others) = (testbed.scale.releases as f64, testbed.scale.others as f64);
    results.add("release.releases", n, "", "releases", Goal::None)?;
    let what = "other connections open on the node";
    results.add("release.others", others, "", what, Goal::None)
}

fn one(testbed: &Testbed, agent: &AgentProcess, name: &str) -> Result<MeasuredRelease> {
    // Without a settle phase, which is not measured.
    let pod = testbed.run(&PodSpec::new(name).annotation("ebb.dev/quiet", "0s"))?;
    let pid = testbed.sandbox_pid(&pod)?;
    let listener = netns::inside(pid, || {
        Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?)
    })?;
    let waiting = wait_connection(testbed, pid)?;
    let client = TcpStream::connect(pod.v4(PORT)?)?;
    let (served, _) = listener.accept()?;
    // The pod's server closes when its client has.
    let server = thread::spawn(move || {
        let mut served = served;
        let _ = served.read(&mut [0]);
    });
    let caller = thread::spawn(move || wait(waiting, ANSWERS_WITHIN));
    until_draining(agent, name)?;
    sleep(HELD_FOR);
    ensure!(!caller.is_finished(), "the pod was not held");
    let closed = Instant::now();
    drop(client);
    let (answered, report) = caller
        .join()
        .unwrap_or_else(|_| anyhow::bail!("the caller panicked"))?;
    let _ = server.join();
    drop(listener);
    testbed.end(&pod)?;
    ensure!(report["reason"] == "drained", "not drained: {report}");
    let lag = report["release_lag_us"].as_f64();
    Ok(MeasuredRelease {
        lag: lag.with_context(|| format!("no release_lag_us: {report}"))?,
        outside: answered.duration_since(closed).as_secs_f64() * 1e6,
    })
}

/// Waits until the pod drains. The agent may discover a new pod with a delay, and the wait begins after that.
pub(crate) fn until_draining(agent: &AgentProcess, name: &str) -> Result<()> {
    let started = Instant::now();
    loop {
        let output = agent.query(&["drains", "-o", "json"]).output()?;
        let list: Value = serde_json::from_slice(&output.stdout).context("ebb drains")?;
        let drains = list["drains"].as_array().context("no drains")?;
        if drains
            .iter()
            .any(|d| d["pod"]["name"] == name && d["phase"] == "drain")
        {
            return Ok(());
        }
        ensure!(
            started.elapsed() < BEGINS_WITHIN,
            "no drain of {name} begins"
        );
        sleep(Duration::from_millis(20));
    }
}

/// Sends `GET /v1/wait` and returns the time of the reply's first byte, and its JSON.
pub(crate) fn wait(mut stream: TcpStream, within: Duration) -> Result<(Instant, Value)> {
    stream.set_read_timeout(Some(within))?;
    stream.write_all(b"GET /v1/wait HTTP/1.1\r\nHost: ebb\r\nConnection: close\r\n\r\n")?;
    let mut first = [0];
    stream.read_exact(&mut first)?;
    let answered = Instant::now();
    let mut rest = String::new();
    stream.read_to_string(&mut rest)?;
    let (head, body) = rest.split_once("\r\n\r\n").context("not an HTTP reply")?;
    ensure!(head.contains(" 200 "), "{head}: {body}");
    Ok((answered, serde_json::from_str(body)?))
}
