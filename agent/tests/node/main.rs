//! ebb on a real node: real BPF programs in the running kernel, a real containerd with real containers,
//! real servers and clients, and `ebb` as its users have it, by its command line.
//!
//! All trials share one node ([`ebb_node::sandbox`]), which vanishes with the process. Each has agents,
//! proxies and pods of its own, so they run side by side; most of their time is waiting.
//!
//! Needs root, and fails without it.

mod again;
mod agent;
mod daemonset;
mod doctor;
mod gone;
mod hold;
mod kube;
mod kube_faults;
mod kube_telling;
mod life;
mod lookups;
mod off_node;
mod pass;
mod peer;
mod pods;
mod probe;
mod proc_net;
mod refuse;
mod runtime;
mod scene;
mod settle;
mod sidecar;
mod state;
mod top;
mod track;
mod upgrade;
mod wait;
mod wait_limits;
mod wait_port;

use std::process::ExitCode;

use ebb_node::{helpers, sandbox};
use libtest_mimic::{Arguments, Trial};

/// Trials wait more than they work.
const SIDE_BY_SIDE: usize = 8;

fn main() -> ExitCode {
    if let Some(code) = helpers::dispatch() {
        return code;
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(SIDE_BY_SIDE);
    if arguments.list {
        return libtest_mimic::run(&arguments, trials()).exit_code();
    }
    sandbox::end_with_parent();
    sandbox::inside(|| libtest_mimic::run(&arguments, trials()).exit_code())
}

fn trials() -> Vec<Trial> {
    // The longest first; the one that needs the node for itself last.
    let subjects = [
        daemonset::trials(),
        life::trials(),
        hold::trials(),
        kube_faults::trials(),
        kube::trials(),
        kube_telling::trials(),
        again::trials(),
        gone::trials(),
        sidecar::trials(),
        settle::trials(),
        probe::trials(),
        wait::trials(),
        lookups::trials(),
        state::trials(),
        top::trials(),
        track::trials(),
        upgrade::trials(),
        pass::trials(),
        doctor::trials(),
        pods::trials(),
        refuse::trials(),
        wait_limits::trials(),
        wait_port::trials(),
        runtime::trials(),
    ];
    subjects.into_iter().flatten().collect()
}
