//! ebb on a real node: real BPF programs in the running kernel, a real containerd with real containers,
//! real servers and clients, and `ebb` run by its command line, as users run it.
//!
//! All trials share one node ([`ebb_testkit::sandbox`]), which is gone when the process ends. Each starts its own
//! agents, proxies and pods, so trials run in parallel; they spend most of their time waiting.
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
mod proc_net;
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

use std::process::ExitCode;

use ebb_testkit::{helpers, sandbox};
use libtest_mimic::{Arguments, Trial};

/// More than there are cores, because trials mostly wait.
const PARALLEL_TRIALS: usize = 8;

fn main() -> ExitCode {
    if let Some(code) = helpers::dispatch() {
        return code;
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(PARALLEL_TRIALS);
    if arguments.list {
        return libtest_mimic::run(&arguments, trials()).exit_code();
    }
    sandbox::end_with_parent();
    sandbox::inside(|| libtest_mimic::run(&arguments, trials()).exit_code())
}

fn trials() -> Vec<Trial> {
    // The longest first; the one that stops containerd last.
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
