//! Which side opened a connection, from fields of its socket. Where these do not show it, the note decides that `track`
//! has made at the opening, if the table of opening times still has it, and without a note the ports.
//!
//! | socket | backlog | `sk_userlocks` | bind bucket's `fastreuse` |
//! | --- | --- | --- | --- |
//! | accepted, also after its listener closed | the listener's, 1 or more | 4 or 0 | 0 or more |
//! | dialled | 0 | 0, or 16 where the kernel has it | −1 |
//! | bound to a port, then dialled | any | 8 is set | 0 or more |
//! | bound to port 0, then dialled | 0 | 4 | 0 or more |
//! | accepted by a listener with a backlog of 0 | 0 | 4 or 0 | 0 or more |
//!
//! An accepted socket has the backlog of its listener, and never the lock on its port, because `sk_clone_lock`
//! (net/core/sock.c) clears it. `connect()` makes a bind bucket with −1 (`__inet_hash_connect` in
//! net/ipv4/inet_hashtables.c). The last two rows look alike: there `track`'s note decides, or else the ports. An
//! accepted socket that the application disconnects and connects again still looks accepted, and only the note shows
//! that the pod dialled.

use std::{collections::HashSet, ops::RangeInclusive};

/// `SOCK_BINDPORT_LOCK` (include/net/sock.h): the application bound the socket to a port. An accepted socket never has
/// it (`sk_clone_lock` in net/core/sock.c).
pub const BOUND_PORT: u8 = 8;

/// `SOCK_CONNECT_BIND`: connect() chose the port. Older kernels do not set it.
pub const BOUND_BY_CONNECT: u8 = 16;

/// Which side opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The peer: the pod accepted it, or is about to.
    Accepted,
    /// The pod.
    Dialled,
    /// Not known, because `inspect` could not read the socket. Counts as accepted, so that ebb never cuts a client
    /// off.
    Unknown,
}

/// The fields of a socket that show which side opened its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OriginTraits {
    /// `sk_max_ack_backlog`.
    pub backlog: u32,
    /// `sk_userlocks`.
    pub locks: u8,
    /// What `track` has noted; `None` if it did not see the opening, or the note is gone.
    pub noted: Option<Noted>,
    /// `fastreuse` of its bind bucket; `None` if it has no bind bucket.
    pub fast_reuse: Option<i8>,
    /// The pod's port.
    pub local_port: u16,
    /// The peer's port.
    pub remote_port: u16,
}

/// How `track` saw a connection open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    /// The pod accepted it.
    Accepted,
    /// The pod dialled it with a socket that had been accepted or had listened before.
    Dialled,
}

/// The ports of a network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespacePorts {
    /// Ports with a listener.
    pub listening: HashSet<u16>,
    /// The ephemeral ports (`net.ipv4.ip_local_port_range`), if ebb could read them.
    pub ephemeral: Option<RangeInclusive<u16>>,
}

impl OriginTraits {
    /// Which side opened the connection. If the socket fits both, it counts as accepted, unless its own port is
    /// ephemeral and has no listener and the peer's port is not ephemeral. HAProxy and Java make such connections
    /// when they dial from a given source address.
    pub fn origin(&self, ports: &NamespacePorts) -> Origin {
        let is_ephemeral = |port| {
            let range = ports.ephemeral.as_ref();
            range.is_some_and(|range| range.contains(&port))
        };
        let dialled = self.locks & BOUND_PORT != 0 || self.noted == Some(Noted::Dialled);
        let accepted = self.noted == Some(Noted::Accepted) || self.backlog > 0;
        let connected =
            self.locks & BOUND_BY_CONNECT != 0 || self.fast_reuse.is_some_and(|n| n < 0);
        let dialled_by_ports = !ports.listening.contains(&self.local_port)
            && is_ephemeral(self.local_port)
            && !is_ephemeral(self.remote_port);
        if dialled || (!accepted && (connected || dialled_by_ports)) {
            Origin::Dialled
        } else {
            Origin::Accepted
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPHEMERAL: RangeInclusive<u16> = 32768..=60999;

    fn origin(backlog: u32, locks: u8, fast_reuse: i8) -> Origin {
        between(backlog, locks, fast_reuse, (40_000, 40_001), &[])
    }

    fn between(
        backlog: u32,
        locks: u8,
        fast_reuse: i8,
        (local_port, remote_port): (u16, u16),
        listening: &[u16],
    ) -> Origin {
        let traits = OriginTraits {
            backlog,
            locks,
            noted: None,
            fast_reuse: Some(fast_reuse),
            local_port,
            remote_port,
        };
        traits.origin(&NamespacePorts {
            listening: listening.iter().copied().collect(),
            ephemeral: Some(EPHEMERAL),
        })
    }

    #[test]
    fn each_row_of_the_table_has_its_origin() {
        for (backlog, locks) in [(1, 0), (128, 4), (4096, 0)] {
            assert_eq!(origin(backlog, locks, 0), Origin::Accepted);
            assert_eq!(origin(backlog, locks, 1), Origin::Accepted);
        }
        for locks in [0, 16] {
            assert_eq!(origin(0, locks, -1), Origin::Dialled);
        }
        for (backlog, locks) in [(0, 8), (0, 12), (128, 12), (0, 24)] {
            assert_eq!(origin(backlog, locks, 0), Origin::Dialled);
        }
    }

    #[test]
    fn ports_decide_between_the_two_rows_that_look_alike() {
        for locks in [0, 4] {
            let ports = |ports, listening: &[u16]| between(0, locks, 0, ports, listening);
            assert_eq!(ports((40_000, 5432), &[]), Origin::Dialled);
            assert_eq!(ports((40_000, 5432), &[40_000]), Origin::Accepted);
            assert_eq!(ports((40_000, 40_001), &[]), Origin::Accepted);
            assert_eq!(ports((8080, 5432), &[]), Origin::Accepted);
            assert_eq!(ports((8080, 40_000), &[]), Origin::Accepted);
        }
    }

    /// Like a gRPC server, on whose port nothing listens any more. By its ports alone it would be dialled.
    #[test]
    fn a_backlog_decides_over_the_ports() {
        let ports = (50_051, 443);
        assert_eq!(between(128, 4, 0, ports, &[]), Origin::Accepted);
        assert_eq!(between(0, 4, 0, ports, &[]), Origin::Dialled);
    }

    #[test]
    fn an_opening_that_track_saw_decides_over_the_socket() {
        let traits = |backlog, noted| OriginTraits {
            backlog,
            locks: 4,
            noted: Some(noted),
            fast_reuse: Some(0),
            local_port: 40_000,
            remote_port: 5432,
        };
        let ports = NamespacePorts {
            ephemeral: Some(EPHEMERAL),
            ..NamespacePorts::default()
        };
        assert_eq!(traits(0, Noted::Accepted).origin(&ports), Origin::Accepted);
        assert_eq!(traits(128, Noted::Dialled).origin(&ports), Origin::Dialled);
    }

    #[test]
    fn a_socket_that_fits_both_is_accepted_if_the_ephemeral_ports_are_unknown() {
        let traits = OriginTraits {
            backlog: 0,
            locks: 4,
            noted: None,
            fast_reuse: None,
            local_port: 40_000,
            remote_port: 5432,
        };
        assert_eq!(traits.origin(&NamespacePorts::default()), Origin::Accepted);
    }
}
