//! The proxy's systemd units.

use clap::CommandFactory as _;
use clap::Parser as _;
use ebb::cli::Cli;

use crate::{default, manifest::read};

/// The values of `key` in a systemd unit.
fn unit<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    text.lines()
        .filter_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        .collect()
}

#[test]
fn the_units_start_the_proxy_that_there_is_on_the_socket_that_it_expects() {
    let service = read("deploy/systemd/ebb-cri.service");
    let command: Vec<&str> = unit(&service, "ExecStart")[0].split(' ').collect();
    assert_eq!(command[0], "/opt/ebb/bin/ebb");
    Cli::try_parse_from(&command).map(drop).unwrap();
    let socket = read("deploy/systemd/ebb-cri.socket");
    assert_eq!(
        unit(&socket, "ListenStream"),
        [default("cri-proxy", "listen")]
    );
    assert_eq!(unit(&service, "Requires"), ["ebb-cri.socket"]);
    assert_eq!(unit(&service, "Restart"), ["always"]);
    // systemd must not kill a proxy that still waits for answers.
    let seconds = |text: &str| -> u64 { text.trim_end_matches('s').parse().unwrap() };
    let waits = seconds(&default("cri-proxy", "stop-within"));
    assert!(seconds(unit(&service, "TimeoutStopSec")[0]) > waits + 5);
    let limit = format!("TimeoutStopSec={}", unit(&service, "TimeoutStopSec")[0]);
    let command = Cli::command();
    let mut args = command
        .find_subcommand("cri-proxy")
        .unwrap()
        .get_arguments();
    let flag = args.find(|a| a.get_long() == Some("stop-within")).unwrap();
    let help = flag.get_help().unwrap().to_string();
    assert!(help.contains(&limit), "{limit} is not told: {help}");
    for text in [&service, &socket] {
        assert_eq!(unit(text, "Before"), ["kubelet.service"]);
    }
}

#[test]
fn systemd_gives_neither_the_proxy_nor_its_socket_up() {
    let service = read("deploy/systemd/ebb-cri.service");
    assert_eq!(unit(&service, "StartLimitIntervalSec"), ["0"]);
    let socket = read("deploy/systemd/ebb-cri.socket");
    assert_eq!(unit(&socket, "TriggerLimitIntervalSec"), ["0"]);
}
