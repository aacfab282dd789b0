//! Load on a server: wrk.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};

use crate::{lab::Lab, machine};

/// How many clients wrk is, on one thread.
const CLIENTS: &str = "32";

/// How many requests were answered, and what that cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Requests per second.
    pub(crate) rps: f64,
    /// CPU time of all processes of the node for each request, in microseconds.
    pub(crate) cpu_us: f64,
}

/// What a connection is used for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Connections {
    /// One request each.
    Close,
    /// As many requests as fit in the time.
    Keep,
}

/// Has wrk ask the server for a while.
pub(crate) fn wrk(
    lab: &Lab,
    server: SocketAddr,
    connections: Connections,
    window: Duration,
) -> Result<Load> {
    let mut command = lab.node.parts().wrk()?;
    // wrk knows whole seconds only.
    let seconds = window.as_secs();
    command
        .args(["--threads", "1", "--connections", CLIENTS])
        .arg(format!("--duration={seconds}s"));
    if connections == Connections::Close {
        command.args(["--header", "Connection: close"]);
    }
    command.arg(format!("http://{server}/"));
    let before = machine::cpu_time_us(lab.node.place())?;
    let output = command.output().context("starting wrk")?;
    let cpu = machine::cpu_time_us(lab.node.place())? - before;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "wrk failed: {text}");
    let (requests, rps) = parse(&text).with_context(|| format!("wrk says: {text}"))?;
    ensure!(requests > 0.0 && rps > 0.0, "wrk got no answers: {text}");
    Ok(Load {
        rps,
        cpu_us: cpu / requests,
    })
}

/// The requests and the requests per second.
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
    fn what_wrk_prints_is_read() {
        let text = "Running 1s test @ http://10.88.0.2:8080/\n  1 threads and 32 connections\n  \
                    Thread Stats   Avg      Stdev     Max   +/- Stdev\n  \
                    15231 requests in 1.10s, 3.62MB read\nRequests/sec:  13842.51\nTransfer/sec:      3.29MB\n";
        assert_eq!(parse(text), Some((15231.0, 13842.51)));
        assert_eq!(parse("unable to connect"), None);
    }
}
