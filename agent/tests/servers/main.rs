//! What ebb calls the connections of real servers and real clients at each step of their protocols, and what a
//! drain with `until: idle` or `idle-flows: close` does to them.
//!
//! Each trial has a pod of its own: a network namespace and a cgroup, with clients in another namespace at the
//! other end of a link. All run in one sandbox with one tracker and one driver of drains. What a trial finds out
//! about a protocol is a row of the table in README.md, and it demands that the row is there.

#![expect(clippy::unwrap_used, reason = "tests")]

/// A list of trials, each named after its function.
macro_rules! trials {
    ($($function:ident),* $(,)?) => {
        pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$($crate::support::steps::trial(stringify!($function), $function)),*]
        }
    };
}

mod close;
mod grpc;
mod http1;
mod http2;
mod postgres;
mod redis_server;
mod server;
mod support;
mod tls;
mod web_socket;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let helper = ebb_node::helpers::dispatch()
        .or_else(support::puppet::dispatch)
        .or_else(server::dispatch);
    if let Some(code) = helper {
        return code;
    }
    let mut arguments = Arguments::from_args();
    // Most trials wait for a timer most of the time.
    arguments.test_threads.get_or_insert(8);
    if arguments.list {
        return libtest_mimic::run(&arguments, trials()).exit_code();
    }
    ebb_node::sandbox::end_with_parent();
    ebb_node::sandbox::inside(|| {
        let done = libtest_mimic::run(&arguments, trials());
        if let Err(error) = support::drains::nothing_lost() {
            eprintln!("after all trials: {error:#}");
            return ExitCode::FAILURE;
        }
        done.exit_code()
    })
}

fn trials() -> Vec<Trial> {
    let subjects = [
        close::trials(),
        http1::trials(),
        grpc::trials(),
        http2::trials(),
        web_socket::trials(),
        postgres::trials(),
        redis_server::trials(),
        tls::trials(),
    ];
    subjects.into_iter().flatten().collect()
}
