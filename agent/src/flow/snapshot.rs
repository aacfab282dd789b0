//! The flows of one pod at one moment, and which of them can hold a drain.

use std::{collections::HashSet, net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    classify::{FlowState, classify},
    sample::{Direction, Sample, TcpState},
};
use crate::{clock::BootTime, ids::SocketCookie};

/// Why a flow does not hold a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exempt {
    /// Dialled by the pod.
    Outbound,
    /// Both ends are in the pod.
    InPod,
    /// On a port that the policy ignores.
    IgnoredPort,
}

impl Exempt {
    /// The name, as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::InPod => "in-pod",
            Self::IgnoredPort => "ignored-port",
        }
    }
}

/// One flow of a pod, classified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The kernel's identity of the socket.
    pub cookie: SocketCookie,
    /// Who opened it. A socket that the programs have no record of counts as inbound: not knowing must
    /// not cut anybody off.
    pub direction: Direction,
    /// The pod's end.
    pub local: SocketAddr,
    /// The peer.
    pub remote: SocketAddr,
    /// What it is doing.
    pub state: FlowState,
    /// Why it does not hold a drain; `None` if it does.
    pub exempt: Option<Exempt>,
    /// Time since the handshake, where it was seen. For flows older than the agent, the time since the
    /// agent found them.
    pub age: Option<Duration>,
    /// The flow is older than the agent, so `age` is a lower bound.
    pub older_than_agent: bool,
    /// Time since the last byte either way.
    pub quiet_for: Duration,
    /// Payload bytes from the peer.
    pub bytes_in: u64,
    /// Payload bytes to the peer that it has acknowledged.
    pub bytes_out: u64,
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
    /// of the pod hold a drain.
    pub fn new(
        taken_at: BootTime,
        samples: &[Sample],
        idle_after: Duration,
        holds_port: impl Fn(u16) -> bool,
    ) -> Self {
        let ends: HashSet<(SocketAddr, SocketAddr)> = samples
            .iter()
            .filter(|s| s.state != TcpState::Listen)
            .map(|s| (s.local, s.remote))
            .collect();
        let flows = samples
            .iter()
            .filter_map(|s| {
                let state = classify(s, idle_after)?;
                let direction = s.record.map_or(Direction::Inbound, |r| r.direction);
                let exempt = if direction == Direction::Outbound {
                    Some(Exempt::Outbound)
                } else if ends.contains(&(s.remote, s.local)) {
                    Some(Exempt::InPod)
                } else if !holds_port(s.local.port()) {
                    Some(Exempt::IgnoredPort)
                } else {
                    None
                };
                Some(Flow {
                    cookie: s.cookie,
                    direction,
                    local: s.local,
                    remote: s.remote,
                    state,
                    exempt,
                    age: s.record.map(|r| taken_at.since(r.opened_at)),
                    older_than_agent: s.record.is_none_or(|r| r.seeded),
                    quiet_for: s.since_sent.min(s.since_received),
                    bytes_in: s.payload_received(),
                    bytes_out: s.bytes_acked,
                })
            })
            .collect();
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
