//! `bpf`: BPF time of a state change and of a connection, from the kernel's statistics of program run time.

use anyhow::{Context as _, Result, ensure};
use aya::sys::{Stats, enable_stats};

use crate::{
    beside::{Beside, DrainingPod, Helper},
    bpf::{self, Runs},
    ebb::AgentProcess,
    load::{self, ConnectionUse},
    results::{AtMost, BenchResults, Goal},
    say,
    stats::{self, Shuffle},
    testbed::Testbed,
};

/// The name of ebb's program.
const TRACK: &str = "track";

const EMPTY: usize = 0;
const EBB: usize = 1;
const DRAINING: usize = 2;

/// BPF time in nanoseconds with one helper, one value per round.
#[derive(Default)]
struct Cost {
    per_event: Vec<f64>,
    per_connection: Vec<f64>,
}

/// Programs are attached one at a time: the kernel calls a single program at a tracepoint directly, and several
/// indirectly (`tracepoint_update_call` in kernel/tracepoint.c). Statistics are on only while the bench holds their
/// descriptor, so the machine's setting does not change.
pub(crate) fn measure(testbed: &Testbed, results: &mut BenchResults) -> Result<()> {
    let (nginx, server) = testbed.nginx()?;
    let draining = DrainingPod::start(testbed)?;
    say(
        "BPF time per state change: nginx and wrk with a connection per request; an empty program, ebb, ebb while another \
         pod drains, in turns",
    );
    let all = [Beside::Empty, Beside::Ebb, Beside::Draining];
    let mut costs: [Cost; 3] = Default::default();
    let mut shuffle = Shuffle::default();
    let mut events = 0;
    for _ in 0..testbed.scale.pairs {
        let mut order = [EMPTY, EBB, DRAINING];
        shuffle.shuffle(&mut order);
        for which in order {
            let helper = Helper::start(testbed, all[which], &draining)?;
            let counting = enable_stats(Stats::RunTime).context("can't enable BPF statistics")?;
            let before = runs(&helper)?;
            let load = load::wrk(testbed, server, ConnectionUse::Close, testbed.scale.window)?;
            let after = runs(&helper)?;
            drop(counting);
            helper.stop()?;
            let count = after.count - before.count;
            ensure!(count > 0, "{} did not run: what attaches it?", after.name);
            let ns = (after.ns - before.ns) as f64;
            let cost = &mut costs[which];
            cost.per_event.push(ns / count as f64);
            cost.per_connection.push(ns / load.requests);
            events += count;
        }
    }
    draining.end(testbed)?;
    testbed.end(&nginx)?;
    report(&costs, events, results)
}

fn report(costs: &[Cost; 3], events: u64, results: &mut BenchResults) -> Result<()> {
    let [empty, ebb, draining] = costs;
    for (key, values, what) in [
        (
            "bpf.ns_per_event",
            &ebb.per_event,
            "BPF time of a TCP state change: ebb",
        ),
        (
            "bpf.ns_per_event_draining",
            &draining.per_event,
            "… while another pod drains",
        ),
        (
            "bpf.ns_empty",
            &empty.per_event,
            "… an empty program at the same hook",
        ),
        (
            "bpf.ns_per_connection",
            &ebb.per_connection,
            "BPF time of a connection, both of its sockets together: ebb",
        ),
        (
            "bpf.ns_per_connection_draining",
            &draining.per_connection,
            "… while another pod drains",
        ),
        (
            "bpf.ns_per_connection_empty",
            &empty.per_connection,
            "… an empty program at the same hook",
        ),
    ] {
        results.add_interval(key, stats::interval(values)?, "ns", what, Goal::None)?;
    }
    let what = "time of a state change, ebb ÷ empty";
    let ratio = stats::ratio_interval(&ebb.per_event, &empty.per_event)?;
    results.add_interval("bpf.ratio", ratio, "", what, AtMost(2.0))?;
    let what = "… while another pod drains";
    let ratio = stats::ratio_interval(&draining.per_event, &empty.per_event)?;
    results.add_interval("bpf.ratio_draining", ratio, "", what, AtMost(2.0))?;
    let what = "state changes measured";
    results.add("bpf.events", events as f64, "", what, Goal::None)
}

/// Statistics of the program that the helper has attached.
fn runs(helper: &Helper) -> Result<Runs> {
    match helper {
        Helper::Empty(programs) => programs.empty_runs(),
        Helper::Ebb(agent) | Helper::Draining(agent, _) => track_runs(agent),
        _ => anyhow::bail!("this helper has no program"),
    }
}

fn track_runs(agent: &AgentProcess) -> Result<Runs> {
    let runs = bpf::runs_of_process(agent.pid())?;
    let track = runs.into_iter().find(|r| r.name == TRACK);
    track.with_context(|| format!("the agent has no program {TRACK}"))
}
