//! A caller that is on no node of ours: a network namespace on a veth pair, beside the pods' network.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ebb::kernel::Netns;

/// The node's address on this link.
pub(crate) const NEAR: &str = "10.99.0.1";
const FAR: &str = "10.99.0.2";

/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A namespace with a way to the node, which goes with the process in it.
pub(crate) struct OffNode {
    process: Child,
    within: Netns,
}

impl OffNode {
    /// Makes one. Trials that do have the node for themselves.
    pub(crate) fn new() -> Result<Self> {
        let process = Command::new("unshare")
            .args(["--net", "sleep", "600"])
            .stdin(Stdio::null())
            .spawn()
            .context("making a namespace")?;
        let pid = process.id();
        let own = std::fs::read_link("/proc/self/ns/net")?;
        // It is there before it is in the namespace.
        while std::fs::read_link(format!("/proc/{pid}/ns/net"))? == own {
            std::thread::sleep(Duration::from_millis(5));
        }
        let off = Self {
            process,
            within: Netns::of_process(pid)?,
        };
        ip(&format!(
            "link add far type veth peer name eth0 netns {pid}"
        ))?;
        ip(&format!("addr add {NEAR}/24 dev far"))?;
        ip("link set far up")?;
        let inside = off.within.run(|| {
            let done = ip("link set eth0 up")
                .and_then(|()| ip(&format!("addr add {FAR}/24 dev eth0")))
                .and_then(|()| ip(&format!("route add default via {NEAR}")));
            Ok(done)
        });
        inside??;
        Ok(off)
    }

    /// What is answered to a GET from there.
    pub(crate) fn get(&self, at: SocketAddr, path: &str) -> Result<String> {
        let asked = self.within.run(|| {
            let mut stream = TcpStream::connect_timeout(&at, ANSWER_WITHIN)?;
            stream.set_read_timeout(Some(ANSWER_WITHIN))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: far\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        });
        asked.with_context(|| format!("no answer from {at}"))
    }
}

impl Drop for OffNode {
    fn drop(&mut self) {
        // The link goes with the namespace.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn ip(arguments: &str) -> Result<()> {
    let out = Command::new("ip").args(arguments.split(' ')).output()?;
    let error = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "ip {arguments}: {}", error.trim());
    Ok(())
}
