//! Compares the annotations `ebb.dev/ports` and `ebb.dev/ignore-ports` with the ports that the pod uses.
//!
//! A rule of `ebb.dev/ports` that matches nothing would leave out every connection, and ebb would cut all of them without
//! a message. That happens with a mistyped port, and in a mesh, where the proxy in the pod gets all connections on a port
//! of its own.

use std::collections::BTreeSet;

use super::{Policy, annotations};
use crate::flow::{Origin, Sample};

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
            if s.is_listener_of_pod() {
                ports.listening.insert(s.local.port());
            } else if s.origin == Origin::Accepted && !s.to_wait_port {
                ports.connected.insert(s.local.port());
            }
        }
        ports
    }

    /// Empties the rule of an annotation if the pod uses none of its ports, and returns a warning that ends with `then`.
    fn drop_unused(&self, rule: &mut Vec<u16>, name: &str, then: &str) -> Option<String> {
        let is_used = |port: &u16| self.listening.contains(port) || self.connected.contains(port);
        if rule.is_empty() || rule.iter().any(is_used) {
            return None;
        }
        let listening: Vec<u16> = self.listening.iter().copied().collect();
        let ports = std::mem::take(rule);
        Some(format!(
            "annotation {}{name}: nothing in the pod listens on {}, only on {}; the annotation is ignored{then}",
            annotations::PREFIX,
            annotations::show_ports(&ports, "no port"),
            annotations::show_ports(&listening, "no port"),
        ))
    }
}

impl Policy {
    /// Adapts the rules about ports to the ports that the pod uses. Drops each rule none of whose ports has a listener, and
    /// returns a warning for it. If a mesh's proxy listens in the pod, its ports hold as well, because connections to all
    /// others arrive there.
    pub fn fit_ports(&mut self, used: &PortsInUse) -> Vec<String> {
        // Without a listener the rules can't be checked: the containers may have exited.
        if used.listening.is_empty() {
            return vec![];
        }
        let (rule, then) = ("ports", ", and connections to all ports hold");
        let about_ports = used.drop_unused(&mut self.ports, rule, then);
        let about_ignored = used.drop_unused(&mut self.ignore_ports, "ignore-ports", "");
        for port in MESH {
            let has_rule = !self.ports.is_empty();
            if has_rule && used.listening.contains(&port) && !self.ports.contains(&port) {
                self.ports.push(port);
            }
        }
        about_ports.into_iter().chain(about_ignored).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{TcpState, sample::testing::sample};

    const NO_WARNING: Vec<String> = vec![];

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
        let warning = policy.fit_ports(&listening(&[80, 15020])).concat();
        assert!(policy.holds_port(80) && policy.holds_port(15006));
        assert!(
            warning.contains("ebb.dev/ports")
                && warning.contains("8080,8443")
                && warning.contains("80,15020"),
            "{warning}"
        );
        assert_eq!(
            policy.fit_ports(&listening(&[80])),
            NO_WARNING,
            "there is no rule any more"
        );
    }

    #[test]
    fn a_rule_that_matches_one_listener_or_one_connection_stays() {
        let mut some = policy(&[80, 8443]);
        assert_eq!(some.fit_ports(&listening(&[80, 9090])), NO_WARNING);
        assert!(some.holds_port(80) && !some.holds_port(9090));
        // The server has closed its listener already.
        let mut closed = policy(&[80]);
        let samples = [
            socket(TcpState::Listen, 9090),
            socket(TcpState::Established, 80),
        ];
        assert_eq!(closed.fit_ports(&PortsInUse::of(&samples)), NO_WARNING);
        assert!(!closed.holds_port(9090));
        // Nothing listens any more.
        assert_eq!(policy(&[80]).fit_ports(&listening(&[])), NO_WARNING);
        assert_eq!(policy(&[]).fit_ports(&listening(&[80])), NO_WARNING);
    }

    #[test]
    fn a_rule_of_ignored_ports_that_matches_nothing_is_dropped_with_a_warning_too() {
        let ignoring = |port| Policy {
            ignore_ports: vec![port],
            ..Policy::default()
        };
        let mut mistyped = ignoring(9091);
        let warning = mistyped.fit_ports(&listening(&[8080, 9090])).concat();
        assert!(
            warning.contains(
                "ebb.dev/ignore-ports: nothing in the pod listens on 9091, only on 8080,9090"
            ),
            "{warning}"
        );
        assert!(mistyped.ignore_ports.is_empty());
        let mut right = ignoring(9090);
        assert_eq!(right.fit_ports(&listening(&[8080, 9090])), NO_WARNING);
        assert!(!right.holds_port(9090));
        let mut both = Policy {
            ignore_ports: vec![9091],
            ..policy(&[80])
        };
        assert_eq!(both.fit_ports(&listening(&[8080])).len(), 2);
    }

    #[test]
    fn ebbs_own_listener_in_the_pod_is_no_listener_of_the_pod() {
        let wait_port = Sample {
            to_wait_port: true,
            ..socket(TcpState::Listen, 9999)
        };
        // The server has closed its listener, and has no connections.
        let used = PortsInUse::of(&[wait_port]);
        let mut policy = policy(&[8080]);
        assert_eq!(policy.fit_ports(&used), NO_WARNING);
        assert!(!policy.holds_port(80));
    }

    #[test]
    fn in_a_mesh_the_proxys_port_holds_as_well_unless_it_is_ignored() {
        for port in MESH {
            let mut app = policy(&[8080]);
            assert_eq!(app.fit_ports(&listening(&[8080, 9090, port])), NO_WARNING);
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
