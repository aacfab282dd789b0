//! Which connections that a pod has dialled hold its drain (`ebb.dev/outbound`).
//!
//! Runners, tunnels and queue consumers do their work over connections that they dial. Without this rule no such
//! connection holds, because most of them belong to pools that the pod itself closes after its stop signal.

use std::{fmt, net::SocketAddr, str::FromStr};

use crate::ip_network::IpNetwork;

/// Which dialled connections hold, while they are live.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Outbound {
    /// None.
    #[default]
    Ignore,
    /// All.
    Hold,
    /// Those to one of these.
    To(Vec<OutboundTarget>),
}

/// Where a connection goes: to addresses, to a port, or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutboundTarget {
    network: Option<IpNetwork>,
    port: Option<u16>,
}

impl Outbound {
    /// Whether a connection that the pod dialled to `remote` holds.
    pub fn holds(&self, remote: SocketAddr) -> bool {
        match self {
            Self::Ignore => false,
            Self::Hold => true,
            Self::To(targets) => targets.iter().any(|target| target.matches(remote)),
        }
    }

    /// Whether no dialled connection holds.
    pub const fn is_ignore(&self) -> bool {
        matches!(self, Self::Ignore)
    }
}

impl OutboundTarget {
    fn matches(&self, remote: SocketAddr) -> bool {
        self.port.is_none_or(|port| port == remote.port())
            && self
                .network
                .is_none_or(|network| network.contains(remote.ip()))
    }
}

impl FromStr for Outbound {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "ignore" => Ok(Self::Ignore),
            "hold" => Ok(Self::Hold),
            _ => {
                let targets = text.split(',').map(|t| t.trim().parse());
                Ok(Self::To(targets.collect::<Result<_, String>>()?))
            }
        }
    }
}

impl FromStr for OutboundTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!(
                "{text:?} is neither ignore nor hold, nor a port, an address or network, or both, such as 5672, \
                 10.0.0.0/8, 10.0.0.0/8:443 or [2001:db8::/32]:443"
            )
        };
        let port = |port: &str| port.parse().ok().filter(|port| *port != 0).ok_or_else(bad);
        let network = |text: &str| text.parse().map_err(|_| bad());
        if let Some((net, rest)) = text.strip_prefix('[').and_then(|t| t.split_once("]:")) {
            return Ok(Self {
                network: Some(network(net)?),
                port: Some(port(rest)?),
            });
        }
        // An IPv6 network has colons of its own.
        match text.split_once(':') {
            Some((net, rest)) if !rest.contains(':') => Ok(Self {
                network: Some(network(net)?),
                port: Some(port(rest)?),
            }),
            None if text.bytes().all(|b| b.is_ascii_digit()) => Ok(Self {
                network: None,
                port: Some(port(text)?),
            }),
            _ => Ok(Self {
                network: Some(network(text)?),
                port: None,
            }),
        }
    }
}

impl fmt::Display for Outbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ignore => f.pad("ignore"),
            Self::Hold => f.pad("hold"),
            Self::To(targets) => {
                let targets: Vec<_> = targets.iter().map(ToString::to_string).collect();
                f.pad(&targets.join(","))
            }
        }
    }
}

impl fmt::Display for OutboundTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.network, self.port) {
            (Some(network), Some(port)) if network.is_ipv6() => write!(f, "[{network}]:{port}"),
            (Some(network), Some(port)) => write!(f, "{network}:{port}"),
            (Some(network), None) => write!(f, "{network}"),
            (None, Some(port)) => write!(f, "{port}"),
            (None, None) => f.write_str("all"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(rule: &str, remote: &str) -> bool {
        rule.parse::<Outbound>()
            .unwrap()
            .holds(remote.parse().unwrap())
    }

    #[test]
    fn a_rule_names_ports_networks_or_both() {
        for (rule, remote, expected) in [
            ("ignore", "10.1.2.3:5672", false),
            ("hold", "10.1.2.3:5672", true),
            ("5672", "10.1.2.3:5672", true),
            ("5672", "10.1.2.3:5673", false),
            ("9, 5672", "[2001:db8::1]:5672", true),
            ("10.0.0.0/8", "10.255.2.3:1", true),
            ("10.0.0.0/8", "11.0.0.1:1", false),
            ("10.0.0.0/8:443", "10.1.1.1:443", true),
            ("10.0.0.0/8:443", "10.1.1.1:80", false),
            ("10.0.0.7", "10.0.0.7:80", true),
            ("10.0.0.7", "10.0.0.8:80", false),
            ("0.0.0.0/0", "192.0.2.1:80", true),
            ("0.0.0.0/0", "[2001:db8::1]:80", false),
            ("2001:db8::/32", "[2001:db8:1::1]:80", true),
            ("[2001:db8::/32]:443", "[2001:db8:1::1]:443", true),
            ("[2001:db8::/32]:443", "[2001:db9::1]:443", false),
            // The same address in another form.
            ("::ffff:10.0.0.1", "10.0.0.1:80", true),
            ("10.0.0.1", "[::ffff:10.0.0.1]:80", true),
        ] {
            assert_eq!(holds(rule, remote), expected, "{rule} {remote}");
        }
    }

    #[test]
    fn a_rule_is_shown_as_it_is_parsed() {
        for rule in [
            "ignore",
            "hold",
            "5672,10.0.0.0/8:443,2001:db8::/32,[2001:db8::/32]:443",
        ] {
            let parsed: Outbound = rule.parse().unwrap();
            assert_eq!(parsed.to_string(), rule);
        }
    }

    #[test]
    fn what_is_no_rule_is_refused_with_an_example() {
        for rule in [
            "",
            "0",
            "70000",
            "amqp",
            "10.0.0.0/33",
            "10.0.0.1:0",
            "10.0.0.1:x",
            "5672,",
        ] {
            let why = rule.parse::<Outbound>().unwrap_err();
            assert!(why.contains("10.0.0.0/8:443"), "{rule:?}: {why}");
        }
    }
}
