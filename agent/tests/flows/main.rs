//! ebb's counters and classes against the running kernel, case by case.
//!
//! Every trial drives real sockets, in a network namespace of its own, into one of the situations that TCP
//! has, and demands that three readings agree: the counters of the BPF programs, the flows of a look, and
//! `/proc/net/tcp`, which knows nothing of ebb. All run in one sandbox with one tracker; those that are about
//! its start have their own.

#![expect(clippy::unwrap_used, reason = "tests")]

/// A list of trials, each named after its function.
macro_rules! trials {
    ($($function:ident),* $(,)?) => {
        pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$(libtest_mimic::Trial::test(stringify!($function), || {
                $crate::support::kernel::failed($function())
            })),*]
        }
    };
}

mod answers;
mod churn;
mod closing;
mod handing_over;
mod kinds;
mod opening;
mod seeding;
mod support;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use support::{kernel, puppet};

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
        opening::trials(),
        closing::trials(),
        handing_over::trials(),
        kinds::trials(),
        seeding::trials(),
        churn::trials(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
