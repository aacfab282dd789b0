//! `list_100k`, `seed_100k`, `memory`: a pod with 100,000 connections from the node.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::{
    beside::ss,
    bpf,
    ebb::AgentProcess,
    idle_conns::SinkPod,
    netns,
    results::{AtMost, BenchResults, Goal},
    say, stats,
    testbed::Testbed,
};

/// The pod's name.
const POD: &str = "sinks";

const MIB: f64 = 1024.0 * 1024.0;

pub(crate) fn measure(testbed: &Testbed, results: &mut BenchResults) -> Result<()> {
    let n = testbed.scale.many;
    let sinks = SinkPod::start(testbed, POD, n)?;
    let pid = testbed.sandbox_pid(&sinks.pod)?;

    say(&format!(
        "memory: the agent idle, then after {n} connections were opened"
    ));
    let agent = testbed.agent()?;
    std::thread::sleep(Duration::from_secs(1));
    let mut memory = Memory {
        idle: agent.resident()?,
        private: agent.private()?,
        maps: bpf::map_memory(agent.pid())?,
        ..Memory::default()
    };
    let connections = sinks.dial(testbed, n)?;
    memory.grown = agent.resident()?;
    memory.maps_grown = bpf::map_memory(agent.pid())?;

    say("`ebb flows` and `ss -tin` of the same connections, in turn");
    check_lists(&agent, pid, n)?;
    let (mut ebb, mut with_ss) = (Vec::new(), Vec::new());
    for pair in 0..testbed.scale.pairs {
        for ebb_now in [pair % 2 == 0, pair % 2 == 1] {
            if ebb_now {
                ebb.push(timed(&mut agent.query(&["flows", POD]))?);
            } else {
                with_ss.push(netns::inside(pid, || timed(&mut ss(&["-tin"])))?);
            }
        }
    }
    // The agent returns memory to the kernel after a second.
    std::thread::sleep(Duration::from_secs(2));
    memory.listed = agent.resident()?;
    let with = option_memory(pid)?;
    agent.stop()?;
    memory.option = with - settled(|| option_memory(pid))?;

    say(&format!("starts of the agent with {n} connections open"));
    let mut ready = Vec::new();
    for _ in 0..testbed.scale.pairs {
        let agent = testbed.agent()?;
        ready.push(agent.ready_after.as_secs_f64() * 1000.0);
        agent.stop()?;
    }
    drop(connections);
    sinks.until_empty(testbed)?;
    testbed.end(&sinks.pod)?;

    report_lists(n, &ebb, &with_ss, results)?;
    let what = "from the start of the agent's process to ready, with these connections open";
    let ready = stats::interval(&ready)?;
    results.add_interval("seed_100k.ready_ms", ready, "ms", what, AtMost(100.0))?;
    memory.report(n as f64, results)
}

fn report_lists(n: usize, ebb: &[f64], with_ss: &[f64], results: &mut BenchResults) -> Result<()> {
    let key = "list_100k.connections";
    results.add(key, n as f64, "", "connections of the pod", Goal::None)?;
    let what = "`ebb flows POD`, from start to end";
    let ms = stats::interval(ebb)?;
    results.add_interval("list_100k.ebb_ms", ms, "ms", what, Goal::None)?;
    let what = "`ss -tin` in the pod's namespace";
    let ms = stats::interval(with_ss)?;
    results.add_interval("list_100k.ss_ms", ms, "ms", what, Goal::None)?;
    let ratio = stats::ratio_interval(ebb, with_ss)?;
    let what = "ebb ÷ ss, pair by pair";
    results.add_interval("list_100k.ratio", ratio, "", what, AtMost(0.8))
}

/// Memory in bytes.
#[derive(Default)]
struct Memory {
    /// Resident memory of the agent without connections, and the part of it that is not mapped from a file.
    idle: f64,
    private: f64,
    /// Resident memory after the connections were opened, and after they were listed.
    grown: f64,
    listed: f64,
    /// The BPF maps of the agent without connections, and with them.
    maps: f64,
    maps_grown: f64,
    /// A socket's option memory with an agent, less that without one.
    option: f64,
}

impl Memory {
    fn report(&self, connections: f64, results: &mut BenchResults) -> Result<()> {
        let maps_grown = (self.maps_grown - self.maps) / connections;
        for (key, value, unit, what, target) in [
            (
                "memory.agent_idle_mib",
                self.idle / MIB,
                "MiB",
                "resident memory (VmRSS) of the agent without connections",
                AtMost(16.0),
            ),
            (
                "memory.agent_idle_private_mib",
                self.private / MIB,
                "MiB",
                "… without pages mapped from files (RssAnon)",
                Goal::None,
            ),
            (
                "memory.agent_100k_mib",
                self.grown / MIB,
                "MiB",
                "… after these connections were opened",
                Goal::None,
            ),
            (
                "memory.agent_listed_mib",
                self.listed / MIB,
                "MiB",
                "… and after they were listed several times",
                Goal::None,
            ),
            (
                "memory.bytes_per_flow_agent",
                (self.grown - self.idle).max(0.0) / connections,
                "B",
                "growth of the agent per connection",
                AtMost(64.0),
            ),
            (
                "memory.kernel_bytes_per_flow",
                self.option + maps_grown,
                "B",
                "growth of option memory (with the agent − without) and of the BPF maps, per connection",
                AtMost(0.0),
            ),
            (
                "memory.kernel_maps_mib",
                self.maps_grown / MIB,
                "MiB",
                "BPF maps of the agent with these connections",
                AtMost(6.0),
            ),
        ] {
            results.add(key, value, unit, what, target)?;
        }
        Ok(())
    }
}

/// Milliseconds from the start of a command to its end. Its output is discarded.
fn timed(command: &mut Command) -> Result<f64> {
    let started = Instant::now();
    let status = command.stdout(Stdio::null()).status()?;
    let took = started.elapsed();
    ensure!(status.success(), "{command:?} failed");
    Ok(took.as_secs_f64() * 1000.0)
}

/// Checks that both commands list all connections, so that the comparison is fair.
fn check_lists(agent: &AgentProcess, pid: u32, n: usize) -> Result<()> {
    // Counts the lines that begin with these cells.
    let lines = |command: &mut Command, cells: &[&str]| -> Result<usize> {
        let output = command.output()?;
        ensure!(output.status.success(), "{command:?} failed");
        let text = String::from_utf8_lossy(&output.stdout);
        let is_one = |line: &&str| {
            line.split_whitespace()
                .take(cells.len())
                .eq(cells.iter().copied())
        };
        Ok(text.lines().filter(is_one).count())
    };
    let ebb = lines(&mut agent.query(&["flows", POD]), &["default", POD])?;
    let by_ss = netns::inside(pid, || lines(&mut ss(&["-tin"]), &["ESTAB"]))?;
    ensure!(
        ebb == n && by_ss == n,
        "of {n} connections `ebb flows` lists {ebb} and ss {by_ss}"
    );
    Ok(())
}

/// A value once two reads a second apart agree, because the kernel frees a map's memory asynchronously.
fn settled(mut value: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut before = value()?;
    for _ in 0..30 {
        std::thread::sleep(Duration::from_secs(1));
        let now = value()?;
        if now == before {
            return Ok(now);
        }
        before = now;
    }
    anyhow::bail!("the option memory of the connections does not settle")
}

/// The option memory of the median connection in a namespace. The kernel charges BPF socket storage to it
/// (`bpf_sk_storage_charge` in net/core/bpf_sk_storage.c), and nothing else in this run uses it. Another tracker on the
/// machine may add to some sockets, hence the median.
fn option_memory(pid: u32) -> Result<f64> {
    let output = netns::inside(pid, || Ok(ss(&["-tinm"]).output()?))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let charged: Vec<f64> = text.lines().filter_map(option_bytes).collect();
    stats::median(&charged)
}

/// The `o` of ss's `skmem:(r0,rb131072,t0,tb46080,f0,w0,o336,bl0,d0)`.
fn option_bytes(line: &str) -> Option<f64> {
    let (_, memory) = line.split_once("skmem:(")?;
    let (memory, _) = memory.split_once(')')?;
    let bytes = memory
        .split(',')
        .find_map(|field| field.strip_prefix('o'))?;
    bytes.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_memory_is_parsed_from_a_line_of_ss() {
        let line = "\t skmem:(r0,rb131072,t0,tb87040,f0,w0,o336,bl0,d0) cubic wscale:7,7 rto:204";
        assert_eq!(option_bytes(line), Some(336.0));
        assert_eq!(option_bytes("ESTAB 0 0 10.0.0.1:80 10.0.0.2:4711"), None);
    }
}
