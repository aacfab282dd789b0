//! A reading of the kernel without any code of ebb: `/proc/net/tcp` and `tcp6`.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context as _, Result};

/// One socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Row {
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
    /// The kernel's number of the state; request sockets show as SYN_RECV (3).
    pub(crate) state: u8,
    /// 0: no process has a descriptor of it.
    pub(crate) inode: u64,
}

/// All TCP sockets of the calling thread's namespace.
pub(crate) fn rows() -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for file in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{file}"))?;
        for line in text.lines().skip(1) {
            rows.push(row(line).with_context(|| format!("in {file}: {line:?}"))?);
        }
    }
    Ok(rows)
}

fn row(line: &str) -> Option<Row> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    Some(Row {
        local: address(fields.get(1)?)?,
        remote: address(fields.get(2)?)?,
        state: u8::from_str_radix(fields.get(3)?, 16).ok()?,
        inode: fields.get(9)?.parse().ok()?,
    })
}

/// Addresses are printed as words in the machine's byte order, ports as numbers.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let mut bytes = Vec::new();
    for word in ip.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let ip = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(v4) => IpAddr::V4(Ipv4Addr::from(v4)),
        Err(_) => IpAddr::V6(<[u8; 16]>::try_from(bytes.as_slice()).ok()?.into()),
    };
    let ip = match ip {
        IpAddr::V6(v6) => Ipv6Addr::to_canonical(&v6),
        v4 => v4,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}
