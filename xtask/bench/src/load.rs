//! Load on a server, made by wrk.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};

use crate::{machine, testbed::Testbed};

/// wrk's connections, on one thread.
const CLIENTS: &str = "32";

/// What wrk and the kernel's accounting report of one load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadResult {
    /// Requests that got a reply.
    pub(crate) requests: f64,
    pub(crate) rps: f64,
    /// CPU time per request of all processes of the node, in microseconds.
    pub(crate) cpu_us: f64,
}

/// How many requests wrk sends on a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectionUse {
    /// One.
    Close,
    /// As many as fit in the window.
    Keep,
}

/// Runs wrk against the server for `window`, in whole seconds.
pub(crate) fn wrk(
    testbed: &Testbed,
    server: SocketAddr,
    connections: ConnectionUse,
    window: Duration,
) -> Result<LoadResult> {
    let mut command = testbed.node.parts().wrk()?;
    // wrk takes whole seconds only.
    let seconds = window.as_secs();
    command
        .args(["--threads", "1", "--connections", CLIENTS])
        .arg(format!("--duration={seconds}s"));
    if connections == ConnectionUse::Close {
        command.args(["--header", "Connection: close"]);
    }
    command.arg(format!("http://{server}/"));
    let before = machine::cpu_time_us(testbed.node.paths())?;
    let output = command.output().context("starting wrk")?;
    let cpu = machine::cpu_time_us(testbed.node.paths())? - before;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "wrk failed: {text}");
    let (requests, rps) = parse(&text).with_context(|| format!("parsing wrk's output: {text}"))?;
    ensure!(requests > 0.0 && rps > 0.0, "wrk got no replies: {text}");
    Ok(LoadResult {
        requests,
        rps,
        cpu_us: cpu / requests,
    })
}

/// The number of requests and the requests per second.
fn parse(text: &str) -> Option<(f64, f64)> {
    let requests = text
        .lines()
        .find_map(|line| line.split_once(" requests in "))?;
    let rps = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Requests/sec:"))?;
    Some((requests.0.trim().parse().ok()?, rps.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_rate_are_parsed_from_wrks_output() {
        let text = "Running 1s test @ http://10.88.0.2:8080/\n  1 threads and 32 connections\n  \
                    Thread Stats   Avg      Stdev     Max   +/- Stdev\n  \
                    15231 requests in 1.10s, 3.62MB read\nRequests/sec:  13842.51\nTransfer/sec:      3.29MB\n";
        assert_eq!(parse(text), Some((15231.0, 13842.51)));
        assert_eq!(parse("unable to connect"), None);
    }
}
