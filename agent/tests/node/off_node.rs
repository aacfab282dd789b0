//! A caller outside the node: a network namespace on a veth pair, apart from the pods' network.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};
use ebb::linux::netns::Netns;
use ebb_testkit::namespace::ip;

/// The node's address on this link.
pub(crate) const NODE_ADDRESS: &str = "10.99.0.1";
const CALLER_ADDRESS: &str = "10.99.0.2";

/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A namespace with a route to the node. The kernel removes it when its process ends.
pub(crate) struct OffNode {
    process: Child,
    netns: Netns,
}

impl OffNode {
    /// The link's name is fixed, so a trial that calls this must have the node to itself.
    pub(crate) fn new() -> Result<Self> {
        let process = Command::new("unshare")
            .args(["--net", "sleep", "600"])
            .stdin(Stdio::null())
            .spawn()
            .context("making a namespace")?;
        let pid = process.id();
        let own = std::fs::read_link("/proc/self/ns/net")?;
        // The process exists before it enters its namespace.
        while std::fs::read_link(format!("/proc/{pid}/ns/net"))? == own {
            std::thread::sleep(Duration::from_millis(5));
        }
        let off = Self {
            process,
            netns: Netns::of_process(pid)?,
        };
        ip(&format!(
            "link add far type veth peer name eth0 netns {pid}"
        ))?;
        ip(&format!("addr add {NODE_ADDRESS}/24 dev far"))?;
        ip("link set far up")?;
        let inside = off.netns.run(|| {
            let done = ip("link set eth0 up")
                .and_then(|()| ip(&format!("addr add {CALLER_ADDRESS}/24 dev eth0")))
                .and_then(|()| ip(&format!("route add default via {NODE_ADDRESS}")));
            Ok(done)
        });
        inside??;
        Ok(off)
    }

    /// Sends a GET from the namespace, and returns the raw answer.
    pub(crate) fn get(&self, at: SocketAddr, path: &str) -> Result<String> {
        let answer = self.netns.run(|| {
            let mut stream = TcpStream::connect_timeout(&at, ANSWER_WITHIN)?;
            stream.set_read_timeout(Some(ANSWER_WITHIN))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: far\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        });
        answer.with_context(|| format!("no answer from {at}"))
    }
}

impl Drop for OffNode {
    fn drop(&mut self) {
        // The kernel removes the link with the namespace.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
