//! What runs beside a load: how the bench starts and stops it.

use std::{
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{JoinHandle, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb_testkit::kubelet::{PodSpec, StartedPod};

use crate::{bpf::BenchPrograms, ebb::AgentProcess, netns, release, testbed::Testbed};

/// The port of the draining pod's server.
const PORT: u16 = 8080;

/// Longer than a load lasts.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// What runs beside the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beside {
    Nothing,
    /// ebb's agent.
    Ebb,
    /// ebb's agent while another pod, without load, drains.
    Draining,
    /// An empty program at the hook that ebb uses.
    Empty,
    /// [`crate::tcpstates`]: an event per state change.
    Tcpstates,
    /// `ss -tin` once a second in the network namespace of the process with this pid.
    Ss(u32),
}

/// A started [`Beside`]. Dropping it stops what it started.
pub(crate) enum Helper {
    Nothing,
    Ebb(AgentProcess),
    Draining(AgentProcess, JoinHandle<()>),
    Empty(Box<BenchPrograms>),
    Tcpstates(Child),
    Ss(Arc<AtomicBool>, JoinHandle<Result<()>>),
}

impl Helper {
    pub(crate) fn start(testbed: &Testbed, beside: Beside, draining: &DrainingPod) -> Result<Self> {
        Ok(match beside {
            Beside::Nothing => Self::Nothing,
            Beside::Ebb => Self::Ebb(testbed.agent()?),
            Beside::Draining => {
                let agent = testbed.agent()?;
                let held = draining.hold(testbed, &agent)?;
                Self::Draining(agent, held)
            }
            Beside::Empty => {
                let mut programs = BenchPrograms::load(0)?;
                programs.attach_empty()?;
                Self::Empty(Box::new(programs))
            }
            Beside::Tcpstates => Self::Tcpstates(start_tcpstates()?),
            Beside::Ss(pid) => {
                let stop = Arc::new(AtomicBool::new(false));
                let stopped = Arc::clone(&stop);
                Self::Ss(stop, std::thread::spawn(move || ss_loop(pid, &stopped)))
            }
        })
    }

    pub(crate) fn stop(self) -> Result<()> {
        match self {
            // Dropping it detaches its programs.
            Self::Nothing | Self::Empty(_) => Ok(()),
            Self::Ebb(agent) => agent.stop(),
            Self::Draining(agent, held) => {
                ensure!(!held.is_finished(), "the other pod's drain ended early");
                agent.stop()?;
                let _ = held.join();
                Ok(())
            }
            Self::Tcpstates(mut child) => {
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

/// A pod with one open connection, so that its drain does not end.
pub(crate) struct DrainingPod {
    pod: StartedPod,
    pid: u32,
    _connection: (TcpStream, TcpStream),
}

impl DrainingPod {
    /// Runs the pod and connects to it.
    pub(crate) fn start(testbed: &Testbed) -> Result<Self> {
        let spec = PodSpec::new("draining").annotation("ebb.dev/quiet", "0s");
        let pod = testbed.run(&spec)?;
        let pid = testbed.sandbox_pid(&pod)?;
        let listener = netns::inside(pid, || {
            Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?)
        })?;
        let client = TcpStream::connect(pod.v4(PORT)?)?;
        let (served, _) = listener.accept()?;
        Ok(Self {
            pod,
            pid,
            _connection: (client, served),
        })
    }

    /// Makes the agent hold the pod, and returns once it drains. The returned thread ends with the hold.
    fn hold(&self, testbed: &Testbed, agent: &AgentProcess) -> Result<JoinHandle<()>> {
        let waiting = wait_connection(testbed, self.pid)?;
        let held = std::thread::spawn(move || {
            // The wait ends when the agent does.
            let _ = release::wait(waiting, WAIT_TIMEOUT);
        });
        release::until_draining(agent, &self.pod.spec.name)?;
        Ok(held)
    }

    pub(crate) fn end(self, testbed: &Testbed) -> Result<()> {
        testbed.end(&self.pod)
    }
}

/// Connects to the agent's node port from the network namespace of a pod's process.
pub(crate) fn wait_connection(testbed: &Testbed, pid: u32) -> Result<TcpStream> {
    let address: SocketAddr = testbed.node_port();
    netns::inside(pid, || Ok(TcpStream::connect(address)?))
}

fn start_tcpstates() -> Result<Child> {
    let me = std::env::current_exe().context("can't find this program's own path")?;
    let mut child = Command::new(me)
        .arg("tcpstates")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting tcpstates")?;
    let stderr = child.stderr.take().context("tcpstates has no stderr")?;
    let mut line = String::new();
    BufReader::new(stderr).read_line(&mut line)?;
    ensure!(line == "ready\n", "tcpstates did not start: {line}");
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

/// iproute2's `ss` with these flags.
pub(crate) fn ss(flags: &[&str]) -> Command {
    let mut command = Command::new("ss");
    command.args(flags).stdin(Stdio::null());
    command
}
