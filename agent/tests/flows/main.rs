//! ebb's counters and classes against the running kernel, case by case.
//!
//! Every trial drives real sockets, in a network namespace and a cgroup of its own, into one of the situations that TCP
//! has, and demands that four readings agree: the counters of the BPF programs, the flows of a look, and two that know
//! nothing of ebb: `/proc/net/tcp`, which the kernel prints from its tables without sock_diag, and sock_diag as `ss` reads
//! it. All run in one sandbox with one tracker; those that are about its start have their own.

#![expect(clippy::unwrap_used, reason = "tests")]

/// A list of trials, each named after its function.
macro_rules! trials {
    ($($function:ident),* $(,)?) => {
        pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$($crate::support::steps::trial(stringify!($function), $function)),*]
        }
    };
}

mod answers;
mod audit;
mod churn;
mod closing;
mod dialling;
mod draining;
mod handing_over;
mod kinds;
mod lookups;
mod opening;
mod ownership;
mod probes;
mod seeding;
mod settling;
mod support;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use support::{cgroup, kernel, puppet};

fn main() -> ExitCode {
    if let Some(code) = ebb_node::helpers::dispatch().or_else(puppet::dispatch) {
        return code;
    }
    let mut arguments = Arguments::from_args();
    // Most trials wait for a timer most of the time.
    arguments.test_threads.get_or_insert(6);
    if arguments.list {
        return libtest_mimic::run(&arguments, trials()).exit_code();
    }
    ebb_node::sandbox::end_with_parent();
    ebb_node::sandbox::inside(|| {
        if let Err(error) = cgroup::of_trials() {
            eprintln!("before all trials: {error:#}");
            return ExitCode::FAILURE;
        }
        let done = libtest_mimic::run(&arguments, trials());
        if let Err(error) = kernel::nothing_lost() {
            eprintln!("after all trials: {error:#}");
            return ExitCode::FAILURE;
        }
        done.exit_code()
    })
}

fn trials() -> Vec<Trial> {
    [
        // The long ones first, so that the short ones fill the time.
        answers::trials(),
        settling::trials(),
        probes::trials(),
        opening::trials(),
        closing::trials(),
        dialling::trials(),
        draining::trials(),
        handing_over::trials(),
        kinds::trials(),
        audit::trials(),
        ownership::trials(),
        seeding::trials(),
        lookups::trials(),
        churn::trials(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
