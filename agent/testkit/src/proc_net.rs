//! The TCP sockets of a network namespace from `/proc/PID/net/tcp` and `tcp6`, without any code of ebb.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result};

// States as `/proc/net/tcp` prints them (include/net/tcp_states.h).
const ESTABLISHED: u8 = 1;
const FIN_WAIT2: u8 = 5;
const TIME_WAIT: u8 = 6;
const LISTEN: u8 = 10;

/// One socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    /// Its own address. IPv4-mapped ones are returned as IPv4.
    pub local: SocketAddr,
    /// The other end's address.
    pub remote: SocketAddr,
    /// The kernel's number of the state; request sockets show as SYN_RECV (3).
    pub state: u8,
    /// 0: no process has a descriptor of it.
    pub inode: u64,
}

/// All TCP sockets of the calling thread's namespace.
///
/// # Errors
///
/// The kernel's tables can't be read.
pub fn rows() -> Result<Vec<Row>> {
    rows_of("thread-self")
}

/// Local and remote address of each established connection to a local port in the namespace of a process.
///
/// # Errors
///
/// The process is gone.
pub fn established(pid: u32, port: u16) -> Result<BTreeSet<(SocketAddr, SocketAddr)>> {
    let rows = rows_of(&pid.to_string())?.into_iter();
    let wanted = rows.filter(|row| row.local.port() == port && row.state == ESTABLISHED);
    Ok(wanted.map(|row| (row.local, row.remote)).collect())
}

/// Whether no connection to a local port is left in the namespace of a process.
///
/// # Errors
///
/// The process is gone.
pub fn is_quiet(pid: u32, port: u16) -> Result<bool> {
    let over = [FIN_WAIT2, TIME_WAIT, LISTEN];
    let mut rows = rows_of(&pid.to_string())?.into_iter();
    Ok(rows.all(|row| row.local.port() != port || over.contains(&row.state)))
}

fn rows_of(process: &str) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for table in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/{process}/net/{table}"))?;
        for line in text.lines().skip(1) {
            rows.push(row(line).with_context(|| format!("in {table}: {line:?}"))?);
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

/// `0100007F:1F90`: the address as words in the machine's byte order, the port as a number (proc_net(5)).
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let mut bytes = Vec::new();
    for word in ip.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let ip: IpAddr = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(v4) => v4.into(),
        Err(_) => <[u8; 16]>::try_from(bytes.as_slice()).ok()?.into(),
    };
    let port = u16::from_str_radix(port, 16).ok()?;
    Some(SocketAddr::new(ip.to_canonical(), port))
}
