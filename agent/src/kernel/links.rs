//! The network links of a namespace, and whether traffic passes through it to somewhere else.
//!
//! A pod whose namespace only forwards traffic, to a virtual machine or to containers inside the pod, has no sockets of
//! these connections. A pod without sockets may therefore still have clients.
//!
//! The links come from rtnetlink (`RTM_GETLINK`): a header (16 bytes), `struct ifinfomsg` (16 bytes) and attributes.
//! Layouts: include/uapi/linux/{rtnetlink,if_link}.h.

use std::{collections::BTreeSet, fs, io, time::Duration};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with, sockopt,
};

use super::{
    cursor::Cursor,
    sock_diag::{Message, NLMSG_DONE, NLMSG_ERROR, next_attribute, next_message, reply_error},
};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
/// The links changed during the dump, so that some may be missing (`nl_dump_check_consistent` in
/// include/net/netlink.h).
const NLM_F_DUMP_INTR: u16 = 0x10;

const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;

const IFF_UP: u32 = 1;

const SEQUENCE: u32 = 1;

/// How often the links are listed again if they change meanwhile.
const ATTEMPTS: usize = 5;

/// The kinds of links whose other end is a virtual machine, a process or another node. A namespace that forwards
/// traffic and has such a link passes traffic through it. Those that the kernel makes in each namespace (`tunl0`,
/// `sit0`, …) are down.
const TUNNELS: &[&str] = &[
    "amt",
    "bareudp",
    "erspan",
    "geneve",
    "gre",
    "gretap",
    "gtp",
    "ip6erspan",
    "ip6gre",
    "ip6gretap",
    "ip6tnl",
    "ipip",
    "ovpn",
    "ppp",
    "sit",
    "tun",
    "vti",
    "vti6",
    "vxlan",
    "wireguard",
    "xfrm",
];

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Link {
    index: u32,
    is_up: bool,
    name: String,
    /// `bridge`, `tun`, `veth`, …; empty for hardware and loopback.
    kind: String,
    /// The link that it is a port of.
    master: Option<u32>,
    /// The namespace of its other end, as this namespace numbers them; `None` if it is this one.
    peer_netns: Option<u32>,
}

/// How traffic may pass through the calling thread's namespace to somewhere else, in one sentence; `None` if nothing
/// suggests it.
///
/// The sysctl alone says nothing, because a new namespace inherits the host's setting. The signs are a bridge with a
/// port, or, with forwarding on, a tap or tunnel ([`TUNNELS`]), or veths to more than one other namespace.
///
/// A namespace in which nothing of the pod listens also forwards traffic if it tracks connections. One whose links can't
/// be listed may forward traffic, too.
pub(super) fn forwards(listens: bool) -> Option<String> {
    let is_forwarding = is_forwarding();
    let by_table = || {
        (is_forwarding && !listens && tracks_connections()).then(|| {
            "its namespace forwards traffic and tracks connections, and nothing listens in it"
                .into()
        })
    };
    let by_links = match links() {
        Ok(links) => why_forwards(&links, is_forwarding),
        Err(e) => Some(unlisted(&e)),
    };
    by_links.or_else(by_table)
}

fn unlisted(e: &io::Error) -> String {
    format!("the links of its namespace can't be listed ({e})")
}

fn why_forwards(links: &[Link], is_forwarding: bool) -> Option<String> {
    let bridge_of = |port: &Link| {
        let master = port.master?;
        links
            .iter()
            .find(|l| l.index == master && l.kind == "bridge")
    };
    if let Some((port, bridge)) = links.iter().find_map(|l| Some((l, bridge_of(l)?))) {
        return Some(format!(
            "its namespace passes traffic on through bridge {} (port {})",
            bridge.name, port.name
        ));
    }
    if !is_forwarding {
        return None;
    }
    let is_tunnel = |l: &&Link| TUNNELS.contains(&l.kind.as_str());
    if let Some(tunnel) = links.iter().find(is_tunnel) {
        return Some(format!(
            "its namespace forwards traffic and has the tap or tunnel {}",
            tunnel.name
        ));
    }
    let is_veth = |l: &&Link| l.kind == "veth";
    let veths: Vec<&Link> = links.iter().filter(is_veth).collect();
    let namespaces: BTreeSet<_> = veths.iter().filter_map(|l| l.peer_netns).collect();
    if namespaces.len() > 1 {
        let names: Vec<_> = veths.iter().map(|l| l.name.as_str()).collect();
        return Some(format!(
            "its namespace forwards traffic and is linked to more than one other namespace ({})",
            names.join(", ")
        ));
    }
    None
}

/// Whether the calling thread's namespace has entries in its table of connections (conntrack). It has them only if a rule
/// in it needs them, such as a translation of addresses (`nf_ct_netns_get` in
/// `net/netfilter/nf_conntrack_proto.c`).
fn tracks_connections() -> bool {
    let count = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").ok();
    let count: Option<u64> = count.and_then(|count| count.trim().parse().ok());
    count.is_some_and(|count| count > 0)
}

/// Whether the calling thread's namespace forwards IPv4 or IPv6. A missing file means no.
fn is_forwarding() -> bool {
    ["ipv4/ip_forward", "ipv6/conf/all/forwarding"]
        .iter()
        .filter_map(|name| fs::read_to_string(format!("/proc/sys/net/{name}")).ok())
        .any(|value| value.trim() != "0")
}

/// The links of the calling thread's namespace that are up.
fn links() -> io::Result<Vec<Link>> {
    for _ in 0..ATTEMPTS {
        if let Some(links) = dump_links()? {
            return Ok(links);
        }
    }
    Err(io::Error::other("they change all the time"))
}

/// As [`links`]; `None` if they have changed meanwhile.
fn dump_links() -> io::Result<Option<Vec<Link>>> {
    let fd = socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        // NETLINK_ROUTE is 0.
        None,
    )?;
    // The kernel replies at once. The timeout only guards against a hang.
    sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(Duration::from_secs(5)))?;
    send(&fd, &request(), SendFlags::empty())?;
    let mut buffer = vec![0; 64 * 1024];
    let mut reply = LinkReply::default();
    while !reply.is_complete {
        // With TRUNC, `n` is the length of the datagram even if the buffer is too short for it.
        let (_, n) = recv(&fd, buffer.as_mut_slice(), RecvFlags::TRUNC)?;
        reply.read(Cursor(buffer.get(..n).ok_or(io::ErrorKind::InvalidData)?))?;
    }
    Ok((!reply.is_inconsistent).then_some(reply.links))
}

/// What has arrived of the reply to a [`request`].
#[derive(Debug, Default)]
struct LinkReply {
    links: Vec<Link>,
    is_complete: bool,
    is_inconsistent: bool,
}

impl LinkReply {
    fn read(&mut self, mut datagram: Cursor<'_>) -> io::Result<()> {
        while !datagram.0.is_empty() && !self.is_complete {
            let Message {
                kind,
                flags,
                sequence,
                body,
            } = next_message(&mut datagram).ok_or(io::ErrorKind::InvalidData)?;
            if sequence != SEQUENCE {
                continue;
            }
            self.is_inconsistent |= flags & NLM_F_DUMP_INTR != 0;
            match kind {
                NLMSG_DONE | NLMSG_ERROR => {
                    reply_error(body)?;
                    self.is_complete = true;
                }
                RTM_NEWLINK => {
                    let link = link(body).ok_or(io::ErrorKind::InvalidData)?;
                    self.links.extend(Some(link).filter(|link| link.is_up));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// `struct ifinfomsg`: all links.
fn request() -> Vec<u8> {
    const LENGTH: u32 = 32;
    let mut r = Vec::with_capacity(LENGTH as usize);
    r.extend(LENGTH.to_ne_bytes());
    r.extend(RTM_GETLINK.to_ne_bytes());
    r.extend(NLM_F_REQUEST_DUMP.to_ne_bytes());
    r.extend(SEQUENCE.to_ne_bytes());
    r.resize(LENGTH as usize, 0);
    r
}

/// Decodes one link; `None` if it is malformed.
fn link(mut m: Cursor<'_>) -> Option<Link> {
    m.take(4)?; // family, device type
    let index = m.u32()?;
    let flags = m.u32()?;
    m.take(4)?; // changed flags
    let mut link = Link {
        index,
        is_up: flags & IFF_UP != 0,
        ..Link::default()
    };
    while let Some((kind, mut value)) = next_attribute(&mut m) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            IFLA_MASTER => link.master = value.u32(),
            IFLA_LINK_NETNSID => link.peer_netns = value.u32(),
            IFLA_LINKINFO => {
                while let Some((kind, value)) = next_attribute(&mut value) {
                    if kind == IFLA_INFO_KIND {
                        link.kind = text(value);
                    }
                }
            }
            _ => {}
        }
    }
    Some(link)
}

/// A string that ends with a zero byte.
fn text(value: Cursor<'_>) -> String {
    let end = value.0.iter().position(|b| *b == 0);
    let bytes = value.0.get(..end.unwrap_or(value.0.len()));
    String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, kind: &str) -> Link {
        Link {
            index,
            name: format!("{kind}{index}"),
            kind: kind.into(),
            ..Link::default()
        }
    }

    fn veth(index: u32, peer_netns: u32) -> Link {
        Link {
            peer_netns: Some(peer_netns),
            ..link(index, "veth")
        }
    }

    #[test]
    fn an_ordinary_pod_forwards_nothing_although_it_inherits_the_setting() {
        // Loopback, eth0, and a second interface of the host's.
        let links = [link(1, ""), veth(2, 0), veth(3, 0)];
        assert_eq!(why_forwards(&links, true), None);
        // A bridge without ports.
        let links = [link(1, ""), veth(2, 0), link(3, "bridge")];
        assert_eq!(why_forwards(&links, true), None);
    }

    #[test]
    fn a_bridge_with_a_port_forwards_whatever_the_setting() {
        let tap = Link {
            master: Some(3),
            ..link(4, "tun")
        };
        let links = [link(1, ""), veth(2, 0), link(3, "bridge"), tap];
        let why = why_forwards(&links, false).unwrap();
        assert!(why.contains("bridge3") && why.contains("tun4"), "{why}");
    }

    #[test]
    fn with_forwarding_on_a_tap_and_a_second_namespace_suggest_it() {
        let machine = [link(1, ""), veth(2, 0), link(3, "tun")];
        let nested = [link(1, ""), veth(2, 0), veth(3, 1)];
        for links in [&machine, &nested] {
            assert!(why_forwards(links, true).is_some());
            assert_eq!(why_forwards(links, false), None);
        }
    }

    #[test]
    fn with_forwarding_on_a_tunnel_suggests_it() {
        for kind in ["wireguard", "ipip", "gre", "vxlan"] {
            let links = [link(1, ""), veth(2, 0), link(3, kind)];
            let why = why_forwards(&links, true).unwrap();
            assert!(why.contains(&format!("{kind}3")), "{why}");
            assert_eq!(why_forwards(&links, false), None);
        }
    }

    const DONE: i32 = 0;

    fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + body.len()).unwrap();
        let mut m = length.to_ne_bytes().to_vec();
        m.extend(kind.to_ne_bytes());
        m.extend(flags.to_ne_bytes());
        m.extend(SEQUENCE.to_ne_bytes());
        m.extend([0; 4]);
        m.extend(body);
        m
    }

    /// `struct ifinfomsg`.
    fn link_message(index: u32, flags: u32) -> Vec<u8> {
        let body = [0, index, flags, 0].map(u32::to_ne_bytes).concat();
        message(RTM_NEWLINK, 0, &body)
    }

    fn read(datagram: &[u8]) -> io::Result<LinkReply> {
        let mut reply = LinkReply::default();
        reply.read(Cursor(datagram)).map(|()| reply)
    }

    #[test]
    fn a_reply_that_ends_with_an_error_is_no_short_list() {
        let [first, done] = [
            link_message(1, IFF_UP),
            message(NLMSG_DONE, 0, &DONE.to_ne_bytes()),
        ];
        let whole = read(&[&*first, &done].concat()).unwrap();
        assert!(whole.is_complete && !whole.is_inconsistent);
        assert_eq!(whole.links.len(), 1);
        let failed = message(NLMSG_DONE, 0, &(-12i32).to_ne_bytes());
        let error = read(&[&*first, &failed].concat()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(12));
        assert!(!read(&first).unwrap().is_complete);
    }

    #[test]
    fn a_reply_during_which_the_links_changed_is_inconsistent() {
        let done = message(NLMSG_DONE, NLM_F_DUMP_INTR, &DONE.to_ne_bytes());
        let reply = read(&[link_message(1, IFF_UP), done].concat()).unwrap();
        assert!(reply.is_complete && reply.is_inconsistent);
    }

    /// The kernel makes `tunl0`, `sit0` and others in each namespace when their module is loaded.
    #[test]
    fn a_link_that_is_down_is_not_listed() {
        assert!(read(&link_message(1, 0)).unwrap().links.is_empty());
    }

    #[test]
    fn the_links_of_this_namespace_include_loopback() {
        let links = links().unwrap();
        assert!(links.iter().any(|l| l.name == "lo"), "{links:?}");
    }
}
