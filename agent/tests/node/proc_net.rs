//! The kernel's own table of a network namespace, by another road than ebb's: `/proc/PID/net/tcp`.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context as _, Result};

/// TCP_ESTABLISHED as `/proc/net/tcp` has it.
const ESTABLISHED: &str = "01";

/// Both ends of the established connections to a local port in the namespace of a process, with IPv4 in
/// IPv6 as IPv4.
pub(crate) fn established(pid: u32, port: u16) -> Result<BTreeSet<(SocketAddr, SocketAddr)>> {
    let mut found = BTreeSet::new();
    for table in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/{pid}/net/{table}"))?;
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, local, remote, state, ..] = fields[..] else {
                continue;
            };
            let (local, remote) = (address(local)?, address(remote)?);
            if state == ESTABLISHED && local.port() == port {
                found.insert((local, remote));
            }
        }
    }
    Ok(found)
}

/// `0100007F:1F90`: 32-bit words in the machine's byte order, the port in the usual one (proc_net(5)).
fn address(text: &str) -> Result<SocketAddr> {
    let (words, port) = text.split_once(':').context("no port")?;
    let mut bytes = Vec::new();
    for at in (0..words.len()).step_by(8) {
        bytes.extend(u32::from_str_radix(&words[at..at + 8], 16)?.to_ne_bytes());
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
