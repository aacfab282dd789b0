//! The flows of one pod at one moment, and which of them can hold a drain.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::{
    Direction, Exempt, FlowCounts, FlowState,
    classify::{ClassifyOptions, classify},
    origin::Origin,
    sample::{Sample, SequenceStart, TcpState},
};
use crate::{
    clock::BootTime,
    ids::{CgroupId, SocketCookie},
};

/// How long a flow has been open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// Since its handshake, which `track` saw.
    Known(Duration),
    /// At least this long: it is older than the agent, or its stamp is lost.
    AtLeast(Duration),
}

impl Age {
    /// The age, if it is known.
    pub const fn known(self) -> Option<Duration> {
        match self {
            Self::Known(age) => Some(age),
            Self::AtLeast(_) => None,
        }
    }

    /// The age, or its lower bound.
    pub const fn at_least(self) -> Duration {
        match self {
            Self::Known(age) | Self::AtLeast(age) => age,
        }
    }

    /// The age after another `later`.
    pub fn after(self, later: Duration) -> Self {
        match self {
            Self::Known(age) => Self::Known(age + later),
            Self::AtLeast(age) => Self::AtLeast(age + later),
        }
    }
}

/// One flow of a pod, classified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The kernel's id of the socket.
    pub cookie: SocketCookie,
    /// Which side opened it. If that is not known, it counts as inbound.
    pub direction: Direction,
    /// The pod's end.
    pub local: SocketAddr,
    /// The peer.
    pub remote: SocketAddr,
    /// What it is doing.
    pub state: FlowState,
    /// Why it never holds a drain; `None` if it may.
    pub exempt: Option<Exempt>,
    /// How long it has been open.
    pub age: Age,
    /// Time since the last byte either way.
    pub quiet_for: Duration,
    /// For how long, at least, the peer has not answered retransmissions; `None` if there are none.
    pub unanswered_for: Option<Duration>,
    /// Payload bytes from the peer.
    pub bytes_in: u64,
    /// Payload bytes to the peer, acknowledged.
    pub bytes_out: u64,
    /// The cgroup whose process made the socket, if the kernel reports it.
    pub cgroup: Option<CgroupId>,
}

impl Flow {
    /// Whether it holds a drain now.
    pub fn holds(&self) -> bool {
        // The pod closes it after its stop signal.
        let is_idle_dialled =
            self.direction == Direction::Outbound && self.state == FlowState::Idle;
        self.exempt.is_none() && self.state != FlowState::Lost && !is_idle_dialled
    }

    /// The age for people: never shorter than the silence, which the kernel counts in whole jiffies.
    pub fn age_to_show(&self) -> Age {
        match self.age {
            Age::Known(age) => Age::Known(age.max(self.quiet_for)),
            Age::AtLeast(age) => Age::AtLeast(age.max(self.quiet_for)),
        }
    }
}

/// All flows of one pod at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The moment *before* the dump began. Later changes may or may not be in the snapshot.
    pub taken_at: BootTime,
    /// The flows, in the kernel's order.
    pub flows: Vec<Flow>,
    /// Whether anything listens in the pod, except ebb itself. `None` if that is not known.
    pub listens: Option<bool>,
}

impl Snapshot {
    /// Classifies `samples`, all sockets of one pod. `holds_port`: whether flows to a local port hold a drain.
    /// `is_pods`: whether an address belongs to this pod alone.
    pub fn new(
        taken_at: BootTime,
        samples: &[Sample],
        options: impl Into<ClassifyOptions>,
        holds_port: impl Fn(u16) -> bool,
        is_pods: impl Fn(IpAddr) -> bool,
    ) -> Self {
        let options = options.into();
        let open = || samples.iter().filter(|s| s.state != TcpState::Listen);
        let mut own: Vec<IpAddr> = open().map(|s| s.local.ip()).collect();
        own.dedup();
        own.sort_unstable();
        own.dedup();
        // The flows whose peer address is also a local address, usually few: candidates for flows with both ends in
        // the pod. On the host's network addresses don't decide that, so the other end must be among the samples.
        // (Elsewhere the other end may be gone first: a half-closed connection loses it after `tcp_fin_timeout`.)
        let ends: HashSet<(SocketAddr, SocketAddr)> = open()
            .filter(|s| own.binary_search(&s.remote.ip()).is_ok())
            .map(|s| (s.local, s.remote))
            .collect();
        let dialled = EndsBySequence::of(samples, Origin::Dialled);
        let accepted = if options.outbound.is_ignore() {
            EndsBySequence(Vec::new())
        } else {
            EndsBySequence::of(samples, Origin::Accepted)
        };
        let flows = samples.iter().filter_map(|s| {
            let state = classify(s, &options)?;
            let direction = match s.origin {
                Origin::Accepted | Origin::Unknown => Direction::Inbound,
                Origin::Dialled => Direction::Outbound,
            };
            let others = match direction {
                Direction::Inbound => &dialled,
                Direction::Outbound => &accepted,
            };
            let exempt = if direction == Direction::Outbound && !options.outbound.holds(s.remote) {
                Some(Exempt::Outbound)
            } else if s.to_wait_port {
                Some(Exempt::WaitPort)
            } else if is_pods(s.remote.ip())
                || ends.contains(&(s.remote, s.local))
                || others.has_other_end_of(s)
            {
                Some(Exempt::InPod)
            } else if s.probe {
                Some(Exempt::Probe)
            } else if direction == Direction::Inbound && !holds_port(s.local.port()) {
                Some(Exempt::IgnoredPort)
            } else {
                None
            };
            let quiet_for = s.since_sent.min(s.since_received);
            Some(Flow {
                cookie: s.cookie,
                direction,
                local: s.local,
                remote: s.remote,
                state,
                exempt,
                age: s.age.map_or(Age::AtLeast(quiet_for), Age::Known),
                quiet_for,
                unanswered_for: s.unanswered_for(),
                bytes_in: s.payload_received(),
                bytes_out: s.bytes_acked,
                cgroup: s.cgroup,
            })
        });
        Self {
            taken_at,
            flows: flows.collect(),
            listens: None,
        }
    }

    /// The snapshot of a dump: `samples` also has all listeners of the pod.
    pub fn with_listeners(self, samples: &[Sample]) -> Self {
        Self {
            listens: Some(samples.iter().any(Sample::is_listener_of_pod)),
            ..self
        }
    }

    /// The flows that are not exempt: those that hold a drain, and those that may hold it again: lost ones, and idle ones
    /// that the pod dialled.
    pub fn not_exempt(&self) -> impl Iterator<Item = &Flow> {
        self.flows.iter().filter(|f| f.exempt.is_none())
    }

    /// These flows, by state.
    pub fn counts(&self) -> FlowCounts {
        let mut counts = FlowCounts::default();
        for flow in self.not_exempt() {
            counts.add(flow.state);
        }
        counts
    }
}

/// The ends of connections that the pod dialled, or accepted, sorted by the sequence number with which what they receive
/// starts. A pod that calls itself through its Service has both ends of the connection, with addresses that do not show
/// it: the Service's at one end, and at the other a gateway's if the connection is masqueraded.
struct EndsBySequence(Vec<SequenceStart>);

impl EndsBySequence {
    fn of(samples: &[Sample], origin: Origin) -> Self {
        let ends = samples.iter().filter(|s| s.origin == origin);
        let mut starts: Vec<_> = ends.filter_map(|s| s.sequence).collect();
        starts.sort_unstable_by_key(|start| start.received);
        Self(starts)
    }

    fn has_other_end_of(&self, s: &Sample) -> bool {
        let Some(start) = s.sequence.filter(|_| !self.0.is_empty()) else {
            return false;
        };
        (0..=2).any(|n| {
            let near = start.sent.wrapping_sub(1).wrapping_add(n);
            let first = self.0.partition_point(|other| other.received < near);
            let others = self.0.iter().skip(first);
            others
                .take_while(|other| other.received == near)
                .any(|other| start.is_other_end_of(*other))
        })
    }
}

#[cfg(test)]
mod tests;
