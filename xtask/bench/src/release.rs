//! `release`: from the last close of a pod's connections to the end of its hold.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb_node::kubelet::PodSpec;
use serde_json::Value;

use crate::{
    crowd::Crowd,
    ebb::Agent,
    figures::{AtMost, Figures, Target},
    lab::Lab,
    netns, say, stats,
};

const PORT: u16 = 8080;

/// How long a hold waits before its last connection is closed: it is past its first looks then.
const HELD_FOR: Duration = Duration::from_millis(150);

/// How long a wait may take to become a drain.
const BEGINS_WITHIN: Duration = Duration::from_secs(10);

/// A release, in microseconds.
struct Released {
    /// From the kernel's stamp on the last close, by ebb's own report.
    lag: f64,
    /// From the client's close to the answer of `/v1/wait`, the server's own close and all wake-ups included.
    outside: f64,
}

/// Each release is that of a pod of its own: a second hold of the same pod would be answered from memory.
pub(crate) fn measure(lab: &Lab, figures: &mut Figures) -> Result<()> {
    let crowd = Crowd::start(lab, "others", lab.extent.others)?;
    let others = crowd.dial(lab, lab.extent.others)?;
    say(&format!(
        "{} releases with {} other connections open: the last client closes, `/v1/wait` returns",
        lab.extent.releases, lab.extent.others
    ));
    let agent = lab.agent()?;
    let mut released = Vec::new();
    for i in 0..lab.extent.releases {
        let one = one(lab, &agent, &format!("release-{i}"));
        released.push(one.with_context(|| format!("release {i}"))?);
    }
    agent.stop()?;
    drop(others);
    lab.end(&crowd.pod)?;

    let lags: Vec<f64> = released.iter().map(|r| r.lag).collect();
    let outside: Vec<f64> = released.iter().map(|r| r.outside).collect();
    for (key, values, p, what, target) in [
        (
            "release.p50_us",
            &lags,
            0.5,
            "last close, by the kernel's stamp, to release",
            AtMost(500.0),
        ),
        ("release.p99_us", &lags, 0.99, "…", AtMost(5000.0)),
        (
            "release.outside_p50_us",
            &outside,
            0.5,
            "close() of the client to the answer at the waiting caller",
            Target::None,
        ),
        ("release.outside_p99_us", &outside, 0.99, "…", Target::None),
    ] {
        figures.add(key, stats::percentile(values, p)?, "µs", what, target)?;
    }
    let (n, others) = (lab.extent.releases as f64, lab.extent.others as f64);
    figures.add("release.releases", n, "", "releases", Target::None)?;
    let what = "other connections open on the node";
    figures.add("release.others", others, "", what, Target::None)
}

fn one(lab: &Lab, agent: &Agent, name: &str) -> Result<Released> {
    // Settling is not what is measured.
    let pod = lab.run(&PodSpec::new(name).annotation("ebb.dev/quiet", "0s"))?;
    let pid = lab.sandbox_pid(&pod)?;
    let (listener, waiting) = netns::inside(pid, || {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
        Ok((listener, TcpStream::connect(lab.node_port())?))
    })?;
    let client = TcpStream::connect(pod.v4(PORT)?)?;
    let (served, _) = listener.accept()?;
    // The pod's server: it closes when its client has.
    let server = thread::spawn(move || {
        let mut served = served;
        let _ = served.read(&mut [0]);
    });
    let caller = thread::spawn(move || wait(waiting));
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
    lab.end(&pod)?;
    ensure!(report["reason"] == "drained", "not drained: {report}");
    let lag = report["release_lag_us"].as_f64();
    Ok(Released {
        lag: lag.with_context(|| format!("no release_lag_us: {report}"))?,
        outside: answered.duration_since(closed).as_secs_f64() * 1e6,
    })
}

/// The agent looks for a pod that it does not know yet a while after its start: the wait begins then.
fn until_draining(agent: &Agent, name: &str) -> Result<()> {
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

/// GETs `/v1/wait`: the moment of its answer, and the answer.
fn wait(mut stream: TcpStream) -> Result<(Instant, Value)> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(b"GET /v1/wait HTTP/1.1\r\nHost: ebb\r\nConnection: close\r\n\r\n")?;
    let mut first = [0];
    stream.read_exact(&mut first)?;
    let answered = Instant::now();
    let mut rest = String::new();
    stream.read_to_string(&mut rest)?;
    let (head, body) = rest.split_once("\r\n\r\n").context("no HTTP")?;
    ensure!(head.contains(" 200 "), "{head}: {body}");
    Ok((answered, serde_json::from_str(body)?))
}
