//! ebb on a real node: real BPF programs in the running kernel, a real containerd with real containers,
//! real servers and clients, and `ebb` run by its command line, as users run it.
//!
//! There are two nodes ([`ebb_testkit::sandbox`]), each in a process of its own, which are gone when the processes end.
//! Most trials share one: each starts its own agents, proxies and pods, so trials run in parallel; they spend most of
//! their time waiting. Trials that need a node to themselves run one after another on the other node.
//!
//! Needs root, and fails without it.

mod advise;
mod agent;
mod daemonset;
mod doctor;
mod grace_period;
mod hand_over;
mod hold;
mod images;
mod kube;
mod kube_events;
mod kube_faults;
mod lifecycle;
mod lists;
mod lookups;
mod node_shutdown;
mod not_held;
mod notify;
mod observe;
mod off_node;
mod peer;
mod pod_gone;
mod pods;
mod probe;
mod refuse;
mod repeated_stop;
mod runtime;
mod sandbox_recreated;
mod scene;
mod schema;
mod settings;
mod settle;
mod sidecar;
mod state;
mod telemetry;
mod top;
mod traces;
mod track;
mod upgrade;
mod verbs;
mod wait;
mod wait_limits;
mod wait_port;

use std::{
    env,
    io::{self, BufRead as _, BufReader},
    process::{Command, ExitCode, Stdio},
};

use ebb_testkit::{helpers, sandbox};
use libtest_mimic::{Arguments, Trial};

/// More than there are cores, because trials mostly wait.
const PARALLEL_TRIALS: usize = 8;

/// The variable that names the process's trials: [`SHARED`] or [`ALONE`]. Without it, the process starts both.
const WHICH: &str = "EBB_NODE_TRIALS";
/// The trials that share a node.
const SHARED: &str = "shared";
/// The trials that have a node to themselves.
pub(crate) const ALONE: &str = "alone";

fn main() -> ExitCode {
    if let Some(code) = helpers::dispatch() {
        return code;
    }
    let mut arguments = Arguments::from_args();
    if arguments.list {
        return libtest_mimic::run(&arguments, trials()).exit_code();
    }
    sandbox::end_with_parent();
    let Some(which) = env::var_os(WHICH) else {
        return both().unwrap_or_else(|e| {
            eprintln!("error: can't run the trials: {e}");
            ExitCode::FAILURE
        });
    };
    let alone = which == ALONE;
    match alone {
        true => arguments.test_threads = Some(1),
        false => _ = arguments.test_threads.get_or_insert(PARALLEL_TRIALS),
    }
    let mut trials = trials();
    trials.retain(|trial| (trial.kind() == ALONE) == alone);
    sandbox::inside(|| libtest_mimic::run(&arguments, trials).exit_code())
}

/// Runs the trials that share a node, and beside them those that have one to themselves.
fn both() -> io::Result<ExitCode> {
    let start = |which, output| {
        Command::new(env::current_exe()?)
            .args(env::args_os().skip(1))
            .env(WHICH, which)
            .stdout(output)
            .spawn()
    };
    let mut shared = start(SHARED, Stdio::inherit())?;
    let mut alone = start(ALONE, Stdio::piped())?;
    // By whole lines, because the other process writes to the same file.
    for line in alone
        .stdout
        .take()
        .into_iter()
        .flat_map(|out| BufReader::new(out).lines())
    {
        println!("{}", line?);
    }
    let all = [shared.wait()?, alone.wait()?];
    Ok(match all.iter().all(|status| status.success()) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn trials() -> Vec<Trial> {
    // The longest first.
    let subjects = [
        daemonset::trials(),
        lifecycle::trials(),
        hold::trials(),
        images::trials(),
        kube_faults::trials(),
        kube::trials(),
        grace_period::trials(),
        kube_events::trials(),
        repeated_stop::trials(),
        pod_gone::trials(),
        notify::trials(),
        verbs::trials(),
        advise::trials(),
        observe::trials(),
        sidecar::trials(),
        settings::trials(),
        settle::trials(),
        probe::trials(),
        wait::trials(),
        lists::trials(),
        lookups::trials(),
        state::trials(),
        telemetry::trials(),
        top::trials(),
        traces::trials(),
        track::trials(),
        upgrade::trials(),
        node_shutdown::trials(),
        not_held::trials(),
        doctor::trials(),
        pods::trials(),
        refuse::trials(),
        hand_over::trials(),
        wait_limits::trials(),
        wait_port::trials(),
        sandbox_recreated::trials(),
        runtime::trials(),
    ];
    subjects.into_iter().flatten().collect()
}
