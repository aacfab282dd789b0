//! Runs each bench with `--quick` and checks that every key has a plausible number. `cargo xtask bench` is for real
//! measurements.
//!
//! Needs the `ebb` binary of the same profile, which `cargo test --workspace` builds.

use std::{path::Path, process::Command};

use serde_json::Value;

/// A key, and the least and the greatest value that it may have.
type Range = (&'static str, f64, f64);

/// More than any result here can be: an hour in microseconds, more memory than a small node has.
const MOST: f64 = 3.6e9;

/// The least time and the least ratio that can be measured.
const SOME: f64 = 1e-3;

#[test]
fn bench_flows_reports_every_key() {
    check(
        "flows",
        &[
            ("bpf.ns_per_event", 1.0, 1e6),
            ("bpf.ns_per_event_low", 1.0, 1e6),
            ("bpf.ns_per_event_high", 1.0, 1e6),
            ("bpf.ns_per_event_draining", 1.0, 1e6),
            ("bpf.ns_empty", 1.0, 1e6),
            ("bpf.ratio", SOME, 1e3),
            ("bpf.ratio_draining", SOME, 1e3),
            ("bpf.ns_per_connection", 1.0, 1e6),
            ("bpf.ns_per_connection_draining", 1.0, 1e6),
            ("bpf.ns_per_connection_empty", 1.0, 1e6),
            ("churn.rps", 1.0, MOST),
            ("churn.rps_ratio", SOME, 1e3),
            ("churn.cpu_ratio", SOME, 1e3),
            ("churn.ebb_to_empty_cpu_ratio", SOME, 1e3),
            ("churn.ebb_to_empty_cpu_ratio_low", SOME, 1e3),
            ("churn.ebb_to_empty_cpu_ratio_high", SOME, 1e3),
            ("churn.draining_to_empty_cpu_ratio", SOME, 1e3),
            ("churn.empty_rps_ratio", SOME, 1e3),
            ("churn.empty_cpu_ratio", SOME, 1e3),
            ("churn.peer_rps_ratio", SOME, 1e3),
            ("churn.peer_cpu_ratio", SOME, 1e3),
            ("churn.ss_rps_ratio", SOME, 1e3),
            ("churn.ss_cpu_ratio", SOME, 1e3),
            ("keepalive.rps_ratio", SOME, 1e3),
            // A program that ran per request would run 500 times.
            ("keepalive.bpf_runs", 0.0, 100.0),
            ("keepalive.requests", 500.0, 500.0),
            ("keepalive.connections", 64.0, 64.0),
            ("list_100k.ebb_ms", SOME, 1e5),
            ("list_100k.ss_ms", SOME, 1e5),
            ("release.p50_us", 1.0, 1e7),
            ("release.p99_us", 1.0, 1e7),
            ("release.outside_p50_us", 1.0, 1e7),
            ("seed_100k.ready_ms", 1.0, 6e4),
            ("memory.agent_idle_mib", 1.0, 1e4),
            ("memory.agent_100k_mib", 1.0, 1e4),
            ("memory.bytes_per_flow_agent", 0.0, 1e6),
            // ebb stores nothing per connection.
            ("memory.kernel_bytes_per_flow", 0.0, 0.0),
            ("memory.kernel_maps_mib", SOME, 64.0),
            ("machine.cores", 1.0, 1e4),
        ],
    );
}

#[test]
fn bench_cri_reports_every_key() {
    check(
        "cri",
        &[
            ("cri.direct_p50_us", 1.0, 1e7),
            ("cri.proxy_p50_us", 1.0, 1e7),
            ("cri.direct_p99_us", 1.0, 1e7),
            ("cri.proxy_p99_us", 1.0, 1e7),
            ("cri.list200_direct_p50_us", 1.0, 1e7),
            ("cri.list200_proxy_p50_us", 1.0, 1e7),
            ("cri.list200_direct_p99_us", 1.0, 1e7),
            ("cri.list200_proxy_p99_us", 1.0, 1e7),
            ("cri.held500_rss_mib", 1.0, 1e4),
            ("machine.cores", 1.0, 1e4),
        ],
    );
}

fn check(what: &str, ranges: &[Range]) {
    let bench = Path::new(env!("CARGO_BIN_EXE_ebb-bench"));
    let ebb = bench.with_file_name("ebb");
    assert!(
        ebb.exists(),
        "{} is missing: cargo build --package ebb",
        ebb.display()
    );
    let output = Command::new(bench)
        .arg(what)
        .arg("--ebb")
        .arg(ebb)
        .args(["--json", "--quick"])
        .output()
        .expect("the bench starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    // One document and nothing else.
    let document: Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    for (key, least, most) in ranges {
        let found = key.split('.').fold(&document, |value, part| &value[part]);
        let number = found.as_f64();
        assert!(
            number.is_some_and(|n| (*least..=*most).contains(&n)),
            "{key} is {found}, which is not between {least} and {most}"
        );
    }
    for key in ["kernel", "cpu"] {
        assert!(document["machine"][key].is_string(), "no machine.{key}");
    }
}
