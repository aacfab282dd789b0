//! The flows of one pod at one moment, and which of them can hold a drain.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    classify::{FlowState, classify},
    multipath,
    origin::Origin,
    sample::{Direction, Sample, TcpState},
};
use crate::{
    clock::BootTime,
    ids::{CgroupId, SocketCookie},
};

/// Why a flow does not hold a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exempt {
    /// Dialled by the pod.
    Outbound,
    /// Both ends are in the pod.
    InPod,
    /// Dialled by the kubelet.
    Probe,
    /// On a port that the policy ignores.
    IgnoredPort,
    /// To ebb's own listener in the pod.
    WaitPort,
}

impl Exempt {
    /// The name, as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::InPod => "in-pod",
            Self::Probe => "probe",
            Self::IgnoredPort => "ignored-port",
            Self::WaitPort => "wait-port",
        }
    }
}

/// What is known of when a flow began. Of the subflows of one connection, the last named here counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Since {
    /// Its handshake was seen, or the pod dialled it: those are not asked for their age.
    Opening,
    /// It was there when the agent came, so that its age is a lower bound.
    BeforeAgent,
    /// Nothing: its record could not be made, or is lost.
    Unknown,
}

/// One flow of a pod, classified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The kernel's identity of the socket.
    pub cookie: SocketCookie,
    /// Who opened it. Where that is not known it counts as inbound.
    pub direction: Direction,
    /// The pod's end.
    pub local: SocketAddr,
    /// The peer.
    pub remote: SocketAddr,
    /// What it is doing.
    pub state: FlowState,
    /// Why it does not hold a drain; `None` if it does.
    pub exempt: Option<Exempt>,
    /// Time since the handshake, where it was seen: of inbound flows. For those older than the agent, the time since
    /// the agent found them.
    pub age: Option<Duration>,
    /// What `age` is worth.
    pub since: Since,
    /// Time since the last byte either way.
    pub quiet_for: Duration,
    /// Payload bytes from the peer.
    pub bytes_in: u64,
    /// Payload bytes to the peer that it has acknowledged.
    pub bytes_out: u64,
    /// The cgroup whose process made the socket, where the kernel tells.
    pub cgroup: Option<CgroupId>,
    /// The other subflows, if it is an MPTCP connection that has several.
    pub others: Vec<SocketCookie>,
}

/// Flows that hold, by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the names of the flow states")]
pub struct FlowCounts {
    pub backlog: u32,
    pub active: u32,
    pub awaiting: u32,
    pub idle: u32,
    pub flushing: u32,
    pub half_closed: u32,
}

impl FlowCounts {
    /// How many are in `state`.
    pub const fn of(&self, state: FlowState) -> u32 {
        match state {
            FlowState::Backlog => self.backlog,
            FlowState::Active => self.active,
            FlowState::Awaiting => self.awaiting,
            FlowState::Idle => self.idle,
            FlowState::Flushing => self.flushing,
            FlowState::HalfClosed => self.half_closed,
        }
    }

    /// Counts one more in `state`.
    pub const fn add(&mut self, state: FlowState) {
        let n = match state {
            FlowState::Backlog => &mut self.backlog,
            FlowState::Active => &mut self.active,
            FlowState::Awaiting => &mut self.awaiting,
            FlowState::Idle => &mut self.idle,
            FlowState::Flushing => &mut self.flushing,
            FlowState::HalfClosed => &mut self.half_closed,
        };
        *n += 1;
    }

    /// Flows in the middle of something.
    pub fn live(&self) -> u32 {
        self.total() - self.idle
    }

    /// All flows that hold.
    pub fn total(&self) -> u32 {
        FlowState::ALL.iter().map(|s| self.of(*s)).sum()
    }
}

/// All flows of one pod at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The moment *before* the kernel was asked: what happened later may or may not be in it.
    pub taken_at: BootTime,
    /// The flows, in the kernel's order.
    pub flows: Vec<Flow>,
}

impl Snapshot {
    /// Classifies `samples`, all sockets of one pod. `holds_port` says whether flows to a local port
    /// of the pod hold a drain, `is_pods` whether an address is nobody's but the pod's own.
    pub fn new(
        taken_at: BootTime,
        samples: &[Sample],
        idle_after: Duration,
        holds_port: impl Fn(u16) -> bool,
        is_pods: impl Fn(IpAddr) -> bool,
    ) -> Self {
        let open = || samples.iter().filter(|s| s.state != TcpState::Listen);
        let mut own: Vec<IpAddr> = open().map(|s| s.local.ip()).collect();
        own.dedup();
        own.sort_unstable();
        own.dedup();
        // Both ends of what stays in the pod have an address of the pod: few flows, of possibly very many. That both are
        // there tells it where addresses do not: on the host's network. (Elsewhere the other end may be gone before
        // this one, as a half-closed connection's is after `tcp_fin_timeout`.)
        let ends: HashSet<(SocketAddr, SocketAddr)> = open()
            .filter(|s| own.binary_search(&s.remote.ip()).is_ok())
            .map(|s| (s.local, s.remote))
            .collect();
        let subflows = samples.iter().filter_map(|s| {
            let state = classify(s, idle_after)?;
            let (direction, accepted) = match s.origin {
                Origin::Accepted(acceptance) => (Direction::Inbound, Some(acceptance)),
                Origin::Unknown => (Direction::Inbound, None),
                Origin::Dialled => (Direction::Outbound, None),
            };
            let exempt = if direction == Direction::Outbound {
                Some(Exempt::Outbound)
            } else if s.to_wait_port {
                Some(Exempt::WaitPort)
            } else if is_pods(s.remote.ip()) || ends.contains(&(s.remote, s.local)) {
                Some(Exempt::InPod)
            } else if accepted.is_some_and(|a| a.probe) {
                Some(Exempt::Probe)
            } else if !holds_port(s.local.port()) {
                Some(Exempt::IgnoredPort)
            } else {
                None
            };
            let flow = Flow {
                cookie: s.cookie,
                direction,
                local: s.local,
                remote: s.remote,
                state,
                exempt,
                age: accepted.map(|a| taken_at.since(a.opened_at)),
                since: match s.origin {
                    Origin::Accepted(a) if a.seeded => Since::BeforeAgent,
                    Origin::Accepted(_) | Origin::Dialled => Since::Opening,
                    Origin::Unknown => Since::Unknown,
                },
                quiet_for: s.since_sent.min(s.since_received),
                bytes_in: s.payload_received(),
                bytes_out: s.bytes_acked,
                cgroup: s.cgroup,
                others: Vec::new(),
            };
            Some((s.inode, flow))
        });
        let flows = multipath::merge(subflows);
        Self { taken_at, flows }
    }

    /// The flows that hold a drain.
    pub fn holding(&self) -> impl Iterator<Item = &Flow> {
        self.flows.iter().filter(|f| f.exempt.is_none())
    }

    /// The flows that hold, by state.
    pub fn counts(&self) -> FlowCounts {
        let mut counts = FlowCounts::default();
        for flow in self.holding() {
            counts.add(flow.state);
        }
        counts
    }
}

#[cfg(test)]
mod tests;
