//! Many connections at once: a pod whose containers accept them, and processes that dial them.
//!
//! Several of each, since a process may be allowed no more than some ten thousand descriptors.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb_node::kubelet::{ContainerSpec, Pod, PodSpec};
use rustix::net::sockopt::set_socket_linger;

use crate::lab::Lab;

/// Connections to a port and from a process: below the least limit met, and the number of ports of a client.
const PER_PROCESS: usize = 17_000;

const FIRST_PORT: u16 = 7001;

/// A pod that keeps connections open.
pub(crate) struct Crowd {
    pub(crate) pod: Pod,
    servers: Vec<SocketAddr>,
}

/// Open connections. Dropping it closes them, by a reset: nothing of them stays.
pub(crate) struct Connections {
    diallers: Vec<(Child, ChildStdin)>,
}

impl Crowd {
    /// Runs a pod that has room for `most` connections.
    pub(crate) fn start(lab: &Lab, name: &str, most: usize) -> Result<Self> {
        let ports: Vec<u16> = (FIRST_PORT..).take(most.div_ceil(PER_PROCESS)).collect();
        let mut spec = PodSpec::new(name);
        for port in &ports {
            let container = format!("sink-{port}");
            spec = spec.container(ContainerSpec::fixture(
                &container,
                &["sink", "--port", &port.to_string()],
            ));
        }
        let pod = lab.run(&spec)?;
        let servers = ports.iter().map(|port| pod.v4(*port));
        let servers = servers.collect::<Result<Vec<_>>>()?;
        for server in &servers {
            lab.until_open(*server)?;
        }
        Ok(Self { pod, servers })
    }

    /// Opens `n` connections, and returns when all are established and accepted.
    pub(crate) fn dial(&self, lab: &Lab, n: usize) -> Result<Connections> {
        let me = std::env::current_exe().context("can't tell which program this is")?;
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
            let stdin = child.stdin.take().context("a dialler without input")?;
            diallers.push((child, stdin));
        }
        for (child, _) in &mut diallers {
            let stdout = child.stdout.take().context("a dialler without output")?;
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line)?;
            ensure!(line == "ready\n", "a dialler failed; see above");
        }
        self.until_established(lab, n)?;
        Ok(Connections { diallers })
    }

    /// Waits until none is left after a [`Connections`] was dropped.
    pub(crate) fn until_empty(&self, lab: &Lab) -> Result<()> {
        self.until_established(lab, 0)
    }

    /// The pod's connections that are established and accepted, by its own table of sockets.
    fn until_established(&self, lab: &Lab, n: usize) -> Result<()> {
        let started = Instant::now();
        let pid = lab.sandbox_pid(&self.pod)?;
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

impl Drop for Connections {
    fn drop(&mut self) {
        for (mut child, stdin) in self.diallers.drain(..) {
            drop(stdin);
            let _ = child.wait();
        }
    }
}

/// Established connections with an owner (an inode) in the network namespace of a process.
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

/// The dialler: opens `n` connections, asks on each and is answered, says `ready`, and keeps them until its input
/// ends.
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
    fn only_what_is_established_and_has_an_owner_is_accepted() {
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
