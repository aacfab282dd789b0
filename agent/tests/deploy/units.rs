//! The proxy's systemd units.

use clap::CommandFactory as _;
use clap::Parser as _;
use ebb_cri_proxy::ProxyCli;

use crate::{default_of, manifest::read};

/// The values of `key` in a systemd unit.
fn unit<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    text.lines()
        .filter_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        .collect()
}

#[test]
fn the_units_start_the_installed_proxy_on_its_default_socket() {
    let service = read("deploy/systemd/ebb-cri.service");
    let command: Vec<&str> = unit(&service, "ExecStart")[0].split(' ').collect();
    assert_eq!(command[0], "/opt/ebb/bin/ebb-cri-proxy");
    ProxyCli::try_parse_from(&command).map(drop).unwrap();
    let socket = read("deploy/systemd/ebb-cri.socket");
    let flags = ProxyCli::command();
    let listen = default_of(&flags, "listen");
    assert_eq!(unit(&socket, "ListenStream"), [listen]);
    assert_eq!(unit(&service, "Requires"), ["ebb-cri.socket"]);
    assert_eq!(unit(&service, "Restart"), ["always"]);
    // systemd must not kill a proxy that still waits for answers.
    let seconds = |text: &str| -> u64 { text.trim_end_matches('s').parse().unwrap() };
    let waits = seconds(&default_of(&flags, "stop-within"));
    assert!(seconds(unit(&service, "TimeoutStopSec")[0]) > waits + 5);
    let limit = format!("TimeoutStopSec={}", unit(&service, "TimeoutStopSec")[0]);
    let mut args = flags.get_arguments();
    let flag = args.find(|a| a.get_long() == Some("stop-within")).unwrap();
    let help = flag.get_help().unwrap().to_string();
    assert!(help.contains(&limit), "{limit} is not in the help: {help}");
    for text in [&service, &socket] {
        assert_eq!(unit(text, "Before"), ["kubelet.service"]);
    }
}

#[test]
fn systemd_never_stops_restarting_the_proxy_and_its_socket() {
    let service = read("deploy/systemd/ebb-cri.service");
    assert_eq!(unit(&service, "StartLimitIntervalSec"), ["0"]);
    let socket = read("deploy/systemd/ebb-cri.socket");
    assert_eq!(unit(&socket, "TriggerLimitIntervalSec"), ["0"]);
}
