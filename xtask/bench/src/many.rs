//! `list_100k`, `seed_100k`, `memory`: a pod with 100,000 connections, whose other ends are on the node.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::{
    bpf,
    churn::ss,
    crowd::Crowd,
    ebb::Agent,
    figures::{AtMost, Figures, Target},
    lab::Lab,
    netns, say, stats,
};

const MIB: f64 = 1024.0 * 1024.0;

pub(crate) fn measure(lab: &Lab, figures: &mut Figures) -> Result<()> {
    let n = lab.extent.many;
    let crowd = Crowd::start(lab, "crowd", n)?;
    let pid = lab.sandbox_pid(&crowd.pod)?;

    say(&format!(
        "memory: an idle agent, then one that sees {n} connections being opened"
    ));
    let agent = lab.agent()?;
    std::thread::sleep(Duration::from_secs(1));
    let idle = agent.resident()?;
    let private = agent.private()?;
    let maps = bpf::map_memory(agent.pid())?;
    let connections = crowd.dial(lab, n)?;
    let grown = agent.resident()?;

    say("`ebb flows` and `ss -tin` of the same connections in turn");
    check_lists(&agent, pid, n)?;
    let (mut ebb, mut with_ss) = (Vec::new(), Vec::new());
    for pair in 0..lab.extent.pairs {
        for ebb_now in [pair % 2 == 0, pair % 2 == 1] {
            if ebb_now {
                ebb.push(timed(&mut agent.query(&["flows", "crowd"]))?);
            } else {
                with_ss.push(netns::inside(pid, || timed(&mut ss(&["-tin"])))?);
            }
        }
    }
    // Memory is given back after a second.
    std::thread::sleep(Duration::from_secs(2));
    let listed = agent.resident()?;
    let with = option_memory(pid)?;
    agent.stop()?;
    let without = settled(|| option_memory(pid))?;

    say(&format!("agents starting amid {n} connections"));
    let mut ready = Vec::new();
    for _ in 0..lab.extent.pairs {
        let agent = lab.agent()?;
        ready.push(agent.ready_after.as_secs_f64() * 1000.0);
        agent.stop()?;
    }
    drop(connections);
    crowd.until_empty(lab)?;
    lab.end(&crowd.pod)?;

    let count = n as f64;
    let bytes = |bytes: f64| bytes / MIB;
    let ebb_ms = stats::median(&ebb)?;
    let ss_ms = stats::median(&with_ss)?;
    for (key, value, unit, what, target) in [
        (
            "list_100k.connections",
            count,
            "",
            "connections of the pod",
            Target::None,
        ),
        (
            "list_100k.ebb_ms",
            ebb_ms,
            "ms",
            "`ebb flows POD`, from start to end",
            AtMost(ss_ms / 2.0),
        ),
        (
            "list_100k.ss_ms",
            ss_ms,
            "ms",
            "`ss -tin` in the pod's namespace",
            Target::None,
        ),
        (
            "list_100k.ratio",
            stats::ratio(&ebb, &with_ss)?,
            "",
            "ebb ÷ ss, pair by pair",
            AtMost(0.5),
        ),
        (
            "seed_100k.ready_ms",
            stats::median(&ready)?,
            "ms",
            "start of the agent to ready, with these connections open",
            AtMost(1000.0),
        ),
        (
            "memory.agent_idle_mib",
            bytes(idle),
            "MiB",
            "resident memory of the agent without connections",
            AtMost(25.0),
        ),
        (
            "memory.agent_idle_private_mib",
            bytes(private),
            "MiB",
            "of it without the pages of the program itself",
            Target::None,
        ),
        (
            "memory.agent_100k_mib",
            bytes(grown),
            "MiB",
            "… after these connections were opened",
            Target::None,
        ),
        (
            "memory.agent_listed_mib",
            bytes(listed),
            "MiB",
            "… and after they were listed several times",
            Target::None,
        ),
        (
            "memory.bytes_per_flow_agent",
            (grown - idle).max(0.0) / count,
            "B",
            "growth of the agent for each connection",
            AtMost(64.0),
        ),
        (
            "memory.kernel_bytes_per_flow",
            with - without,
            "B",
            "what the kernel charges each socket for ebb's record (option memory, agent on − off)",
            Target::None,
        ),
        (
            "memory.kernel_maps_mib",
            bytes(maps),
            "MiB",
            "BPF maps of the agent, however many connections there are",
            Target::None,
        ),
    ] {
        figures.add(key, value, unit, what, target)?;
    }
    Ok(())
}

/// Milliseconds from the start of a command to its end, its output not kept.
fn timed(command: &mut Command) -> Result<f64> {
    let started = Instant::now();
    let status = command.stdout(Stdio::null()).status()?;
    let took = started.elapsed();
    ensure!(status.success(), "{command:?} failed");
    Ok(took.as_secs_f64() * 1000.0)
}

/// Both lists have all connections: a faster one that shows less shows nothing.
fn check_lists(agent: &Agent, pid: u32, n: usize) -> Result<()> {
    let lines = |command: &mut Command, of: &str| -> Result<usize> {
        let output = command.output()?;
        ensure!(output.status.success(), "{command:?} failed");
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().filter(|line| line.starts_with(of)).count())
    };
    let ebb = lines(&mut agent.query(&["flows", "crowd"]), "default/crowd ")?;
    let by_ss = netns::inside(pid, || lines(&mut ss(&["-tin"]), "ESTAB"))?;
    ensure!(
        ebb == n && by_ss == n,
        "of {n} connections `ebb flows` lists {ebb} and ss {by_ss}"
    );
    Ok(())
}

/// A value once it stays the same: the kernel frees what a map had in its own time.
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

/// The option memory of the median connection in a namespace. The kernel charges socket storage to it
/// (net/core/bpf_sk_storage.c, `bpf_sk_storage_charge`), byte by byte, and nothing else of this run uses it. (Another
/// tracker on the machine, such as another run's, may for some.)
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
    fn the_option_memory_is_found_in_a_line_of_ss() {
        let line = "\t skmem:(r0,rb131072,t0,tb87040,f0,w0,o336,bl0,d0) cubic wscale:7,7 rto:204";
        assert_eq!(option_bytes(line), Some(336.0));
        assert_eq!(option_bytes("ESTAB 0 0 10.0.0.1:80 10.0.0.2:4711"), None);
    }
}
