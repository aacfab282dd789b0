//! `bpf`: what a state change costs, by the kernel's own count of the time that BPF programs run.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use aya::sys::{Stats, enable_stats};

use crate::{
    bpf::{self, Own, Runs},
    figures::{AtMost, Figures, Target},
    lab::Lab,
    load::{self, Connections},
    say, stats,
};

/// ebb's programs that run at state changes; the others only walk when asked.
const TRACKERS: [(&str, &str); 2] = [
    ("track", "bpf.ns_first_copy"),
    ("track_second", "bpf.ns_second_copy"),
];

/// Both are attached at the same time and see the same state changes, which is closer than taking turns. The kernel
/// counts as long as somebody wants it to: the setting of the machine stays as it was.
pub(crate) fn measure(lab: &Lab, figures: &mut Figures) -> Result<()> {
    let (nginx, server) = lab.nginx()?;
    say(
        "BPF time per state change: nginx and wrk with a connection per request, beside an empty program",
    );
    let agent = lab.agent()?;
    let mut own = Own::load(server.port())?;
    own.attach_empty()?;
    let _counting = enable_stats(Stats::RunTime).context("can't enable BPF statistics")?;
    let mut all = Vec::new();
    let mut copies: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut empty = Vec::new();
    let mut events = 0;
    for _ in 0..lab.extent.pairs {
        let before = bpf::runs_of_process(agent.pid())?;
        let empty_before = own.empty_runs()?;
        load::wrk(lab, server, Connections::Close, lab.extent.window)?;
        let empty_after = own.empty_runs()?;
        let after = bpf::runs_of_process(agent.pid())?;
        let mut sum = 0;
        let mut changes = 0;
        for (name, _) in TRACKERS {
            let runs = difference(&before, &after, name)?;
            ensure!(runs.count > 0, "{name} did not run: what attaches it?");
            sum += runs.ns;
            // A copy misses the changes that interrupt it; each is seen by one copy at least.
            changes = changes.max(runs.count);
            copies.entry(name).or_default().push(per_run(&runs));
        }
        all.push(sum as f64 / changes as f64);
        empty.push(per_run(&since(&empty_before, &empty_after)));
        events += changes;
    }
    figures.add(
        "bpf.ns_per_event",
        stats::median(&all)?,
        "ns",
        "BPF time of a TCP state change, both copies of the tracker together",
        AtMost(200.0),
    )?;
    for (name, key) in TRACKERS {
        let what = format!("of it in `{name}`");
        let values = copies.remove(name).unwrap_or_default();
        figures.add(key, stats::median(&values)?, "ns", what, Target::None)?;
    }
    figures.add(
        "bpf.ns_empty",
        stats::median(&empty)?,
        "ns",
        "an empty program at the same hook, at the same changes",
        Target::None,
    )?;
    let what = "state changes measured";
    figures.add("bpf.events", events as f64, "", what, Target::None)?;
    agent.stop()?;
    lab.end(&nginx)
}

fn per_run(runs: &Runs) -> f64 {
    runs.ns as f64 / runs.count as f64
}

fn difference(before: &[Runs], after: &[Runs], name: &str) -> Result<Runs> {
    let find = |runs: &[Runs]| runs.iter().find(|r| r.name == name).cloned();
    let both = find(before).zip(find(after));
    let (before, after) = both.with_context(|| format!("the agent has no program {name}"))?;
    Ok(since(&before, &after))
}

fn since(before: &Runs, after: &Runs) -> Runs {
    Runs {
        name: after.name.clone(),
        count: after.count - before.count,
        ns: after.ns - before.ns,
    }
}
