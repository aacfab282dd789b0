//! Who opened a connection: what the BPF programs have recorded, and what the ports tell of the others.

use std::collections::HashSet;

use ebb_common::EphemeralPorts;

use super::sample::{Sample, TcpState};
use crate::clock::BootTime;

/// Who opened a connection, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The pod accepted it, or is about to.
    Accepted(Acceptance),
    /// The pod dialled it.
    Dialled,
    /// Nothing is recorded of it. Counts as accepted: not knowing must not cut anybody off.
    Unknown,
}

/// What the BPF programs remember of a connection that the pod accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acceptance {
    /// When the handshake was seen, or when the agent found the socket at its start (`seeded`).
    pub opened_at: BootTime,
    /// The socket is older than the agent: `opened_at` is a lower bound of its age, and that it was accepted an
    /// inference from the listeners of that moment.
    pub seeded: bool,
    /// The kubelet dialled it.
    pub probe: bool,
}

/// Tells by their ports which of the connections without a record were dialled. `samples` are all sockets of a
/// namespace; `ephemeral` finds out which ports the kernel gives there to what dials, if that is needed.
///
/// The programs record each socket that a listener makes, and of those that dial only such as were bound to a port
/// before. To any other the kernel gives an ephemeral port on which nobody listens, and lets nobody listen there
/// unless both sockets allow it (`inet_csk_bind_conflict` in net/ipv4/inet_connection_sock.c). So what remains
/// unknown was accepted before the agent was there, could not be recorded, or was dialled when other ports were ephemeral.
pub fn tell_by_port(samples: &mut [Sample], ephemeral: impl FnOnce() -> EphemeralPorts) {
    let is_unknown = |s: &Sample| s.origin == Origin::Unknown && s.state != TcpState::Listen;
    if !samples.iter().any(is_unknown) {
        return;
    }
    let ephemeral = ephemeral();
    let listening: HashSet<u16> = samples
        .iter()
        .filter(|s| s.state == TcpState::Listen)
        .map(|s| s.local.port())
        .collect();
    for sample in samples.iter_mut().filter(|s| is_unknown(s)) {
        let port = sample.local.port();
        if ephemeral.contain(port) && !listening.contains(&port) {
            sample.origin = Origin::Dialled;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::sample::testing::sample;

    const EPHEMERAL: EphemeralPorts = EphemeralPorts {
        first: 32768,
        last: 60999,
    };

    fn on_port(port: u16, state: TcpState) -> Sample {
        Sample {
            local: ([10, 0, 0, 2], port).into(),
            state,
            ..sample()
        }
    }

    fn told(mut samples: Vec<Sample>) -> Vec<Origin> {
        tell_by_port(&mut samples, || EPHEMERAL);
        samples.iter().map(|s| s.origin).collect()
    }

    #[test]
    fn only_an_ephemeral_port_without_listener_tells() {
        use TcpState::{Established, Listen};
        let origins = told(vec![
            on_port(40_000, Established),
            on_port(40_001, Established),
            on_port(8080, Established),
            on_port(61_000, Established),
            on_port(40_001, Listen),
        ]);
        use Origin::{Dialled, Unknown};
        assert_eq!(origins, [Dialled, Unknown, Unknown, Unknown, Unknown]);
    }

    #[test]
    fn what_is_recorded_stays() {
        let accepted = Origin::Accepted(Acceptance {
            opened_at: BootTime::from_nanos(1),
            seeded: false,
            probe: false,
        });
        let mut s = on_port(40_000, TcpState::Established);
        s.origin = accepted;
        assert_eq!(told(vec![s]), [accepted]);
    }

    #[test]
    fn without_ephemeral_ports_nothing_is_told() {
        let mut samples = vec![on_port(40_000, TcpState::Established)];
        tell_by_port(&mut samples, || EphemeralPorts::NONE);
        assert_eq!(samples[0].origin, Origin::Unknown);
    }
}
