//! Loading, attaching and seeding the BPF programs.

use std::{
    io::{self, Read as _},
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, RingBuf},
    programs::{BtfTracePoint, Iter, ProgramError, SocketFilter, iter::IterLink},
};
use ebb_common::{
    Correction, EphemeralPorts, LOSSES, ListenKey, PORTS_PLACES, Remembered, Workload, WorkloadKey,
};

use super::{
    KernelError,
    earlier::Earlier,
    inhabited::{self, Inhabited},
    netns::{Netns, ephemeral_ports},
    offsets, poll,
    watches::Watches,
};
use crate::{
    clock::BootTime,
    ids::{CgroupId, NetnsInode},
    lock::lock,
    memory,
};

/// The compiled programs, built by build.rs.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ebb-ebpf"));

/// The tracker, twice: see its module.
const TRACKERS: [&str; 2] = ["track", "track_second"];

/// The loaded programs. They are detached and all maps freed when this is dropped, also when the process
/// is killed: nothing is pinned. Only the filters of connections that were closed stay until those are gone (`close`).
pub(super) struct Programs {
    ebpf: Ebpf,
    /// See `maps::WORKLOADS` in the programs. For reading, which takes a while and needs no lock.
    pub(super) workloads: Arc<HashMap<MapData, WorkloadKey, Workload>>,
    /// The same map, for who forgets entries.
    pub(super) forgettable: HashMap<MapData, WorkloadKey, Workload>,
    /// What seeding and audits need; the latter take it.
    pub(super) inference: Option<Inference>,
    /// What is watched.
    pub(super) watches: Arc<Mutex<Watches>>,
    /// See `maps::KUBELETS`.
    kubelets: HashMap<MapData, u64, u8>,
    /// See `maps::KUBELETS_KNOWN`.
    kubelets_known: Array<MapData, u32>,
    /// See `maps::DEAF_UNTIL`.
    deaf_until: Array<MapData, u64>,
    /// See `maps::FLOWS`.
    pub(super) flows: OwnedFd,
    /// See `maps::EARLIER`.
    earlier: HashMap<MapData, u64, Remembered>,
    /// See `maps::LOST`.
    pub(super) lost: Arc<Array<MapData, u64>>,
    /// See `maps::EVENTS`; taken once.
    pub(super) events: Option<RingBuf<MapData>>,
}

/// What the programs infer the direction of older flows from, and how audits correct counters.
pub(super) struct Inference {
    /// See `maps::LISTENERS`.
    pub(super) listeners: HashMap<MapData, ListenKey, u8>,
    /// See `maps::PORTS`.
    pub(super) ports: HashMap<MapData, u32, EphemeralPorts>,
    /// See `maps::CORRECT`.
    pub(super) correct: Array<MapData, Correction>,
}

impl Programs {
    /// Loads the programs, attaches the tracker, then seeds the flows that exist, of which an `earlier` agent knew
    /// more.
    ///
    /// # Errors
    ///
    /// See [`KernelError`]. Nothing stays attached after an error.
    pub(super) fn start(
        host_netns: NetnsInode,
        log: bool,
        earlier: &Earlier,
    ) -> Result<Self, KernelError> {
        let mut programs = Self::load(host_netns, log, earlier)?;
        programs.attach()?;
        programs.seed()?;
        // Nobody asks for it again.
        for (cookie, _) in earlier {
            let _ = programs.earlier.remove(cookie);
        }
        memory::give_back();
        Ok(programs)
    }

    fn load(host_netns: NetnsInode, log: bool, earlier: &Earlier) -> Result<Self, KernelError> {
        let offsets = offsets::resolve(Path::new(offsets::VMLINUX_BTF))?;
        // aya-log's levels: 0 is none, 4 is debug.
        let level: u8 = if log { 4 } else { 0 };
        let places = u32::try_from(earlier.len()).unwrap_or(u32::MAX).max(1);
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("EARLIER", places)
            .override_global("EARLIER_KNOWN", &u32::from(!earlier.is_empty()), true)
            .override_global("OFFSETS", &offsets, true)
            .override_global("HOST_NETNS", &host_netns.0, true)
            .override_global("AYA_LOG_LEVEL", &level, true)
            .load(OBJECT)
            .map_err(|e| refused("the BPF maps", e))?;
        // Programs name their maps by descriptor, so they are loaded before any map is taken away.
        let btf = Btf::from_sys_fs().map_err(|e| refused("its own BTF", e))?;
        for name in TRACKERS {
            program::<BtfTracePoint>(&mut ebpf, name)?
                .load("inet_sock_set_state", &btf)
                .map_err(|e| refused("the program tp_btf/inet_sock_set_state", e))?;
        }
        for name in ["seed", "audit", "correct", "bare_ack", "remember"] {
            program::<Iter>(&mut ebpf, name)?
                .load("tcp", &btf)
                .map_err(|e| refused("the program iter/tcp", e))?;
        }
        for name in ["deaf_for_now", "deaf"] {
            program::<SocketFilter>(&mut ebpf, name)?
                .load()
                .map_err(|e| refused("the socket filter", e))?;
        }
        if log {
            forward_logs(&mut ebpf)?;
        }
        let events = RingBuf::try_from(take(&mut ebpf, "EVENTS")?)
            .map_err(|e| refused("the ring buffer", e))?;
        let flows = match take(&mut ebpf, "FLOWS")? {
            Map::SkStorage(flows) => flows.fd().as_fd().try_clone_to_owned(),
            _ => return Err(refused("the map FLOWS", "it is no socket storage")),
        }
        .map_err(|e| refused("the map FLOWS", e))?;
        let workloads = take(&mut ebpf, "WORKLOADS")?;
        let mut known = hash(&mut ebpf, "EARLIER")?;
        for (cookie, flow) in earlier {
            // A flow that finds no place is seeded like any other, and no reason not to start.
            let _ = known.insert(cookie, flow, 0);
        }
        Ok(Self {
            forgettable: HashMap::try_from(again(&workloads)?)
                .map_err(|e| refused("the map WORKLOADS", e))?,
            workloads: Arc::new(
                HashMap::try_from(workloads).map_err(|e| refused("the map WORKLOADS", e))?,
            ),
            inference: Some(Inference {
                listeners: hash(&mut ebpf, "LISTENERS")?,
                ports: hash(&mut ebpf, "PORTS")?,
                correct: Array::try_from(take(&mut ebpf, "CORRECT")?)
                    .map_err(|e| refused("the map CORRECT", e))?,
            }),
            watches: Arc::new(Mutex::new(Watches::new(
                hash(&mut ebpf, "WATCHED")?,
                Array::try_from(take(&mut ebpf, "WATCHES")?)
                    .map_err(|e| refused("the map WATCHES", e))?,
            ))),
            kubelets: hash(&mut ebpf, "KUBELETS")?,
            kubelets_known: Array::try_from(take(&mut ebpf, "KUBELETS_KNOWN")?)
                .map_err(|e| refused("the map KUBELETS_KNOWN", e))?,
            deaf_until: Array::try_from(take(&mut ebpf, "DEAF_UNTIL")?)
                .map_err(|e| refused("the map DEAF_UNTIL", e))?,
            lost: Arc::new(
                Array::try_from(take(&mut ebpf, "LOST")?)
                    .map_err(|e| refused("the map LOST", e))?,
            ),
            flows,
            earlier: known,
            events: Some(events),
            ebpf,
        })
    }

    fn attach(&mut self) -> Result<(), KernelError> {
        for name in TRACKERS {
            let track: &mut BtfTracePoint = program(&mut self.ebpf, name)?;
            track
                .attach()
                .map_err(|e| refused("the program tp_btf/inet_sock_set_state", e))?;
        }
        Ok(())
    }

    /// Walks the sockets of every network namespace that has a process and a TCP socket. One made meanwhile
    /// needs no walk: its sockets are all seen by the tracker.
    ///
    /// Each walk visits the connection table of the whole node, so they are shared out among the CPUs.
    fn seed(&mut self) -> Result<(), KernelError> {
        let Some(mut inference) = self.inference.take() else {
            return Ok(());
        };
        let mut namespaces = inhabited::namespaces();
        namespaces.retain(|n| !n.has_no_tcp());
        let walkers = thread::available_parallelism().map_or(1, |n| n.get().min(MOST_WALKERS));
        let mut done = Ok(());
        for batch in namespaces.chunks(PORTS_PLACES) {
            inference.prepare_to_seed(batch.iter().map(|n| &n.netns));
            done = self.seed_batch(batch, walkers);
            inference.clear();
            if done.is_err() {
                break;
            }
        }
        self.inference = Some(inference);
        done
    }

    fn seed_batch(&mut self, batch: &[Inhabited], walkers: usize) -> Result<(), KernelError> {
        let (programs, queue) = (Mutex::new(self), Mutex::new(batch.iter()));
        thread::scope(|s| {
            let walking: Vec<_> = (0..walkers.min(batch.len()))
                .map(|_| s.spawn(|| seed_each(&programs, &queue)))
                .collect();
            let ended = walking.into_iter().map(|walker| {
                walker.join().unwrap_or_else(|_| {
                    Err(KernelError::Io {
                        what: "seeding".into(),
                        source: io::Error::other("a thread panicked"),
                    })
                })
            });
            ended.collect()
        })
    }

    /// From now on, what these cgroups dial from the host's namespace is a probe.
    pub(super) fn set_kubelets(&mut self, ids: &[CgroupId]) -> io::Result<()> {
        let before: Vec<u64> = self.kubelets.keys().filter_map(Result::ok).collect();
        for id in before.iter().filter(|id| !ids.contains(&CgroupId(**id))) {
            let _ = self.kubelets.remove(id);
        }
        for id in ids {
            self.kubelets.insert(id.0, 1, 0).map_err(io::Error::other)?;
        }
        let known = u32::try_from(ids.len()).unwrap_or(u32::MAX);
        self.kubelets_known
            .set(0, known, 0)
            .map_err(io::Error::other)
    }

    /// Has a socket get no payload until `until`, whatever becomes of this process. It replaces a filter that the
    /// socket has. A moment later than before holds for all that are deaf so far.
    pub(super) fn deafen(&mut self, socket: &OwnedFd, until: BootTime) -> io::Result<()> {
        let before = self.deaf_until.get(&0, 0).map_err(io::Error::other)?;
        let until = before.max(until.as_nanos());
        self.deaf_until.set(0, until, 0).map_err(io::Error::other)?;
        self.filter("deaf_for_now", socket)
    }

    /// Has a socket get no payload any more.
    pub(super) fn deafen_for_good(&mut self, socket: &OwnedFd) -> io::Result<()> {
        self.filter("deaf", socket)
    }

    fn filter(&mut self, name: &'static str, socket: &OwnedFd) -> io::Result<()> {
        let filter: &mut SocketFilter = program(&mut self.ebpf, name).map_err(io::Error::other)?;
        filter.attach(socket).map_err(io::Error::other)
    }

    /// A link of an iterator program, for one [`walk`].
    pub(super) fn iterator(&mut self, name: &'static str) -> Result<IterLink, KernelError> {
        let iter: &mut Iter = program(&mut self.ebpf, name)?;
        iter.attach()
            .and_then(|id| iter.take_link(id))
            .map_err(|e| refused("the program iter/tcp", e))
    }

    /// Losses since the start, by `ebb_common::LOST_…`.
    pub(super) fn losses(&self) -> Result<[u64; LOSSES], KernelError> {
        let mut losses = [0; LOSSES];
        for (index, n) in (0..).zip(&mut losses) {
            *n = self
                .lost
                .get(&index, 0)
                .map_err(|e| refused("a read of the losses", e))?;
        }
        Ok(losses)
    }
}

/// As many walks side by side as help before they are in each other's way.
const MOST_WALKERS: usize = 8;

fn seed_each(
    programs: &Mutex<&mut Programs>,
    queue: &Mutex<std::slice::Iter<'_, Inhabited>>,
) -> Result<(), KernelError> {
    loop {
        let Some(Inhabited { netns, .. }) = lock(queue).next() else {
            return Ok(());
        };
        let link = lock(programs).iterator("seed")?;
        walk(link, netns).map_err(|source| KernelError::Io {
            what: format!("seeding the flows of network namespace {}", netns.inode().0),
            source,
        })?;
    }
}

impl Inference {
    /// Tells the programs the ephemeral ports of namespaces that are to be seeded. Where they can't be read, all is
    /// inbound.
    fn prepare_to_seed<'a>(&mut self, namespaces: impl Iterator<Item = &'a Netns>) {
        for netns in namespaces {
            let ports = netns.run(ephemeral_ports).unwrap_or(EphemeralPorts::NONE);
            // A full map means the same.
            let _ = self.ports.insert(netns.inode().0, ports, 0);
        }
    }

    /// Tells the programs the ephemeral ports of the one namespace that is walked next by an audit, and makes room for
    /// its listeners.
    ///
    /// # Errors
    ///
    /// They can't be read or told. Then the namespace must not be audited: what it has dialled has no record, and
    /// would be taken for inbound from now on.
    pub(super) fn prepare_to_audit(&mut self, netns: &Netns) -> io::Result<()> {
        self.clear();
        let ports = netns.run(ephemeral_ports)?;
        self.ports
            .insert(netns.inode().0, ports, 0)
            .map_err(io::Error::other)
    }

    /// Forgets what the last walks needed.
    pub(super) fn clear(&mut self) {
        let ports: Vec<_> = self.ports.keys().filter_map(Result::ok).collect();
        let listeners: Vec<_> = self.listeners.keys().filter_map(Result::ok).collect();
        for key in ports {
            let _ = self.ports.remove(&key);
        }
        for key in listeners {
            let _ = self.listeners.remove(&key);
        }
    }
}

/// Has the kernel walk the TCP sockets of a namespace, and returns what the program wrote. The reading is
/// what makes the kernel walk; the namespace is that of the thread which opens the iterator.
pub(super) fn walk(link: IterLink, netns: &Netns) -> io::Result<Vec<u8>> {
    let mut written = Vec::new();
    walk_in_parts(link, netns, |part| written.extend_from_slice(part))?;
    Ok(written)
}

/// Likewise, by parts. No part ends within what the program writes at once.
pub(super) fn walk_in_parts(
    link: IterLink,
    netns: &Netns,
    mut part: impl FnMut(&[u8]),
) -> io::Result<()> {
    let mut iterator = netns.run(|| link.into_file().map_err(io::Error::other))?;
    // More than the kernel's own buffer (8 pages, BPF_SEQ in kernel/bpf/bpf_iter.c): each read gets all of it.
    let mut buffer = vec![0; 64 << 10];
    loop {
        match iterator.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => part(buffer.get(..n).unwrap_or_default()),
            // The kernel pauses after a million sockets without output (bpf_seq_read).
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Forwards what the programs log (aya-log) to this process's log.
fn forward_logs(ebpf: &mut Ebpf) -> Result<(), KernelError> {
    let logger = aya_log::EbpfLogger::init(ebpf).map_err(|e| refused("the log buffer", e))?;
    let mut logger = poll::readable(logger).map_err(|source| KernelError::Io {
        what: "waiting for the BPF log".into(),
        source,
    })?;
    tokio::spawn(async move {
        while let Ok(mut guard) = logger.readable_mut().await {
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    });
    Ok(())
}

/// A second handle of a hash.
fn again(map: &Map) -> Result<Map, KernelError> {
    let Map::HashMap(data) = map else {
        return Err(refused("a map", "it is no hash"));
    };
    let fd = data.fd().as_fd().try_clone_to_owned();
    let fd = fd.map_err(|e| refused("a second descriptor of a map", e))?;
    MapData::from_fd(fd)
        .map(Map::HashMap)
        .map_err(|e| refused("a second descriptor of a map", e))
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, KernelError> {
    ebpf.take_map(name)
        .ok_or_else(|| refused(name, "missing from the object"))
}

fn hash<K: aya::Pod, V: aya::Pod>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<HashMap<MapData, K, V>, KernelError> {
    HashMap::try_from(take(ebpf, name)?).map_err(|e| refused(name, e))
}

fn program<'a, P: 'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, KernelError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = aya::programs::ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or_else(|| refused(name, "missing from the object"))?
        .try_into()
        .map_err(|e| refused(name, e))
}

/// How many programs of ebb the kernel has, whoever loaded them: trackers, by name.
pub fn loaded_programs() -> usize {
    aya::programs::loaded_programs()
        .filter_map(Result::ok)
        .filter(|p| p.name_as_str().is_some_and(|name| TRACKERS.contains(&name)))
        .count()
}

fn refused(
    what: &'static str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> KernelError {
    let source = source.into();
    if is_permission(source.as_ref()) {
        return KernelError::NotPermitted;
    }
    KernelError::Refused {
        what,
        release: offsets::release(),
        source,
    }
}

fn is_permission(e: &(dyn std::error::Error + 'static)) -> bool {
    // The verifier says EACCES, too, of a program that reads what it must not; but it gives reasons.
    if let Some(ProgramError::LoadError { verifier_log, .. }) = e.downcast_ref()
        && !verifier_log.to_string().is_empty()
    {
        return false;
    }
    e.downcast_ref::<io::Error>()
        .is_some_and(|e| e.kind() == io::ErrorKind::PermissionDenied)
        || e.source().is_some_and(is_permission)
}
