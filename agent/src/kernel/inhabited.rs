//! The network namespaces that processes live in.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::Path,
};

use super::Netns;
use crate::ids::NetnsInode;

/// A network namespace and a process in it.
pub(super) struct Inhabited {
    pub(super) netns: Netns,
    pid: u32,
}

/// All network namespaces that a process lives in, each once. Processes end while this looks: those are skipped.
pub(super) fn namespaces() -> Vec<Inhabited> {
    let mut found = HashMap::new();
    for (pid, inode) in processes() {
        if !found.contains_key(&inode)
            && let Ok(netns) = Netns::of_process(pid)
        {
            found.insert(netns.inode(), Inhabited { netns, pid });
        }
    }
    found.into_values().collect()
}

/// Their inode numbers alone.
pub(super) fn inodes() -> HashSet<NetnsInode> {
    processes().map(|(_, inode)| inode).collect()
}

/// Each process and the network namespace it lives in.
fn processes() -> impl Iterator<Item = (u32, NetnsInode)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        Some((pid, Netns::inode_at(&entry.path().join("ns/net")).ok()?))
    })
}

impl Inhabited {
    /// Whether there is nothing to walk: no TCP socket is bound to a connection or a listener (`TCP: inuse` in
    /// net/ipv4/proc.c). What is not known counts as something.
    ///
    /// The kernel adds up numbers of several CPUs, one after the other: a socket that comes on one and another
    /// that goes on the next in between can hide a third. Not twice in a row.
    pub(super) fn has_no_tcp(&self) -> bool {
        let net = format!("/proc/{}/net", self.pid);
        let none = || in_use(Path::new(&net)).is_ok_and(|n| n == 0);
        none() && none()
    }
}

fn in_use(net: &Path) -> io::Result<u64> {
    let v4 = parse(&fs::read_to_string(net.join("sockstat"))?, "TCP: inuse ");
    let v6 = match fs::read_to_string(net.join("sockstat6")) {
        Ok(text) => parse(&text, "TCP6: inuse "),
        // Without IPv6 there is none.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Some(0),
        Err(e) => return Err(e),
    };
    let sum = v4.zip(v6).map(|(v4, v6)| v4 + v6);
    sum.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn this_process_is_among_those_that_live_in_a_namespace() {
        let own = Netns::of_process(std::process::id()).unwrap().inode();
        assert!(inodes().contains(&own));
        assert!(namespaces().iter().any(|n| n.netns.inode() == own));
    }

    #[test]
    fn a_namespace_with_a_listener_has_tcp_and_an_unreadable_one_is_not_known_to_have_none() {
        let _listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let netns = || Netns::of_process(std::process::id()).unwrap();
        let pid = std::process::id();
        assert!(
            !Inhabited {
                netns: netns(),
                pid
            }
            .has_no_tcp()
        );
        let gone = Inhabited {
            netns: netns(),
            pid: u32::MAX,
        };
        assert!(!gone.has_no_tcp());
    }

    #[test]
    fn sockstat_is_read_by_its_names() {
        let text =
            "sockets: used 9\nTCP: inuse 5 orphan 0 tw 0 alloc 7 mem 1\nUDP: inuse 3 mem 0\n";
        assert_eq!(parse(text, "TCP: inuse "), Some(5));
        assert_eq!(parse(text, "TCP6: inuse "), None);
    }
}
