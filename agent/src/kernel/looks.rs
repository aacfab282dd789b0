//! Looks: what the kernel's tables show of a pod.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, BorrowedFd},
    thread,
    time::Duration,
};

use ebb_common::EphemeralPorts;

use super::{
    Look, LookUp,
    inner::{Inner, watch_keys},
    netns::ephemeral_ports,
    pool::DiagPool,
    ties::{BareAcks, break_tie, monotonic},
};
use crate::{
    clock::BootTime,
    flow::{Sample, origin::tell_by_port},
    lock::lock,
    pods::Scope,
};

/// So many ties that the second walk is worth a thread while the first is under way.
const MANY_TIES: usize = 4096;

/// After how many samples of a dump the clock is read.
const PART: usize = 64;

/// What a dump showed, and when.
struct Dump {
    samples: Vec<Sample>,
    began: Duration,
    /// The end of each [`PART`].
    parts: Vec<Duration>,
    ended: Duration,
    /// What the second walk found, if it has been made.
    bare_acks: Option<BareAcks>,
}

impl Inner {
    /// Looks for several scopes of one namespace at once.
    pub(super) fn walk(&self, scopes: &[Scope]) -> io::Result<Vec<Look>> {
        let Some(scope) = scopes.first() else {
            return Ok(vec![]);
        };
        let storage = lock(&self.programs).flows.try_clone()?;
        let pool = self.pool(scope)?;
        let taken_at = BootTime::now();
        let mut dump = self.dump(&pool, storage.as_fd(), scopes)?;
        // Where they can't be read, what has no record counts as inbound.
        let ephemeral = || pool.netns().run(ephemeral_ports);
        tell_by_port(&mut dump.samples, || {
            ephemeral().unwrap_or(EphemeralPorts::NONE)
        });
        if let Scope::Netns { inode, .. } = scope {
            self.own.mark(*inode, &mut dump.samples);
        }
        // After the dump, so that it has the cgroups of all that is in there.
        let scopes = scopes.iter().map(|scope| self.as_it_is_now(scope));
        let scopes = scopes.collect::<io::Result<Vec<_>>>()?;
        let is_tie = |s: &Sample| s.is_tie() && is_of_any(s, &scopes);
        if dump.bare_acks.is_none() && dump.samples.iter().any(is_tie) {
            dump.bare_acks = Some(self.bare_acks(pool.netns())?);
        }
        let mut samples = dump.with_broken_ties();
        let (last, others) = scopes.split_last().ok_or(io::ErrorKind::InvalidInput)?;
        let mut looks = Vec::with_capacity(scopes.len());
        for scope in others {
            let samples = samples.iter().filter(|s| is_of(s, scope));
            looks.push(Look {
                taken_at,
                samples: samples.cloned().collect(),
            });
        }
        samples.retain(|s| is_of(s, last));
        looks.push(Look { taken_at, samples });
        Ok(looks)
    }

    /// Dumps the namespace. Where many ties come up, the second walk is made meanwhile, if nobody else needs to walk.
    fn dump(&self, pool: &DiagPool, storage: BorrowedFd<'_>, scopes: &[Scope]) -> io::Result<Dump> {
        thread::scope(|threads| {
            let (mut samples, mut parts, mut ties) = (Vec::new(), Vec::new(), 0);
            let mut second = None;
            let began = monotonic();
            pool.ask(|diag| {
                diag.dump(Some(storage), |sample: Sample| {
                    ties += usize::from(sample.is_tie() && is_of_any(&sample, scopes));
                    samples.push(sample);
                    if samples.len() % PART == 0 {
                        parts.push(monotonic());
                    }
                    if ties >= MANY_TIES && second.is_none() {
                        second = self.walks.spare().map(|turn| {
                            threads.spawn(move || {
                                let _turn = turn;
                                self.bare_acks(pool.netns())
                            })
                        });
                    }
                })
            })?;
            let ended = monotonic();
            let second = second.map(|walk| walk.join().unwrap_or_else(|_| Err(panicked())));
            Ok(Dump {
                samples,
                began,
                parts,
                ended,
                bare_acks: second.transpose()?,
            })
        })
    }

    pub(super) fn look_up(
        &self,
        scope: &Scope,
        flows: &[(SocketAddr, SocketAddr)],
    ) -> io::Result<LookUp> {
        let keys = watch_keys(scope)?;
        let pool = self.pool(scope)?;
        let taken_at = BootTime::now();
        let edges = lock(&self.watches).edges(&keys)?;
        let samples = pool.ask(|diag| {
            let found = flows.iter().map(|(l, r)| diag.find(*l, *r).transpose());
            found.flatten().collect()
        })?;
        // A flow in a cgroup that is not watched makes no edge, so that nothing tells to look it up.
        if self.as_it_is_now(scope)? != *scope {
            return Err(io::Error::other("it has made cgroups since it is watched"));
        }
        Ok(LookUp {
            taken_at,
            edges,
            samples,
        })
    }

    /// A pod on the host's network may have made cgroups since its scope was told: those come after the others.
    fn as_it_is_now(&self, scope: &Scope) -> io::Result<Scope> {
        let (Scope::HostNetwork(cgroups), Some(nested)) = (scope, &self.nested) else {
            return Ok(scope.clone());
        };
        let mut later = nested.with_descendants(cgroups)?;
        later.retain(|id| !cgroups.contains(id));
        let all = cgroups.iter().copied().chain(later);
        Ok(Scope::HostNetwork(all.collect()))
    }
}

impl Dump {
    /// The samples, with what the second walk found of those whose times do not tell who spoke last.
    fn with_broken_ties(mut self) -> Vec<Sample> {
        let Some(bare_acks) = &self.bare_acks else {
            return self.samples;
        };
        let parts = self.parts.iter().copied().chain([self.ended]);
        for (part, seen_by) in self.samples.chunks_mut(PART).zip(parts) {
            for sample in part.iter_mut().filter(|s| s.is_tie()) {
                break_tie(sample, bare_acks, self.began, seen_by, self.ended);
            }
        }
        self.samples
    }
}

fn panicked() -> io::Error {
    io::Error::other("the second walk came to no end")
}

fn is_of_any(sample: &Sample, scopes: &[Scope]) -> bool {
    scopes.iter().any(|scope| is_of(sample, scope))
}

/// Whether a socket of the scope's namespace is the scope's. A host-network pod's are those of its cgroups.
fn is_of(sample: &Sample, scope: &Scope) -> bool {
    match scope {
        Scope::HostNetwork(cgroups) => sample.cgroup.is_some_and(|c| cgroups.contains(&c)),
        _ => true,
    }
}
