//! `churn`: what a server and its clients notice when each request has a connection of its own.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{JoinHandle, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    bpf::Own,
    ebb::Agent,
    figures::{AtLeast, AtMost, Figures, Target},
    lab::Lab,
    load::{self, Connections, Load},
    netns, say, stats,
};

/// How long after its start a helper is let alone, and nothing likewise: what starting costs is another figure.
const SETTLE: Duration = Duration::from_secs(1);

/// What runs beside the load.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nothing,
    Ebb,
    Empty,
    Peer,
    Ss,
}

/// Rounds of all five, every other one backwards: what drifts does so for all.
pub(crate) fn measure(lab: &Lab, figures: &mut Figures) -> Result<()> {
    let (nginx, server) = lab.nginx()?;
    let pid = lab.sandbox_pid(&nginx)?;
    say(
        "a connection per request: nginx and wrk with nothing, ebb, an empty program, a classic tool, and ss beside them, in turn",
    );
    let mut order = [
        Beside::Nothing,
        Beside::Ebb,
        Beside::Empty,
        Beside::Peer,
        Beside::Ss,
    ];
    let mut loads: [Vec<Load>; 5] = Default::default();
    load::wrk(lab, server, Connections::Close, Duration::from_secs(1))?;
    for _ in 0..lab.extent.pairs {
        for beside in order {
            let helper = Helper::start(lab, beside, pid, server.port())?;
            sleep(SETTLE);
            let load = load::wrk(lab, server, Connections::Close, lab.extent.window)?;
            helper.stop()?;
            loads[beside as usize].push(load);
        }
        order.reverse();
    }
    lab.end(&nginx)?;
    let rps = |beside: Beside| column(&loads[beside as usize], |l| l.rps);
    let cpu = |beside: Beside| column(&loads[beside as usize], |l| l.cpu_us);
    let off = Beside::Nothing;
    let what = "requests per second with nothing beside";
    figures.add(
        "churn.rps",
        stats::median(&rps(off))?,
        "/s",
        what,
        Target::None,
    )?;
    let what = "CPU time of a request with nothing beside, of all processes of the node";
    figures.add(
        "churn.cpu_us",
        stats::median(&cpu(off))?,
        "µs",
        what,
        Target::None,
    )?;
    for (beside, rps_key, cpu_key, name, targets) in [
        (
            Beside::Ebb,
            "churn.rps_ratio",
            "churn.cpu_ratio",
            "the agent",
            (AtLeast(0.98), AtMost(1.05)),
        ),
        (
            Beside::Empty,
            "churn.empty_rps_ratio",
            "churn.empty_cpu_ratio",
            "an empty program at the same hook, once",
            (Target::None, Target::None),
        ),
        (
            Beside::Peer,
            "churn.peer_rps_ratio",
            "churn.peer_cpu_ratio",
            "an event and a line for each state change (after tcpstates)",
            (Target::None, Target::None),
        ),
        (
            Beside::Ss,
            "churn.ss_rps_ratio",
            "churn.ss_cpu_ratio",
            "`ss -tin` once a second in the pod's namespace",
            (Target::None, Target::None),
        ),
    ] {
        let what = format!("requests per second ÷ nothing: {name}");
        let ratio = stats::ratio(&rps(beside), &rps(off))?;
        figures.add(rps_key, ratio, "", what, targets.0)?;
        let what = format!("CPU time of a request ÷ nothing: {name}");
        let ratio = stats::ratio(&cpu(beside), &cpu(off))?;
        figures.add(cpu_key, ratio, "", what, targets.1)?;
    }
    Ok(())
}

fn column(loads: &[Load], f: fn(&Load) -> f64) -> Vec<f64> {
    loads.iter().map(f).collect()
}

enum Helper {
    Nothing,
    Ebb(Agent),
    Empty(Box<Own>),
    Peer(Child),
    Ss(Arc<AtomicBool>, JoinHandle<Result<()>>),
}

impl Helper {
    fn start(lab: &Lab, beside: Beside, pid: u32, port: u16) -> Result<Self> {
        Ok(match beside {
            Beside::Nothing => Self::Nothing,
            Beside::Ebb => Self::Ebb(lab.agent()?),
            Beside::Empty => {
                let mut own = Own::load(port)?;
                own.attach_empty()?;
                Self::Empty(Box::new(own))
            }
            Beside::Peer => Self::Peer(start_peer()?),
            Beside::Ss => {
                let stop = Arc::new(AtomicBool::new(false));
                let told = Arc::clone(&stop);
                Self::Ss(stop, std::thread::spawn(move || ss_loop(pid, &told)))
            }
        })
    }

    fn stop(self) -> Result<()> {
        match self {
            Self::Nothing => Ok(()),
            Self::Ebb(agent) => agent.stop(),
            // Its programs are detached with it.
            Self::Empty(own) => {
                drop(own);
                Ok(())
            }
            Self::Peer(mut child) => {
                child.kill()?;
                child.wait()?;
                Ok(())
            }
            Self::Ss(stop, thread) => {
                stop.store(true, Ordering::Relaxed);
                thread
                    .join()
                    .unwrap_or_else(|_| anyhow::bail!("the ss loop panicked"))
            }
        }
    }
}

fn start_peer() -> Result<Child> {
    let me = std::env::current_exe().context("can't tell which program this is")?;
    let mut child = Command::new(me)
        .arg("peer")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting the peer")?;
    let stderr = child.stderr.take().context("the peer has no output")?;
    let mut line = String::new();
    BufReader::new(stderr).read_line(&mut line)?;
    ensure!(line == "ready\n", "the peer did not start: {line}");
    Ok(child)
}

fn ss_loop(pid: u32, stop: &AtomicBool) -> Result<()> {
    netns::inside(pid, || {
        while !stop.load(Ordering::Relaxed) {
            let started = Instant::now();
            let status = ss(&["-tin"]).stdout(Stdio::null()).status();
            ensure!(status.context("starting ss")?.success(), "ss failed");
            while started.elapsed() < Duration::from_secs(1) && !stop.load(Ordering::Relaxed) {
                sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    })
}

/// iproute2's list of sockets.
pub(crate) fn ss(flags: &[&str]) -> Command {
    let mut command = Command::new("ss");
    command.args(flags).stdin(Stdio::null());
    command
}
