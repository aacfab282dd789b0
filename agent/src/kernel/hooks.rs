//! What the tests of this crate need of a tracker and nobody else may use: states that can't be had otherwise.

use std::{io, os::fd::OwnedFd, time::Duration};

use aya::maps::MapError;
use ebb_common::{
    Correction, EphemeralPorts, LISTENER_PLACES, ListenKey, PORTS_PLACES, Workload, WorkloadKey,
};

use super::Tracker;
use crate::{
    clock::BootTime,
    ids::{CgroupId, NetnsInode},
    lock::lock,
};

#[doc(hidden)]
impl Tracker {
    /// Makes a counter wrong, for tests: what an audit is to find can't be had otherwise.
    ///
    /// # Errors
    ///
    /// The kernel does not do it.
    pub fn miscount(&self, cgroup: CgroupId, netns: NetnsInode, by: i64) -> io::Result<()> {
        let inner = &self.inner;
        let wrong = Correction {
            cgroup: cgroup.0,
            netns: netns.0,
            used: 1,
            inbound: by,
        };
        lock(&inner.auditor).correct(&inner.programs, inner.host.netns(), &[wrong])
    }

    /// Makes a socket deaf as closing an idle flow does, and comes to its end before it shuts it down.
    ///
    /// # Errors
    ///
    /// The kernel does not do it.
    pub fn deafen(&self, socket: &OwnedFd, lasting: Duration) -> io::Result<()> {
        lock(&self.inner.programs).deafen(socket, BootTime::now() + lasting)
    }

    /// Fills the map of workloads with `n` empty entries of a namespace, for tests: so many pods can't be had.
    ///
    /// # Errors
    ///
    /// The kernel does not do it, other than for want of room.
    pub fn fill(&self, netns: NetnsInode, n: u64) -> io::Result<()> {
        let map = &mut lock(&self.inner.programs).forgettable;
        for cgroup in 0..n {
            let key = WorkloadKey {
                cgroup,
                netns: netns.0,
                zero: 0,
            };
            match map.insert(key, Workload::default(), 0) {
                Err(MapError::SyscallError(e))
                    if e.io_error.raw_os_error()
                        == Some(rustix::io::Errno::TOOBIG.raw_os_error()) =>
                {
                    return Ok(());
                }
                inserted => inserted.map_err(io::Error::other)?,
            }
        }
        Ok(())
    }

    /// Leaves no place in the maps that audits need, as audits of very many namespaces and listeners would.
    ///
    /// # Errors
    ///
    /// The kernel does not do it.
    pub fn crowd_audits(&self) -> io::Result<()> {
        let inference = &mut lock(&self.inner.auditor).inference;
        // Numbers that no namespace has.
        for netns in (1..).take(PORTS_PLACES) {
            let ports = inference.ports.insert(netns, EphemeralPorts::NONE, 0);
            ports.map_err(io::Error::other)?;
        }
        for port in (0..).take(LISTENER_PLACES) {
            let listener = ListenKey { netns: 1, port };
            let listeners = inference.listeners.insert(listener, 1, 0);
            listeners.map_err(io::Error::other)?;
        }
        Ok(())
    }
}
