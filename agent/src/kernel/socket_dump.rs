//! Dumps and lookups of a pod's sockets: sock_diag lists the connections, and `inspect` completes each from its
//! socket.

use std::{collections::HashSet, io, net::SocketAddr};

use ebb_common::WorkloadKey;
use ebb_core::{
    clock::BootTime,
    flow::{NamespacePorts, Origin, Sample, TcpState},
    scope::Scope,
};

use super::{
    FlowLookUp, LookUpFailure, SocketDump,
    inspector::{Inspected, Inspector},
    links,
    sock_diag::SockDiag,
    tracker::TrackerState,
    watches::watch_keys,
};
use crate::linux::{
    netns::{Netns, ephemeral_ports, fast_open_servers},
    sync::lock,
};

impl TrackerState {
    /// Dumps a namespace for several scopes in it. The result has one dump per scope, in the same order.
    pub(super) fn dump(&self, scopes: &[Scope]) -> io::Result<Vec<SocketDump>> {
        let Some(scope) = scopes.first() else {
            return Ok(vec![]);
        };
        let netns = self.netns(scope)?;
        let taken_at = BootTime::now();
        let missed_changes = self.programs.missed_changes()?;
        let counters = |key: &WorkloadKey| self.programs.counters(key);
        let known = self.open_counts.known_in(netns.inode());
        let before = known.iter().filter_map(|key| Some((*key, counters(key)?)));
        let before = before.collect();
        let (mut samples, forwards) = netns.run(|| {
            let mut samples = complete_dump(&self.programs.inspector)?;
            let Scope::Netns { inode, .. } = scope else {
                return Ok((samples, None));
            };
            self.own_ports.mark(*inode, &mut samples);
            let listens = samples.iter().any(Sample::is_listener_of_pod);
            Ok((samples, links::forwards(listens)))
        })?;
        self.open_counts
            .record_dump(netns.inode(), &samples, &before, counters);
        // After the dump, so that no cgroup of a dumped socket is missing.
        let scopes = scopes.iter().map(|scope| self.with_new_cgroups(scope));
        let scopes = scopes.collect::<io::Result<Vec<_>>>()?;
        samples.retain(|sample| scopes.iter().any(|scope| is_in(sample, scope)));
        self.mark_probes(&mut samples)?;
        let (last, others) = scopes.split_last().ok_or(io::ErrorKind::InvalidInput)?;
        let dump = |samples| SocketDump {
            taken_at,
            missed_changes,
            samples,
            forwards: forwards.clone(),
        };
        let mut dumps = Vec::with_capacity(scopes.len());
        for scope in others {
            let samples = samples.iter().filter(|s| is_in(s, scope));
            dumps.push(dump(samples.cloned().collect()));
        }
        samples.retain(|s| is_in(s, last));
        dumps.push(dump(samples));
        Ok(dumps)
    }

    fn mark_probes(&self, samples: &mut [Sample]) -> io::Result<()> {
        let accepted = |s: &Sample| s.origin == Origin::Accepted && s.state != TcpState::Listen;
        let connections: Vec<_> = samples
            .iter()
            .filter(|s| accepted(s))
            .map(|s| (s.local, s.remote))
            .collect();
        let probes = self.host.run(|| self.probes(&connections))?;
        for (sample, probe) in samples.iter_mut().filter(|s| accepted(s)).zip(probes) {
            sample.probe = probe;
        }
        Ok(())
    }

    /// Looks up single flows of a watched pod. Must run in the pod's namespace.
    pub(super) fn look_up(
        &self,
        scope: &Scope,
        flows: &[(SocketAddr, SocketAddr)],
    ) -> Result<FlowLookUp, LookUpFailure> {
        let keys = watch_keys(scope)?;
        let taken_at = BootTime::now();
        let sent = lock(&self.programs.watches).sent(&keys)?;
        if fast_open_servers()? {
            return Err(LookUpFailure::FastOpen);
        }
        let samples = look_up_connections(&self.programs.inspector, flows)?;
        // The programs send no events of a flow in a cgroup that is not watched, so the caller can't know it.
        if self.with_new_cgroups(scope)? != *scope {
            return Err(LookUpFailure::NewCgroups);
        }
        Ok(FlowLookUp {
            taken_at,
            sent,
            missed_changes: self.programs.missed_changes()?,
            samples,
        })
    }

    /// The connection between `local` and `remote` in the scope's namespace, if it exists.
    pub(super) fn find(
        &self,
        netns: &Netns,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> io::Result<Option<Sample>> {
        let inspector = &self.programs.inspector;
        let found = netns.run(|| look_up_connections(inspector, &[(local, remote)]))?;
        Ok(found.into_iter().next())
    }
}

/// Dumps all TCP sockets of the calling thread's namespace, and completes them.
fn complete_dump(inspector: &Inspector) -> io::Result<Vec<Sample>> {
    let mut samples = Vec::new();
    SockDiag::open()?.dump(|sample| samples.push(sample))?;
    let listening: HashSet<u16> = samples
        .iter()
        .filter(|s| s.state == TcpState::Listen)
        .map(|s| s.local.port())
        .collect();
    let ports = NamespacePorts {
        listening,
        ephemeral: ephemeral_ports().ok(),
    };
    complete(inspector, &mut samples, &ports);
    Ok(samples)
}

/// Completes a dump of the calling thread's namespace from the sockets themselves. Drops connections that the kernel's
/// own lookup no longer finds: they have ended. Keeps the dumped values of a connection that can't be read.
fn complete(inspector: &Inspector, samples: &mut Vec<Sample>, ports: &NamespacePorts) {
    let mut is_over = vec![false; samples.len()];
    let connections: Vec<_> = samples
        .iter()
        .enumerate()
        .filter(|(_, s)| is_inspected(s.state))
        .map(|(index, s)| (index, (s.local, s.remote)))
        .collect();
    let tuples = connections.iter().map(|(_, tuple)| *tuple);
    let outcome = inspector.inspect(tuples, |n, found| {
        let index = connections.get(n).map_or(usize::MAX, |(index, _)| *index);
        let (Some(sample), Some(is_over)) = (samples.get_mut(index), is_over.get_mut(index)) else {
            return;
        };
        match found {
            // A socket that is bound to an interface keeps the dumped values, because the lookup never finds it.
            Inspected::Nothing => *is_over = sample.interface == 0,
            // A socket that is not plain TCP keeps them as well, because `inspect` can't read it.
            Inspected::Other(state) => {
                *is_over = matches!(state, Some(TcpState::TimeWait | TcpState::NewSynRecv));
            }
            // Another connection uses the same addresses, so the dumped one has ended.
            Inspected::Connection(socket) if socket.cookie() != Some(sample.cookie) => {
                *is_over = true;
            }
            Inspected::Connection(socket) => {
                socket.complete(sample);
                let traits = socket.origin_traits(sample.local.port(), sample.remote.port());
                sample.origin = if sample.local == sample.remote {
                    // A socket that is connected to itself.
                    Origin::Dialled
                } else {
                    traits.origin(ports)
                };
            }
        }
    });
    if let Err(e) = outcome {
        tracing::warn!("can't inspect connections: {e}; they count as inbound and live");
    }
    let mut is_over = is_over.into_iter();
    samples.retain(|_| !is_over.next().unwrap_or(false));
}

/// Whether sockets in this state can be flows.
const fn is_inspected(state: TcpState) -> bool {
    !matches!(
        state,
        TcpState::Listen | TcpState::SynSent | TcpState::Close | TcpState::TimeWait
    )
}

/// Those of these connections that exist in the calling thread's namespace.
pub(super) fn look_up_connections(
    inspector: &Inspector,
    flows: &[(SocketAddr, SocketAddr)],
) -> io::Result<Vec<Sample>> {
    let mut samples = Vec::with_capacity(flows.len());
    inspector.inspect(flows.iter().copied(), |n, found| {
        if let (Inspected::Connection(socket), Some((local, remote))) = (found, flows.get(n)) {
            samples.push(socket.sample(*local, *remote));
        }
    })?;
    Ok(samples)
}

/// Whether a socket of the scope's namespace belongs to the scope: on the host's network, whether its cgroup does. A
/// listener without a known cgroup may belong to any pod.
fn is_in(sample: &Sample, scope: &Scope) -> bool {
    match scope {
        Scope::HostNetwork(cgroups) => sample
            .cgroup
            .map_or(sample.state == TcpState::Listen, |c| cgroups.contains(&c)),
        _ => true,
    }
}
