//! `churn`: throughput and CPU time of nginx and wrk with one connection per request.
//!
//! BPF statistics stay off: with them, the kernel reads its clock twice for each run of a program.

use std::{thread::sleep, time::Duration};

use anyhow::Result;

use crate::{
    beside::{Beside, DrainingPod, Helper},
    load::{self, ConnectionUse, LoadResult},
    results::{BenchResults, Goal, IntervalAtMost},
    say,
    stats::{self, Shuffle},
    testbed::Testbed,
};

/// The pause between a helper's start and the load, so that the cost of starting is not measured.
const SETTLE: Duration = Duration::from_millis(500);

/// How long a load lasts. Short loads keep the machine's drift between two of them small.
const WINDOW: Duration = Duration::from_secs(1);

/// Rounds vary by more than the difference to be found, so this part takes more of them than others.
const ROUNDS_PER_PAIR: usize = 2;

const NOTHING: usize = 0;
const EMPTY: usize = 1;
const EBB: usize = 2;
const DRAINING: usize = 3;
const TCPSTATES: usize = 4;
const SS: usize = 5;

/// Each round measures all of them in a random order, so that drift of the machine affects all alike.
pub(crate) fn measure(testbed: &Testbed, results: &mut BenchResults) -> Result<()> {
    let (nginx, server) = testbed.nginx()?;
    let pid = testbed.sandbox_pid(&nginx)?;
    let draining = DrainingPod::start(testbed)?;
    say(
        "a connection per request: nginx and wrk with nothing, an empty program, ebb, ebb while another pod drains, a \
         classic tool, and ss beside them, in turns",
    );
    let all = [
        Beside::Nothing,
        Beside::Empty,
        Beside::Ebb,
        Beside::Draining,
        Beside::Tcpstates,
        Beside::Ss(pid),
    ];
    let mut loads: [Vec<LoadResult>; 6] = Default::default();
    let mut shuffle = Shuffle::default();
    load::wrk(testbed, server, ConnectionUse::Close, WINDOW)?;
    for round in 0..testbed.scale.pairs * ROUNDS_PER_PAIR {
        let mut order = [NOTHING, EMPTY, EBB, DRAINING, TCPSTATES, SS];
        shuffle.shuffle(&mut order);
        for which in order {
            // No goal depends on these two: one round per pair suffices.
            if matches!(which, TCPSTATES | SS) && round % ROUNDS_PER_PAIR != 0 {
                continue;
            }
            let helper = Helper::start(testbed, all[which], &draining)?;
            sleep(SETTLE);
            let load = load::wrk(testbed, server, ConnectionUse::Close, WINDOW)?;
            helper.stop()?;
            loads[which].push(load);
        }
    }
    draining.end(testbed)?;
    testbed.end(&nginx)?;
    report(&loads, results)
}

fn report(loads: &[Vec<LoadResult>; 6], results: &mut BenchResults) -> Result<()> {
    let rps = |which: usize| column(&loads[which], |l| l.rps);
    let cpu = |which: usize| column(&loads[which], |l| l.cpu_us);
    let what = "requests per second with nothing beside";
    let value = stats::median(&rps(NOTHING))?;
    results.add("churn.rps", value, "/s", what, Goal::None)?;
    let what = "CPU time of a request with nothing beside, of all processes of the node";
    let value = stats::median(&cpu(NOTHING))?;
    results.add("churn.cpu_us", value, "µs", what, Goal::None)?;
    for (which, key, name) in [
        (EBB, "churn.ebb_to_empty_cpu_ratio", "ebb"),
        (
            DRAINING,
            "churn.draining_to_empty_cpu_ratio",
            "ebb while another pod drains",
        ),
    ] {
        let what = format!("CPU time of a request ÷ with an empty program: {name}");
        let ratio = stats::ratio_interval(&cpu(which), &cpu(EMPTY))?;
        results.add_interval(key, ratio, "", what, IntervalAtMost(1.0))?;
    }
    for (which, rps_key, cpu_key, name) in [
        (EBB, "churn.rps_ratio", "churn.cpu_ratio", "ebb"),
        (
            EMPTY,
            "churn.empty_rps_ratio",
            "churn.empty_cpu_ratio",
            "an empty program at the same hook",
        ),
        (
            TCPSTATES,
            "churn.peer_rps_ratio",
            "churn.peer_cpu_ratio",
            "an event and a line for each state change (after tcpstates)",
        ),
        (
            SS,
            "churn.ss_rps_ratio",
            "churn.ss_cpu_ratio",
            "`ss -tin` once a second in the pod's namespace",
        ),
    ] {
        // Only the rounds in which this one was measured.
        let every = loads[NOTHING].len() / loads[which].len();
        let nothing = |values: Vec<f64>| values.into_iter().step_by(every).collect::<Vec<_>>();
        let what = format!("requests per second ÷ nothing: {name}");
        let ratio = stats::ratio_interval(&rps(which), &nothing(rps(NOTHING)))?;
        results.add_interval(rps_key, ratio, "", what, Goal::None)?;
        let what = format!("CPU time of a request ÷ nothing: {name}");
        let ratio = stats::ratio_interval(&cpu(which), &nothing(cpu(NOTHING)))?;
        results.add_interval(cpu_key, ratio, "", what, Goal::None)?;
    }
    Ok(())
}

fn column(loads: &[LoadResult], f: fn(&LoadResult) -> f64) -> Vec<f64> {
    loads.iter().map(f).collect()
}
