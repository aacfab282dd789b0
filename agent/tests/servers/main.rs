//! The states that ebb gives to the connections of real servers and real clients at each step of their protocols, and what
//! a drain with `until: idle` or `idle-flows: close` does to them.
//!
//! Each trial has a pod of its own: a network namespace and a cgroup. Its clients are in another namespace, at the other
//! end of a link. All trials run in one sandbox with one tracker and one driver of drains. What a trial shows of a
//! protocol is a row of the table in docs/until.md, and the trial demands that row.

#![expect(clippy::unwrap_used, reason = "tests")]

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
    if let Some(code) = ebb_testkit::helpers::dispatch().or_else(server::dispatch) {
        return code;
    }
    let mut arguments = Arguments::from_args();
    // Most trials spend most of their time waiting for a timer.
    arguments.test_threads.get_or_insert(8);
    if arguments.list {
        return libtest_mimic::run(&arguments, trials()).exit_code();
    }
    ebb_testkit::sandbox::end_with_parent();
    ebb_testkit::sandbox::inside(|| {
        let done = libtest_mimic::run(&arguments, trials());
        if let Err(error) = support::drains::lost_nothing() {
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
