//! A namespace that is linked to the host's, like a pod's.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    process,
    sync::atomic::{AtomicU8, Ordering},
};

use anyhow::Result;
use ebb_testkit::namespace::{Namespace, ip};

/// A namespace that has a veth pair with the host's.
pub(crate) struct Linked {
    pub(crate) namespace: Namespace,
    number: u8,
}

impl Linked {
    /// Must be called in the host's namespace.
    pub(crate) fn new() -> Result<Self> {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let linked = Self {
            namespace: Namespace::new()?,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
        };
        let (here, host) = (format!("flows{}", linked.number), process::id());
        let near = format!("link add eth0 type veth peer name {here} netns {host}");
        linked.namespace.run(|| ip(&near))?;
        for address in [
            linked.host_v4().to_string() + "/24",
            linked.host_v6() + "/64",
        ] {
            ip(&format!("addr add {address} dev {here}"))?;
        }
        ip(&format!("link set {here} up"))?;
        linked.namespace.run(|| {
            ip(&format!("addr add {}/24 dev eth0", linked.v4()))?;
            ip(&format!("addr add {}/64 dev eth0 nodad", linked.v6()))?;
            ip("link set eth0 up")?;
            ip(&format!("route add default via {}", linked.host_v4()))
        })?;
        Ok(linked)
    }

    pub(crate) fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number, 2)
    }

    pub(crate) fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd77, 0, 0, self.number.into(), 0, 0, 0, 2)
    }

    /// The host's address on this link.
    pub(crate) fn host_v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number, 1)
    }

    fn host_v6(&self) -> String {
        Ipv6Addr::new(0xfd77, 0, 0, self.number.into(), 0, 0, 0, 1).to_string()
    }
}
