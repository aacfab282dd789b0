//! Looks up single connections by running the program `inspect` inside their network namespace.
//!
//! A run looks up 64 connections in about 12 µs, however many connections the node has.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Mutex,
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{Array, MapData},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use ebb_common::{
    DIALLED, INSPECTIONS, InspectQueries, InspectQuery, InspectResult, InspectResults, TUPLE_V4,
    TUPLE_V6, found, stamp_time,
};
use ebb_core::{
    flow::{Noted, Origin, OriginTraits, Retransmissions, Sample, SequenceStart, TcpState},
    ids::{CgroupId, SocketCookie},
};
use rustix::time::{ClockId, clock_getres};

use super::{KernelError, programs};
use crate::linux::sync::lock;

/// The packet of a test run. The kernel rejects packets that are shorter than an Ethernet header.
const PACKET: [u8; 64] = [0; 64];

pub(super) struct Inspector {
    /// Locked during a run, because all runs use the same two maps.
    program: Mutex<InspectProgram>,
    jiffy: Duration,
}

struct InspectProgram {
    /// Owns the program.
    ebpf: Ebpf,
    queries: Array<MapData, InspectQueries>,
    results: Array<MapData, InspectResults>,
}

/// What the kernel's lookup found for a pair of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inspected {
    /// No socket, or one that is bound to an interface.
    Nothing,
    /// A socket that the program does not read: a request socket, a TIME_WAIT socket, or one that is not plain TCP.
    Other(Option<TcpState>),
    /// A connection.
    Connection(InspectedSocket),
}

/// What the program read from the socket of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InspectedSocket {
    result: InspectResult,
    state: TcpState,
    jiffy: Duration,
}

/// The length of a jiffy, which is the resolution of the coarse clocks (`posix_get_coarse_res` in
/// kernel/time/posix-timers.c).
pub(super) fn jiffy() -> Duration {
    let resolution = clock_getres(ClockId::MonotonicCoarse);
    resolution.try_into().unwrap_or(Duration::from_millis(4))
}

impl Inspector {
    /// Takes over the object, in which `inspect` must be loaded.
    pub(super) fn new(mut ebpf: Ebpf, jiffy: Duration) -> Result<Self, KernelError> {
        let program = InspectProgram {
            queries: programs::array(&mut ebpf, "QUERIES")?,
            results: programs::array(&mut ebpf, "RESULTS")?,
            ebpf,
        };
        Ok(Self {
            program: Mutex::new(program),
            jiffy,
        })
    }

    /// Looks up connections in the calling thread's network namespace by their local and remote addresses. Calls
    /// `each` with the index of a connection and the result.
    ///
    /// # Errors
    ///
    /// The kernel does not run the program.
    pub(super) fn inspect(
        &self,
        connections: impl IntoIterator<Item = (SocketAddr, SocketAddr)>,
        mut each: impl FnMut(usize, Inspected),
    ) -> io::Result<()> {
        let mut connections = connections.into_iter().peekable();
        let mut first = 0;
        while connections.peek().is_some() {
            let mut queries = InspectQueries {
                each: [InspectQuery::NONE; INSPECTIONS],
            };
            let mut count = 0;
            for (slot, (local, remote)) in queries.each.iter_mut().zip(&mut connections) {
                *slot = query(local, remote);
                count += 1;
            }
            let results = lock(&self.program).run(&queries)?;
            for (n, result) in results.each.iter().take(count).enumerate() {
                each(first + n, self.inspected(result));
            }
            first += count;
        }
        Ok(())
    }

    fn inspected(&self, result: &InspectResult) -> Inspected {
        let state = TcpState::try_from(result.state);
        match (result.found, state) {
            // If there is no connection, the lookup finds the listener of the port.
            (found::NOTHING, _) | (_, Ok(TcpState::Listen)) => Inspected::Nothing,
            (found::CONNECTION, Ok(state)) => Inspected::Connection(InspectedSocket {
                result: *result,
                state,
                jiffy: self.jiffy,
            }),
            (_, state) => Inspected::Other(state.ok()),
        }
    }

    /// The length of a jiffy.
    pub(super) const fn jiffy(&self) -> Duration {
        self.jiffy
    }

    /// `jiffies_64` now.
    ///
    /// # Errors
    ///
    /// The kernel does not run the program.
    pub(super) fn jiffies(&self) -> io::Result<u64> {
        let mut queries = InspectQueries {
            each: [InspectQuery::NONE; INSPECTIONS],
        };
        // Every result has the time, also that of a connection which does not exist.
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        queries.each[0] = query(nowhere, nowhere);
        let results = lock(&self.program).run(&queries)?;
        Ok(results.each[0].jiffies)
    }

    /// Gives access to the object, to attach its other programs.
    pub(super) fn with_object<T>(&self, f: impl FnOnce(&mut Ebpf) -> T) -> T {
        f(&mut lock(&self.program).ebpf)
    }
}

impl InspectProgram {
    fn run(&mut self, queries: &InspectQueries) -> io::Result<InspectResults> {
        self.queries.set(0, queries, 0).map_err(io::Error::other)?;
        let program: &mut SchedClassifier =
            programs::program(&mut self.ebpf, "inspect").map_err(io::Error::other)?;
        program
            .test_run(TestRunOptions {
                data_in: Some(&PACKET),
                ..TestRunOptions::new()
            })
            .map_err(io::Error::other)?;
        self.results.get(&0, 0).map_err(io::Error::other)
    }
}

fn query(local: SocketAddr, remote: SocketAddr) -> InspectQuery {
    let mut query = InspectQuery::NONE;
    let mut tuple = query.tuple.iter_mut();
    let mut push = |bytes: &[u8]| {
        for (from, to) in bytes.iter().zip(tuple.by_ref()) {
            *to = *from;
        }
    };
    let size = match (local.ip(), remote.ip()) {
        (IpAddr::V4(local), IpAddr::V4(remote)) => {
            push(&remote.octets());
            push(&local.octets());
            TUPLE_V4
        }
        (local, remote) => {
            push(&v6(remote).octets());
            push(&v6(local).octets());
            TUPLE_V6
        }
    };
    push(&remote.port().to_be_bytes());
    push(&local.port().to_be_bytes());
    query.size = u32::try_from(size).unwrap_or(0);
    query
}

const fn v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

impl InspectedSocket {
    /// `None` if the socket has no cookie yet. A dump or an event gives it one.
    pub(super) fn cookie(&self) -> Option<SocketCookie> {
        (self.result.cookie != 0).then_some(SocketCookie(self.result.cookie))
    }

    /// The cgroup of the process that created the socket.
    pub(super) const fn cgroup(&self) -> CgroupId {
        CgroupId(self.result.cgroup)
    }

    /// The properties that tell whether the connection was accepted or dialled.
    pub(super) fn origin_traits(&self, local_port: u16, remote_port: u16) -> OriginTraits {
        OriginTraits {
            backlog: self.result.backlog,
            locks: self.result.locks,
            noted: match self.result.opened_at {
                0 => None,
                DIALLED => Some(Noted::Dialled),
                _ => Some(Noted::Accepted),
            },
            fast_reuse: (self.result.bound != 0).then_some(self.result.fast_reuse),
            local_port,
            remote_port,
        }
    }

    /// A sample of the connection, which has these addresses. It always says accepted, because to decide that needs
    /// the ports of the namespace.
    pub(super) fn sample(&self, local: SocketAddr, remote: SocketAddr) -> Sample {
        let mut sample = Sample {
            origin: Origin::Accepted,
            ..Sample::new(SocketCookie(self.result.cookie), local, remote, self.state)
        };
        self.complete(&mut sample);
        sample
    }

    /// Replaces the dumped values by what was read from the socket, which is newer.
    pub(super) fn complete(&self, sample: &mut Sample) {
        let r = &self.result;
        sample.state = self.state;
        sample.inode = r.inode;
        // As sock_diag computes them (`tcp_diag_get_info` in net/ipv4/tcp_diag.c). Both are read without the socket's
        // lock, so either number may be ahead of the other.
        sample.unread = behind(r.copied_seq, r.rcv_nxt);
        sample.unacked = behind(r.snd_una, r.write_seq);
        sample.bytes_received = r.bytes_received;
        sample.bytes_acked = r.bytes_acked;
        sample.since_sent = self.since(r.sent_at);
        sample.since_received = self.since(r.received_at);
        sample.since_ack = self.since(r.acked_at);
        sample.retransmissions = Retransmissions {
            retransmits: r.retransmits,
            probes: r.probes,
            backoff: r.backoff,
            rto: self.jiffy * r.rto,
        };
        // The kernel changes each pair at the same time, but they are read without the socket's lock.
        #[expect(clippy::cast_possible_truncation, reason = "sequence numbers wrap")]
        let start = |next: u32, bytes: u64| next.wrapping_sub(bytes as u32);
        sample.sequence = Some(SequenceStart {
            sent: start(r.snd_una, r.bytes_acked),
            received: start(r.rcv_nxt, r.bytes_received),
        });
        sample.cgroup = Some(self.cgroup());
        sample.age = self.age();
        // The kernel stores the sequence number of each segment from the peer in `snd_wl1` (`tcp_update_wl` in
        // net/ipv4/tcp_input.c). Only after a segment without data does it equal the next expected number.
        if r.snd_wl1 == r.rcv_nxt {
            let delivered = Duration::from_micros(r.delivered_at);
            sample.set_bare_ack(Duration::from_nanos(r.now).saturating_sub(delivered));
        }
    }

    fn since(&self, jiffies: u32) -> Duration {
        #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
        let now = self.result.jiffies as u32;
        self.jiffy * elapsed(jiffies, now)
    }

    fn age(&self) -> Option<Duration> {
        let opened_at = self.result.opened_at;
        let jiffies = stamp_time(self.result.jiffies).saturating_sub(opened_at);
        // Both times are rounded to a jiffy, so one is added: the connection is not older than this.
        let age = self.jiffy * u32::try_from(jiffies + 1).unwrap_or(u32::MAX);
        (opened_at != 0 && opened_at != DIALLED).then_some(age)
    }
}

/// How far `earlier` is behind `later` in a sequence that wraps around; 0 if it is not behind.
fn behind(earlier: u32, later: u32) -> u32 {
    let distance = later.wrapping_sub(earlier);
    if distance.cast_signed() < 0 {
        0
    } else {
        distance
    }
}

/// How many jiffies have passed. `now` is the start of the run, so `then` may be slightly later; that counts as 0. All
/// other values of `then` are in the past, as in the kernel's tcp_info: 49 days if a jiffy is a millisecond.
fn elapsed(then: u32, now: u32) -> u32 {
    const LONGEST_RUN: u32 = 10_000;
    let passed = now.wrapping_sub(then);
    if passed > u32::MAX - LONGEST_RUN {
        0
    } else {
        passed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_numbers_wrap_and_the_distance_is_never_negative() {
        assert_eq!(behind(5, 8), 3);
        assert_eq!(behind(u32::MAX, 1), 2);
        assert_eq!(behind(8, 5), 0);
    }

    #[test]
    fn times_during_a_run_count_as_now_and_times_long_ago_do_not() {
        assert_eq!(elapsed(1001, 1000), 0);
        assert_eq!(elapsed(u32::MAX, 4), 5);
        assert_eq!(elapsed(0, 0xf000_0000), 0xf000_0000);
    }

    #[test]
    fn a_query_is_the_tuple_of_a_received_packet_and_one_ipv6_address_makes_it_ipv6() {
        let local = "10.0.0.2:8080".parse().unwrap();
        let q = query(local, "10.0.0.1:80".parse().unwrap());
        assert_eq!(q.size, 12);
        assert_eq!(q.tuple[..12], [10, 0, 0, 1, 10, 0, 0, 2, 0, 80, 31, 144]);
        let q = query(local, "[::1]:80".parse().unwrap());
        assert_eq!(
            (q.size, q.tuple[15], q.tuple[26..28].to_vec()),
            (36, 1, vec![0xff, 0xff])
        );
    }
}
