//! Runs ebb's agent and proxy, and queries the agent by its command line.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

/// The agent's node port, below the ephemeral ports.
const PORT: u16 = 9690;

const START_WITHIN: Duration = Duration::from_secs(30);

/// A running agent. Dropping it stops it.
pub(crate) struct AgentProcess {
    program: PathBuf,
    socket: PathBuf,
    child: Child,
    /// From the start of the process to its first positive `/readyz`.
    pub(crate) ready_after: Duration,
}

impl AgentProcess {
    /// Starts an agent and waits until it is ready. It serves the node port on loopback and on `addresses`.
    pub(crate) fn start(
        program: &Path,
        runtime: &Path,
        run_dir: &Path,
        kubelet_cgroup: &str,
        addresses: &[SocketAddr],
    ) -> Result<Self> {
        let local = SocketAddr::from(([127, 0, 0, 1], PORT));
        let mut command = Command::new(program);
        command
            .arg("agent")
            .arg("--cri-socket")
            .arg(runtime)
            .arg("--run-dir")
            .arg(run_dir)
            .args(["--kube", "off", "--kubelet-cgroup", kubelet_cgroup]);
        for address in std::iter::once(&local).chain(addresses) {
            command.arg("--http").arg(address.to_string());
        }
        let started = Instant::now();
        let child = spawn(&mut command)?;
        let mut agent = Self {
            program: program.to_owned(),
            socket: run_dir.join("agent.sock"),
            child,
            ready_after: Duration::ZERO,
        };
        while !is_ready(local) {
            agent.still_runs()?;
            ensure!(started.elapsed() < START_WITHIN, "the agent is not ready");
            sleep(Duration::from_millis(1));
        }
        agent.ready_after = started.elapsed();
        Ok(agent)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory, in bytes.
    pub(crate) fn resident(&self) -> Result<f64> {
        resident(self.pid())
    }

    /// Resident memory that is not mapped from a file, in bytes. File pages, such as the program's, may be shared.
    pub(crate) fn private(&self) -> Result<f64> {
        memory(self.pid(), "RssAnon:")
    }

    /// The command `ebb VERB…`, not started.
    pub(crate) fn query(&self, verb: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(verb)
            .arg("--agent")
            .arg(&self.socket)
            .stdin(Stdio::null());
        command
    }

    /// Stops it by SIGTERM.
    pub(crate) fn stop(mut self) -> Result<()> {
        stop(&mut self.child)
    }

    fn still_runs(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the agent ended with {status}; its log is above"),
        }
    }
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        let _ = stop(&mut self.child);
    }
}

/// A running proxy. Dropping it stops it.
pub(crate) struct ProxyProcess {
    pub(crate) socket: PathBuf,
    child: Child,
}

impl ProxyProcess {
    /// Starts a proxy in front of `runtime`, with its socket in `directory`, and waits until it listens.
    pub(crate) fn start(
        program: &Path,
        runtime: &Path,
        agent: &Path,
        directory: &Path,
    ) -> Result<Self> {
        let socket = directory.join("cri.sock");
        let mut command = Command::new(program.with_file_name("ebb-cri-proxy"));
        for (flag, path) in [
            ("--listen", &*socket),
            ("--runtime", runtime),
            ("--agent", agent),
        ] {
            command.arg(flag).arg(path);
        }
        let child = spawn(&mut command)?;
        let mut proxy = Self { socket, child };
        let started = Instant::now();
        // The socket file exists a moment before it accepts connections.
        while UnixStream::connect(&proxy.socket).is_err() {
            if let Some(status) = proxy.child.try_wait()? {
                bail!("the proxy ended with {status}; its log is above");
            }
            ensure!(
                started.elapsed() < START_WITHIN,
                "the proxy does not listen"
            );
            sleep(Duration::from_millis(5));
        }
        Ok(proxy)
    }

    /// Resident memory, in bytes.
    pub(crate) fn resident(&self) -> Result<f64> {
        resident(self.child.id())
    }
}

impl Drop for ProxyProcess {
    fn drop(&mut self) {
        let _ = stop(&mut self.child);
    }
}

/// Whether `GET /readyz` returns 200. The agent binds the port before it serves, so an early connection waits.
fn is_ready(address: SocketAddr) -> bool {
    let get = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: ebb\r\nConnection: close\r\n\r\n")?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply)?;
        Ok(reply.starts_with("HTTP/1.1 200"))
    };
    get().unwrap_or(false)
}

fn resident(pid: u32) -> Result<f64> {
    memory(pid, "VmRSS:")
}

/// A field of proc_pid_status(5), in bytes.
fn memory(pid: u32, field: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kib: f64 = kib
        .with_context(|| format!("{path} has no {field}"))?
        .parse()?;
    Ok(kib * 1024.0)
}

fn spawn(command: &mut Command) -> Result<Child> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .env("EBB_LOG", "warn")
        .spawn()
        .with_context(|| format!("starting {}", command.get_program().display()))
}

fn stop(child: &mut Child) -> Result<()> {
    if child.try_wait()?.is_some() {
        return Ok(());
    }
    let pid = i32::try_from(child.id()).ok();
    let pid = pid.and_then(rustix::process::Pid::from_raw);
    let pid = pid.context("a process has no pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    let started = Instant::now();
    while child.try_wait()?.is_none() {
        if started.elapsed() > Duration::from_secs(5) {
            child.kill()?;
            child.wait()?;
            bail!("ebb did not stop within 5 s of SIGTERM");
        }
        sleep(Duration::from_millis(5));
    }
    Ok(())
}
