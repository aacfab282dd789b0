//! `keepalive`: requests on connections that stay open. ebb's programs should not run for them.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::sys::{Stats, enable_stats};

use crate::{
    bpf::{self, BenchPrograms},
    load::{self, ConnectionUse},
    results::{AtLeast, AtMost, BenchResults, Goal},
    say, stats,
    testbed::Testbed,
};

/// How many connections stay open while runs are counted.
const CONNECTIONS: usize = 64;

pub(crate) fn measure(testbed: &Testbed, results: &mut BenchResults) -> Result<()> {
    let (nginx, server) = testbed.nginx()?;
    say(
        "requests on kept connections: with and without the agent in turn, then how often its programs run",
    );
    let (mut on, mut off) = (Vec::new(), Vec::new());
    for pair in 0..testbed.scale.pairs {
        for with_agent in [pair % 2 == 0, pair % 2 == 1] {
            let agent = with_agent.then(|| testbed.agent()).transpose()?;
            let load = load::wrk(testbed, server, ConnectionUse::Keep, testbed.scale.window)?;
            if with_agent { &mut on } else { &mut off }.push(load.rps);
            agent.map_or(Ok(()), crate::ebb::AgentProcess::stop)?;
        }
    }
    let what = "requests per second on kept connections, with the agent ÷ without";
    let ratio = stats::ratio(&on, &off)?;
    results.add("keepalive.rps_ratio", ratio, "", what, AtLeast(0.98))?;
    runs(testbed, server, results)?;
    testbed.end(&nginx)
}

/// ebb's program runs at the state changes of all connections of the machine. So the bench counts the changes of
/// connections to other ports and subtracts them.
fn runs(testbed: &Testbed, server: SocketAddr, results: &mut BenchResults) -> Result<()> {
    let agent = testbed.agent()?;
    let mut programs = BenchPrograms::load(server.port())?;
    programs.attach_changes()?;
    let _counting = enable_stats(Stats::RunTime).context("can't enable BPF statistics")?;
    let mut connections = (0..CONNECTIONS)
        .map(|_| Kept::open(server))
        .collect::<Result<Vec<_>>>()?;
    let (here_before, all_before) = programs.changes()?;
    let runs_before = bpf::runs_of_process(agent.pid())?;
    for request in 0..testbed.scale.requests {
        connections[request % CONNECTIONS].get()?;
    }
    let runs_after = bpf::runs_of_process(agent.pid())?;
    let (here_after, all_after) = programs.changes()?;
    let here = here_after - here_before;
    let elsewhere = (all_after - all_before) - here;
    let count = |runs: &[bpf::Runs]| runs.iter().map(|r| r.count).sum::<u64>();
    let runs = count(&runs_after) - count(&runs_before);
    let for_these = runs.saturating_sub(elsewhere);
    for (key, value, what, target) in [
        (
            "keepalive.bpf_runs",
            for_these as f64,
            "runs of all of ebb's programs during these requests, without those for other connections",
            AtMost(0.0),
        ),
        (
            "keepalive.requests",
            testbed.scale.requests as f64,
            "requests",
            Goal::None,
        ),
        (
            "keepalive.connections",
            CONNECTIONS as f64,
            "connections that they were made on, opened before and closed after",
            Goal::None,
        ),
        (
            "keepalive.state_changes",
            here as f64,
            "state changes of these connections during the requests",
            Goal::None,
        ),
        (
            "keepalive.bpf_runs_elsewhere",
            runs.saturating_sub(for_these) as f64,
            "runs for state changes of the machine's other connections",
            Goal::None,
        ),
    ] {
        results.add(key, value, "", what, target)?;
    }
    drop(connections);
    agent.stop()
}

/// A connection that sends one request after the other.
struct Kept(TcpStream);

impl Kept {
    fn open(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(server)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.set_nodelay(true)?;
        let mut kept = Self(stream);
        // The first request completes the opening: the server may accept only when data arrives.
        kept.get()?;
        Ok(kept)
    }

    fn get(&mut self) -> Result<()> {
        self.0.write_all(b"GET / HTTP/1.1\r\nHost: nginx\r\n\r\n")?;
        let mut reply = Vec::new();
        let mut part = [0; 4096];
        // The end of index.html, which occurs nowhere before.
        while !reply.ends_with(b"hello\n") {
            let n = self.0.read(&mut part)?;
            ensure!(n > 0, "nginx closed a kept connection");
            reply.extend_from_slice(&part[..n]);
        }
        ensure!(
            reply.starts_with(b"HTTP/1.1 200"),
            "nginx did not reply 200"
        );
        Ok(())
    }
}
