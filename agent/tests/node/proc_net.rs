//! The connections of a network namespace from `/proc/PID/net/tcp`, independent of ebb's own dump.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context as _, Result};

// States as `/proc/net/tcp` prints them (include/net/tcp_states.h).
const ESTABLISHED: &str = "01";
const FIN_WAIT2: &str = "05";
const TIME_WAIT: &str = "06";
const LISTEN: &str = "0A";

/// Local and remote address of each established connection to a local port in the namespace of a process.
/// IPv4-mapped addresses are returned as IPv4.
pub(crate) fn established(pid: u32, port: u16) -> Result<BTreeSet<(SocketAddr, SocketAddr)>> {
    of_states(pid, port, |state| state == ESTABLISHED)
}

/// Whether no connection to a local port is left in the namespace of a process.
pub(crate) fn is_quiet(pid: u32, port: u16) -> Result<bool> {
    let over = [FIN_WAIT2, TIME_WAIT, LISTEN];
    Ok(of_states(pid, port, |state| !over.contains(&state))?.is_empty())
}

fn of_states(
    pid: u32,
    port: u16,
    wanted: impl Fn(&str) -> bool,
) -> Result<BTreeSet<(SocketAddr, SocketAddr)>> {
    let mut found = BTreeSet::new();
    for table in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/{pid}/net/{table}"))?;
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, local, remote, state, ..] = fields[..] else {
                continue;
            };
            let (local, remote) = (address(local)?, address(remote)?);
            if wanted(state) && local.port() == port {
                found.insert((local, remote));
            }
        }
    }
    Ok(found)
}

/// `0100007F:1F90`: the address as 32-bit words in host byte order, the port as a number (proc_net(5)).
fn address(text: &str) -> Result<SocketAddr> {
    let (address, port) = text.split_once(':').context("no port")?;
    let mut bytes = Vec::new();
    for at in (0..address.len()).step_by(8) {
        bytes.extend(u32::from_str_radix(&address[at..at + 8], 16)?.to_ne_bytes());
    }
    let ip = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(v4) => IpAddr::V4(Ipv4Addr::from(v4)),
        Err(_) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.as_slice())?)),
    };
    Ok(SocketAddr::new(
        ip.to_canonical(),
        u16::from_str_radix(port, 16)?,
    ))
}
