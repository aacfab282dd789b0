//! Compares the annotation `ebb.dev/ports` with the ports that the pod uses.
//!
//! A rule that matches nothing would leave out every connection, and ebb would cut all of them without a message. That
//! happens with a mistyped port, and in a mesh, where the proxy in the pod gets all connections on a port of its own.

use std::collections::BTreeSet;

use super::{Policy, annotations};
use crate::flow::{Origin, Sample, TcpState};

/// Ports on which the proxies of meshes get redirected connections: Istio's inbound listener, its HBONE listener (also
/// ztunnel's), and Linkerd's inbound listener.
const MESH: [u16; 3] = [15006, 15008, 4143];

/// The ports that a pod uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortsInUse {
    listening: BTreeSet<u16>,
    /// Local ports of connections that the pod has accepted: their listener may be closed already.
    connected: BTreeSet<u16>,
}

impl PortsInUse {
    /// The ports of these sockets, all of one pod.
    pub fn of(samples: &[Sample]) -> Self {
        let mut ports = Self::default();
        for s in samples {
            if s.state == TcpState::Listen {
                ports.listening.insert(s.local.port());
            } else if s.origin == Origin::Accepted && !s.to_wait_port {
                ports.connected.insert(s.local.port());
            }
        }
        ports
    }
}

impl Policy {
    /// Adapts a rule about ports to the ports that the pod uses. If no listener has one of its ports, drops the rule
    /// and returns a warning. If a mesh's proxy listens in the pod, its ports hold as well, because connections to all
    /// others arrive there.
    pub fn fit_ports(&mut self, used: &PortsInUse) -> Option<String> {
        // Without a listener the rule can't be checked: the containers may have exited.
        if self.ports.is_empty() || used.listening.is_empty() {
            return None;
        }
        let is_used = |port: &u16| used.listening.contains(port) || used.connected.contains(port);
        if !self.ports.iter().any(is_used) {
            let listening: Vec<u16> = used.listening.iter().copied().collect();
            let warning = format!(
                "annotation {}ports: nothing in the pod listens on {}, only on {}; the annotation is ignored, and \
                 connections to all ports hold",
                annotations::PREFIX,
                annotations::show_ports(&self.ports, "no port"),
                annotations::show_ports(&listening, "no port"),
            );
            self.ports.clear();
            return Some(warning);
        }
        for port in MESH {
            if used.listening.contains(&port) && !self.ports.contains(&port) {
                self.ports.push(port);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::sample::testing::sample;

    fn policy(ports: &[u16]) -> Policy {
        Policy {
            ports: ports.to_vec(),
            ..Policy::default()
        }
    }

    fn socket(state: TcpState, port: u16) -> Sample {
        Sample {
            state,
            local: ([10, 0, 0, 2], port).into(),
            ..sample()
        }
    }

    fn listening(ports: &[u16]) -> PortsInUse {
        let samples = ports.iter().map(|port| socket(TcpState::Listen, *port));
        PortsInUse::of(&samples.collect::<Vec<_>>())
    }

    #[test]
    fn a_rule_that_matches_no_listener_is_dropped_with_a_warning_that_names_both() {
        let mut policy = policy(&[8080, 8443]);
        let warning = policy.fit_ports(&listening(&[80, 15020])).unwrap();
        assert!(policy.holds_port(80) && policy.holds_port(15006));
        assert!(
            warning.contains("ebb.dev/ports")
                && warning.contains("8080,8443")
                && warning.contains("80,15020"),
            "{warning}"
        );
        assert_eq!(
            policy.fit_ports(&listening(&[80])),
            None,
            "there is no rule any more"
        );
    }

    #[test]
    fn a_rule_that_matches_one_listener_or_one_connection_stays() {
        let mut some = policy(&[80, 8443]);
        assert_eq!(some.fit_ports(&listening(&[80, 9090])), None);
        assert!(some.holds_port(80) && !some.holds_port(9090));
        // The server has closed its listener already.
        let mut closed = policy(&[80]);
        let samples = [
            socket(TcpState::Listen, 9090),
            socket(TcpState::Established, 80),
        ];
        assert_eq!(closed.fit_ports(&PortsInUse::of(&samples)), None);
        assert!(!closed.holds_port(9090));
        // Nothing listens any more.
        assert_eq!(policy(&[80]).fit_ports(&listening(&[])), None);
        assert_eq!(policy(&[]).fit_ports(&listening(&[80])), None);
    }

    #[test]
    fn in_a_mesh_the_proxys_port_holds_as_well_unless_it_is_ignored() {
        for port in MESH {
            let mut app = policy(&[8080]);
            assert_eq!(app.fit_ports(&listening(&[8080, 9090, port])), None);
            assert!(app.holds_port(8080) && app.holds_port(port) && !app.holds_port(9090));
            let mut ignored = Policy {
                ignore_ports: vec![port],
                ..policy(&[8080])
            };
            ignored.fit_ports(&listening(&[8080, port]));
            assert!(!ignored.holds_port(port));
        }
        let mut app = policy(&[8080]);
        app.fit_ports(&listening(&[8080]));
        assert!(!app.holds_port(15006), "no mesh");
    }
}
