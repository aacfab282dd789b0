//! A reading of sock_diag by another program: `ss`, of iproute2. ebb's dumps come from sock_diag, too, but `ss` has none of
//! its code.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use ebb_testkit::proc_net::Row;

/// All TCP sockets of the calling thread's namespace.
pub(crate) fn rows() -> Result<Vec<Row>> {
    let out = Command::new("ss").arg("-tanHe").output()?;
    let text = String::from_utf8(out.stdout)?;
    let error = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "ss: {}", error.trim());
    text.lines()
        .map(|line| row(line).with_context(|| format!("in {line:?}")))
        .collect()
}

fn row(line: &str) -> Option<Row> {
    let mut fields = line.split_ascii_whitespace();
    let state = match fields.next()? {
        "ESTAB" => 1,
        "SYN-SENT" => 2,
        "SYN-RECV" => 3,
        "FIN-WAIT-1" => 4,
        "FIN-WAIT-2" => 5,
        "TIME-WAIT" => 6,
        "UNCONN" => 7,
        "CLOSE-WAIT" => 8,
        "LAST-ACK" => 9,
        "LISTEN" => 10,
        "CLOSING" => 11,
        _ => return None,
    };
    let (local, remote) = (fields.nth(2)?, fields.next()?);
    let inode = fields.find_map(|field| field.strip_prefix("ino:"));
    Some(Row {
        local: address(local)?,
        remote: address(remote)?,
        state,
        // A socket without a descriptor has none.
        inode: inode.map_or(Some(0), |n| n.parse().ok())?,
    })
}

/// `*` is any port or, alone, any address of a dual-stack socket. The name of an interface is left out.
fn address(text: &str) -> Option<std::net::SocketAddr> {
    let (ip, port) = text.rsplit_once(':')?;
    let ip = ip.trim_matches(['[', ']']);
    let ip = ip.split('%').next()?;
    let ip: std::net::IpAddr = if ip == "*" {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    } else {
        ip.parse().ok()?
    };
    let port = if port == "*" { 0 } else { port.parse().ok()? };
    Some((ip.to_canonical(), port).into())
}
