//! `keepalive`: requests on connections that stay open, which no program of ebb's should see.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::sys::{Stats, enable_stats};

use crate::{
    bpf::{self, Own},
    figures::{AtLeast, AtMost, Figures, Target},
    lab::Lab,
    load::{self, Connections},
    say, stats,
};

/// Connections of the client that counts.
const CONNECTIONS: usize = 64;

pub(crate) fn measure(lab: &Lab, figures: &mut Figures) -> Result<()> {
    let (nginx, server) = lab.nginx()?;
    say(
        "requests on kept connections: the agent on and off in turn, then how often its programs run",
    );
    let (mut on, mut off) = (Vec::new(), Vec::new());
    for pair in 0..lab.extent.pairs {
        for with_agent in [pair % 2 == 0, pair % 2 == 1] {
            let agent = with_agent.then(|| lab.agent()).transpose()?;
            let load = load::wrk(lab, server, Connections::Keep, lab.extent.window)?;
            if with_agent { &mut on } else { &mut off }.push(load.rps);
            agent.map_or(Ok(()), crate::ebb::Agent::stop)?;
        }
    }
    let what = "requests per second on kept connections, agent on ÷ off";
    let ratio = stats::ratio(&on, &off)?;
    figures.add("keepalive.rps_ratio", ratio, "", what, AtLeast(0.98))?;
    runs(lab, server, figures)?;
    lab.end(&nginx)
}

/// The tracker runs at the state changes of all connections of the machine. Those of other servers, whoever opens
/// them meanwhile, are counted and taken off.
fn runs(lab: &Lab, server: SocketAddr, figures: &mut Figures) -> Result<()> {
    let agent = lab.agent()?;
    let mut own = Own::load(server.port())?;
    own.attach_changes()?;
    let _counting = enable_stats(Stats::RunTime).context("can't enable BPF statistics")?;
    let mut connections = (0..CONNECTIONS)
        .map(|_| Kept::open(server))
        .collect::<Result<Vec<_>>>()?;
    let (here_before, all_before) = own.changes()?;
    let runs_before = bpf::runs_of_process(agent.pid())?;
    for request in 0..lab.extent.requests {
        connections[request % CONNECTIONS].get()?;
    }
    let runs_after = bpf::runs_of_process(agent.pid())?;
    let (here_after, all_after) = own.changes()?;
    let here = here_after - here_before;
    let elsewhere = (all_after - all_before) - here;
    let count = |runs: &[bpf::Runs]| runs.iter().map(|r| r.count).sum::<u64>();
    let runs = count(&runs_after) - count(&runs_before);
    let copies = runs_after
        .iter()
        .filter(|r| r.name.starts_with("track"))
        .count();
    let for_these = runs.saturating_sub(elsewhere * copies as u64);
    for (key, value, what, target) in [
        (
            "keepalive.bpf_runs",
            for_these as f64,
            "runs of all of ebb's programs during these requests, without those elsewhere",
            AtMost(0.0),
        ),
        (
            "keepalive.requests",
            lab.extent.requests as f64,
            "requests",
            Target::None,
        ),
        (
            "keepalive.connections",
            CONNECTIONS as f64,
            "connections that they were made on, opened before and closed after",
            Target::None,
        ),
        (
            "keepalive.state_changes",
            here as f64,
            "state changes of these connections meanwhile",
            Target::None,
        ),
        (
            "keepalive.bpf_runs_elsewhere",
            runs.saturating_sub(for_these) as f64,
            "runs at state changes of other connections of the machine meanwhile",
            Target::None,
        ),
    ] {
        figures.add(key, value, "", what, target)?;
    }
    drop(connections);
    agent.stop()
}

/// A connection on which one request follows the other.
struct Kept(TcpStream);

impl Kept {
    fn open(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(server)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.set_nodelay(true)?;
        let mut kept = Self(stream);
        // The first request is part of the opening: the server accepts when data comes.
        kept.get()?;
        Ok(kept)
    }

    fn get(&mut self) -> Result<()> {
        self.0.write_all(b"GET / HTTP/1.1\r\nHost: nginx\r\n\r\n")?;
        let mut reply = Vec::new();
        let mut part = [0; 4096];
        // The file that is served ends so, and nothing before it does.
        while !reply.ends_with(b"hello\n") {
            let n = self.0.read(&mut part)?;
            ensure!(n > 0, "nginx closed a connection that was to be kept");
            reply.extend_from_slice(&part[..n]);
        }
        ensure!(
            reply.starts_with(b"HTTP/1.1 200"),
            "nginx did not answer well"
        );
        Ok(())
    }
}
