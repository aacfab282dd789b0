//! IP networks, as users write them.

use std::{fmt, net::IpAddr, str::FromStr};

/// An address, or a network: `10.0.0.0/8`. An IPv4 address that is written as an IPv6 one (`::ffff:10.0.0.1`) is the
/// IPv4 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpNetwork {
    address: IpAddr,
    /// How many bits of the address count.
    bits: u8,
}

impl IpNetwork {
    /// Whether the address is in the network.
    pub fn contains(&self, other: IpAddr) -> bool {
        match (self.address, other.to_canonical()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let differ = a.to_bits() ^ b.to_bits();
                differ.leading_zeros() >= u32::from(self.bits)
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let differ = a.to_bits() ^ b.to_bits();
                differ.leading_zeros() >= u32::from(self.bits)
            }
            _ => false,
        }
    }

    /// Whether it is a network of IPv6.
    pub const fn is_ipv6(&self) -> bool {
        self.address.is_ipv6()
    }
}

impl FromStr for IpNetwork {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no address and no network such as 10.0.0.0/8");
        let (written, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let written: IpAddr = written.parse().map_err(|_| wrong())?;
        let address = written.to_canonical();
        let all: u8 = if address.is_ipv4() { 32 } else { 128 };
        // The prefix of a mapped IPv4 address, `::ffff:0:0/96`, counts among its bits.
        let prefix = if written.is_ipv6() { 128 - all } else { 0 };
        let bits = match bits {
            Some(bits) => {
                let bits = bits.parse::<u8>().map_err(|_| wrong())?;
                bits.checked_sub(prefix).ok_or_else(wrong)?
            }
            None => all,
        };
        if bits > all {
            return Err(wrong());
        }
        Ok(Self { address, bits })
    }
}

impl fmt::Display for IpNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_contains_its_addresses() {
        let network = |text: &str| text.parse::<IpNetwork>().unwrap();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(network("10.1.0.0/16").contains(address("10.1.2.3")));
        assert!(network("10.1.0.0/16").contains(address("::ffff:10.1.2.3")));
        assert!(!network("10.1.0.0/16").contains(address("10.2.0.0")));
        assert!(network("10.1.2.3").contains(address("10.1.2.3")));
        assert!(!network("10.1.2.3").contains(address("10.1.2.4")));
        assert!(network("0.0.0.0/0").contains(address("192.0.2.1")));
        assert!(!network("0.0.0.0/0").contains(address("::1")));
        assert!(network("fd00::/8").contains(address("fd12::1")));
        assert!(network("::/0").contains(address("fd12::1")));
        for wrong in ["10.1.0.0/33", "10.1/8", "web", "", "10.0.0.0/", "::/129"] {
            assert!(wrong.parse::<IpNetwork>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_ipv4_address_may_be_written_as_an_ipv6_one() {
        let shown = |text: &str| text.parse::<IpNetwork>().map(|n| n.to_string());
        assert_eq!(shown("::ffff:10.0.0.1").as_deref(), Ok("10.0.0.1/32"));
        assert_eq!(shown("::ffff:10.0.0.0/104").as_deref(), Ok("10.0.0.0/8"));
        assert!(shown("::ffff:10.0.0.0/8").is_err());
    }
}
