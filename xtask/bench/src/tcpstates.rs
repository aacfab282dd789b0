//! A tool that prints each TCP state change, after BCC's tcpstates. A program at the tracepoint
//! `sock:inet_sock_set_state` sends an event per change and wakes this process, which prints a line per event. The
//! original needs Python and a C compiler at run time, and would cost more.

use std::{
    io::{BufWriter, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context as _, Result};
use aya::maps::RingBuf;
use rustix::event::{PollFd, PollFlags, poll};

use crate::bpf::BenchPrograms;

const AF_INET: u16 = 2;

/// Prints a line per state change until it is killed. Prints `ready` on standard error once it receives events.
pub(crate) fn run() -> Result<()> {
    let mut programs = BenchPrograms::load(0)?;
    let mut ring = RingBuf::try_from(programs.take_map("EVENTS")?)?;
    programs.attach_transition()?;
    eprintln!("ready");
    let mut out = BufWriter::new(std::io::stdout().lock());
    loop {
        poll(&mut [PollFd::new(&ring, PollFlags::IN)], None)?;
        while let Some(event) = ring.next() {
            let line = line(&event).context("an event of the wrong size")?;
            out.write_all(line.as_bytes())?;
        }
        // Lines must appear as they happen.
        out.flush()?;
    }
}

/// Formats a `StateChange` of `ebpf/src/main.rs`.
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
    fn an_event_becomes_a_line_with_both_addresses_and_both_states() {
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
