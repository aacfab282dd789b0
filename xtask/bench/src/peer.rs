//! What people reach for who want to see connections: a tool that reports each TCP state change, as tcpstates of the
//! BCC collection does. A program at the tracepoint `sock:inet_sock_set_state` sends an event with a wake-up for each;
//! this side prints a line for each. It stands in for the original, which needs Python and a C compiler at run time
//! and would fare worse.

use std::{
    io::{BufWriter, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context as _, Result};
use aya::maps::RingBuf;
use rustix::event::{PollFd, PollFlags, poll};

use crate::bpf::Own;

const AF_INET: u16 = 2;

/// Prints a line for each state change until it is killed. Says `ready` on standard error once it sees them.
pub(crate) fn run() -> Result<()> {
    let mut own = Own::load(0)?;
    let mut ring = RingBuf::try_from(own.take_map("EVENTS")?)?;
    own.attach_transition()?;
    eprintln!("ready");
    let mut out = BufWriter::new(std::io::stdout().lock());
    loop {
        poll(&mut [PollFd::new(&ring, PollFlags::IN)], None)?;
        while let Some(event) = ring.next() {
            let line = line(&event).context("an event of the wrong size")?;
            out.write_all(line.as_bytes())?;
        }
        // A line is to be seen when it happens.
        out.flush()?;
    }
}

/// The event of `ebpf/src/main.rs`.
fn line(event: &[u8]) -> Option<String> {
    let u64_at = |at: usize| Some(u64::from_ne_bytes(event.get(at..at + 8)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_ne_bytes(event.get(at..at + 4)?.try_into().ok()?));
    let u16_at = |at: usize| Some(u16::from_ne_bytes(event.get(at..at + 2)?.try_into().ok()?));
    let family = u16_at(68)?;
    let ip = |at: usize| -> Option<IpAddr> {
        let wide: [u8; 16] = event.get(at..at + 16)?.try_into().ok()?;
        let [.., a, b, c, d] = wide;
        Some(if family == AF_INET {
            Ipv4Addr::new(a, b, c, d).into()
        } else {
            Ipv6Addr::from(wide).into()
        })
    };
    Some(format!(
        "{:<16x} {:<6} {:<39} {:<5} {:<39} {:<5} {:<11} -> {:<11} {:.3}\n",
        u64_at(8)?,
        u32_at(72)?,
        ip(32)?,
        u16_at(64)?,
        ip(48)?,
        u16_at(66)?,
        state(u32_at(24)?),
        state(u32_at(28)?),
        u64_at(16)? as f64 / 1e6,
    ))
}

fn state(n: u32) -> &'static str {
    const NAMES: [&str; 13] = [
        "?",
        "ESTABLISHED",
        "SYN_SENT",
        "SYN_RECV",
        "FIN_WAIT1",
        "FIN_WAIT2",
        "TIME_WAIT",
        "CLOSE",
        "CLOSE_WAIT",
        "LAST_ACK",
        "LISTEN",
        "CLOSING",
        "NEW_SYN_RECV",
    ];
    usize::try_from(n)
        .ok()
        .and_then(|n| NAMES.get(n))
        .copied()
        .unwrap_or("?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_becomes_a_line_with_both_ends_and_both_states() {
        let mut event = vec![0; 80];
        event[24..28].copy_from_slice(&1u32.to_ne_bytes());
        event[28..32].copy_from_slice(&8u32.to_ne_bytes());
        event[44..48].copy_from_slice(&[10, 0, 0, 1]);
        event[60..64].copy_from_slice(&[10, 0, 0, 2]);
        event[64..66].copy_from_slice(&80u16.to_ne_bytes());
        event[68..70].copy_from_slice(&AF_INET.to_ne_bytes());
        let line = line(&event).unwrap();
        for part in ["10.0.0.1", "10.0.0.2", " 80 ", "ESTABLISHED -> CLOSE_WAIT"] {
            assert!(line.contains(part), "{line}");
        }
        assert!(super::line(&event[..79]).is_some());
        assert_eq!(super::line(&event[..70]), None);
    }
}
