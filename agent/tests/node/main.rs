//! ebb on a real node: real BPF programs in the running kernel, a real containerd with real containers,
//! real servers and clients, and `ebb` as its users have it, by its command line.
//!
//! All trials share one node ([`ebb_node::sandbox`]), which vanishes with the process. Each has agents,
//! proxies and pods of its own, so they run side by side; most of their time is waiting.
//!
//! Needs root, and fails without it.

mod agent;
mod hold;
mod life;
mod pass;
mod peer;
mod pods;
mod proc_net;
mod refuse;
mod runtime;
mod scene;
mod settle;
mod state;
mod track;
mod wait;

use std::process::ExitCode;

use ebb_node::{helpers, sandbox};
use libtest_mimic::{Arguments, Trial};

/// Trials wait more than they work.
const SIDE_BY_SIDE: usize = 12;

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
        life::trials(),
        hold::trials(),
        settle::trials(),
        wait::trials(),
        state::trials(),
        track::trials(),
        pass::trials(),
        pods::trials(),
        refuse::trials(),
        runtime::trials(),
    ];
    subjects.into_iter().flatten().collect()
}
