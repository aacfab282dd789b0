//! Many idle connections: a pod whose containers accept them, and processes that dial them.
//!
//! Both are several, because a process may have only some ten thousand descriptors.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb_testkit::kubelet::{ContainerSpec, PodSpec, StartedPod};
use rustix::net::sockopt::set_socket_linger;

use crate::testbed::Testbed;

/// Connections per port and dialler: below the lowest descriptor limit met and the number of ephemeral ports.
const PER_PROCESS: usize = 17_000;

const FIRST_PORT: u16 = 7001;

/// A pod whose containers accept connections and keep them open.
pub(crate) struct SinkPod {
    pub(crate) pod: StartedPod,
    servers: Vec<SocketAddr>,
}

/// Open connections. Dropping it resets them, which leaves no TIME_WAIT.
pub(crate) struct OpenConns {
    diallers: Vec<(Child, ChildStdin)>,
}

impl SinkPod {
    /// Runs a pod that can accept `most` connections.
    pub(crate) fn start(testbed: &Testbed, name: &str, most: usize) -> Result<Self> {
        let ports: Vec<u16> = (FIRST_PORT..).take(most.div_ceil(PER_PROCESS)).collect();
        let mut spec = PodSpec::new(name);
        for port in &ports {
            let container = format!("sink-{port}");
            spec = spec.container(ContainerSpec::fixture(
                &container,
                &["sink", "--port", &port.to_string()],
            ));
        }
        let pod = testbed.run(&spec)?;
        let servers = ports.iter().map(|port| pod.v4(*port));
        let servers = servers.collect::<Result<Vec<_>>>()?;
        for server in &servers {
            testbed.until_open(*server)?;
        }
        Ok(Self { pod, servers })
    }

    /// Opens `n` connections, and returns when all are established and accepted.
    pub(crate) fn dial(&self, testbed: &Testbed, n: usize) -> Result<OpenConns> {
        let me = std::env::current_exe().context("can't find this program's own path")?;
        let mut diallers = Vec::new();
        for (i, server) in self.servers.iter().enumerate() {
            let share = (n * (i + 1) / self.servers.len()) - (n * i / self.servers.len());
            let mut child = Command::new(&me)
                .arg("dial")
                .arg(server.to_string())
                .arg(share.to_string())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .context("starting a dialler")?;
            let stdin = child.stdin.take().context("a dialler has no stdin")?;
            diallers.push((child, stdin));
        }
        for (child, _) in &mut diallers {
            let stdout = child.stdout.take().context("a dialler has no stdout")?;
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line)?;
            ensure!(line == "ready\n", "a dialler failed; see above");
        }
        self.until_established(testbed, n)?;
        Ok(OpenConns { diallers })
    }

    /// Waits until the pod has no connection, after [`OpenConns`] was dropped.
    pub(crate) fn until_empty(&self, testbed: &Testbed) -> Result<()> {
        self.until_established(testbed, 0)
    }

    /// Waits until the pod has `n` connections that are established and accepted.
    fn until_established(&self, testbed: &Testbed, n: usize) -> Result<()> {
        let started = Instant::now();
        let pid = testbed.sandbox_pid(&self.pod)?;
        loop {
            let found = accepted(pid)?;
            if found == n {
                return Ok(());
            }
            ensure!(
                started.elapsed() < Duration::from_secs(60),
                "the pod has {found} connections instead of {n}"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for OpenConns {
    fn drop(&mut self) {
        for (mut child, stdin) in self.diallers.drain(..) {
            drop(stdin);
            let _ = child.wait();
        }
    }
}

/// Counts established connections with an owner (an inode) in the network namespace of a process.
fn accepted(pid: u32) -> Result<usize> {
    let path = format!("/proc/{pid}/net/tcp");
    let text = std::fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
    Ok(text
        .lines()
        .skip(1)
        .filter(|line| is_accepted(line))
        .count())
}

/// proc_pid_net(5): the fourth field is the state (01 is ESTABLISHED), the tenth the inode.
fn is_accepted(line: &str) -> bool {
    let mut fields = line.split_whitespace();
    fields.nth(3) == Some("01") && fields.nth(5).is_some_and(|inode| inode != "0")
}

/// The dialler process: opens `n` connections, gets a reply on each, prints `ready`, and keeps them until its stdin
/// closes.
pub(crate) fn dial(server: SocketAddr, n: usize) -> Result<()> {
    let mut connections = Vec::with_capacity(n);
    for _ in 0..n {
        let mut stream =
            TcpStream::connect(server).with_context(|| format!("dialling {server}"))?;
        set_socket_linger(&stream, Some(Duration::ZERO))?;
        stream.write_all(b"?")?;
        stream.read_exact(&mut [0])?;
        connections.push(stream);
    }
    println!("ready");
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_established_connections_with_an_owner_count_as_accepted() {
        let line = |state: &str, inode: &str| {
            format!(
                "   1: 0200580A:1F90 0100580A:C3A4 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0"
            )
        };
        assert!(is_accepted(&line("01", "4711")));
        assert!(!is_accepted(&line("01", "0")));
        assert!(!is_accepted(&line("0A", "4711")));
    }
}
