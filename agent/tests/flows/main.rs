//! Compares ebb's counters and flow states with the running kernel, case by case.
//!
//! Every trial brings real sockets, in a network namespace and a cgroup of its own, into one of the situations that TCP
//! has, and demands that four readings agree: the counters of the BPF programs, the flows of a dump, and two without any
//! code of ebb: `/proc/net/tcp`, which the kernel prints from its tables without sock_diag, and sock_diag as `ss` reads
//! it. All trials run in one sandbox. They share one tracker, except those that test its start.

#![expect(clippy::unwrap_used, reason = "tests")]

mod answers;
mod churn;
mod closing;
mod dialling;
mod direction;
mod disguises;
mod draining;
mod handing_over;
mod kinds;
mod lookups;
mod opening;
mod ownership;
mod probes;
mod settling;
mod starting;
mod support;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use support::{cgroup, kernel, worker};

fn main() -> ExitCode {
    if let Some(code) = ebb_testkit::helpers::dispatch().or_else(worker::dispatch) {
        return code;
    }
    let mut arguments = Arguments::from_args();
    // Most trials spend most of their time waiting for a timer.
    arguments.test_threads.get_or_insert(6);
    if arguments.list {
        return libtest_mimic::run(&arguments, trials()).exit_code();
    }
    ebb_testkit::sandbox::end_with_parent();
    ebb_testkit::sandbox::inside(|| {
        if let Err(error) = cgroup::enter_trials() {
            eprintln!("before all trials: {error:#}");
            return ExitCode::FAILURE;
        }
        let done = libtest_mimic::run(&arguments, trials());
        if let Err(error) = kernel::shared_lost_nothing() {
            eprintln!("after all trials: {error:#}");
            return ExitCode::FAILURE;
        }
        done.exit_code()
    })
}

fn trials() -> Vec<Trial> {
    [
        // The longest first, so that the short ones run beside them.
        answers::trials(),
        settling::trials(),
        disguises::trials(),
        probes::trials(),
        opening::trials(),
        closing::trials(),
        dialling::trials(),
        draining::trials(),
        handing_over::trials(),
        direction::trials(),
        kinds::trials(),
        ownership::trials(),
        starting::trials(),
        lookups::trials(),
        churn::trials(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
