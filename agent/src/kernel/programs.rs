//! Loading, attaching and seeding the BPF programs.

use std::{
    io::{self, Read as _},
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::Arc,
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapData, RingBuf},
    programs::{BtfTracePoint, Iter, iter::IterLink},
};
use ebb_common::{EphemeralPorts, LOSSES, Workload, WorkloadKey};

use super::{
    KernelError,
    netns::{self, Netns},
    offsets, poll,
};
use crate::ids::NetnsInode;

/// The compiled programs, built by build.rs.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ebb-ebpf"));

/// The tracker, three times: see its module.
const TRACKERS: [&str; 3] = ["track", "track_second", "track_third"];

/// The loaded programs. They are detached and all maps freed when this is dropped, also when the process
/// is killed: nothing is pinned.
pub(super) struct Programs {
    ebpf: Ebpf,
    /// See `maps::WORKLOADS` in the programs.
    pub(super) workloads: HashMap<MapData, WorkloadKey, Workload>,
    /// See `maps::WATCHED`.
    watched: HashMap<MapData, WorkloadKey, u8>,
    /// See `maps::WATCHES`.
    watches: Array<MapData, u32>,
    /// See `maps::FLOWS`.
    pub(super) flows: OwnedFd,
    /// See `maps::LOST`.
    pub(super) lost: Arc<Array<MapData, u64>>,
    /// See `maps::EVENTS`; taken once.
    pub(super) events: Option<RingBuf<MapData>>,
}

impl Programs {
    /// Loads the programs, attaches the tracker, then seeds the flows that exist.
    ///
    /// # Errors
    ///
    /// See [`KernelError`]. Nothing stays attached after an error.
    pub(super) fn start(host_netns: NetnsInode, log: bool) -> Result<Self, KernelError> {
        let mut programs = Self::load(host_netns, log)?;
        programs.attach()?;
        programs.seed()?;
        Ok(programs)
    }

    fn load(host_netns: NetnsInode, log: bool) -> Result<Self, KernelError> {
        let offsets = offsets::resolve(Path::new(offsets::VMLINUX_BTF))?;
        let ports = ephemeral_ports().map_err(|source| KernelError::Io {
            what: "reading net.ipv4.ip_local_port_range".into(),
            source,
        })?;
        // aya-log's levels: 0 is none, 4 is debug.
        let level: u8 = if log { 4 } else { 0 };
        let mut ebpf = EbpfLoader::new()
            .override_global("OFFSETS", &offsets, true)
            .override_global("HOST_NETNS", &host_netns.0, true)
            .override_global("EPHEMERAL_PORTS", &ports, true)
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
        for name in ["seed", "bare_ack"] {
            program::<Iter>(&mut ebpf, name)?
                .load("tcp", &btf)
                .map_err(|e| refused("the program iter/tcp", e))?;
        }
        if log {
            forward_logs(&mut ebpf)?;
        }
        let events = RingBuf::try_from(take(&mut ebpf, "EVENTS")?)
            .map_err(|e| refused("the ring buffer", e))?;
        let flows = match take(&mut ebpf, "FLOWS")? {
            aya::maps::Map::SkStorage(flows) => flows.fd().as_fd().try_clone_to_owned(),
            _ => return Err(refused("the map FLOWS", "it is no socket storage")),
        }
        .map_err(|e| refused("the map FLOWS", e))?;
        Ok(Self {
            workloads: hash(&mut ebpf, "WORKLOADS")?,
            watched: hash(&mut ebpf, "WATCHED")?,
            watches: Array::try_from(take(&mut ebpf, "WATCHES")?)
                .map_err(|e| refused("the map WATCHES", e))?,
            lost: Arc::new(
                Array::try_from(take(&mut ebpf, "LOST")?)
                    .map_err(|e| refused("the map LOST", e))?,
            ),
            flows,
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

    /// Walks the sockets of every network namespace that has a process. A namespace made meanwhile needs
    /// none: its sockets are all seen by the tracker.
    fn seed(&mut self) -> Result<(), KernelError> {
        for netns in netns::all() {
            let link = self.iterator("seed")?;
            walk(link, &netns).map_err(|source| KernelError::Io {
                what: format!("seeding the flows of network namespace {}", netns.inode().0),
                source,
            })?;
        }
        // Only seeding needs the listeners.
        let mut listeners: HashMap<_, ebb_common::ListenKey, u8> =
            hash(&mut self.ebpf, "LISTENERS")?;
        let keys: Vec<_> = listeners.keys().filter_map(Result::ok).collect();
        for key in keys {
            let _ = listeners.remove(&key);
        }
        Ok(())
    }

    /// Has the events of workloads reported.
    pub(super) fn watch(&mut self, keys: &[WorkloadKey]) -> io::Result<()> {
        for key in keys {
            self.watched.insert(key, 1, 0).map_err(io::Error::other)?;
        }
        self.count_watches()
    }

    /// Ends what [`Self::watch`] began.
    pub(super) fn unwatch(&mut self, keys: &[WorkloadKey]) -> io::Result<()> {
        for key in keys {
            // It may never have been watched.
            let _ = self.watched.remove(key);
        }
        self.count_watches()
    }

    fn count_watches(&mut self) -> io::Result<()> {
        let watches = u32::try_from(self.watched.keys().count()).unwrap_or(u32::MAX);
        self.watches.set(0, watches, 0).map_err(io::Error::other)
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

/// Has the kernel walk the TCP sockets of a namespace, and returns what the program wrote. The reading is
/// what makes the kernel walk; the namespace is that of the thread which opens the iterator.
pub(super) fn walk(link: IterLink, netns: &Netns) -> io::Result<Vec<u8>> {
    let mut iterator = netns.run(|| link.into_file().map_err(io::Error::other))?;
    let mut written = Vec::new();
    loop {
        match iterator.read_to_end(&mut written) {
            Ok(_) => return Ok(written),
            // The kernel pauses after a million sockets without output (bpf_seq_read).
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

fn ephemeral_ports() -> io::Result<EphemeralPorts> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let mut ports = text.split_whitespace().map(str::parse);
    match (ports.next(), ports.next()) {
        (Some(Ok(first)), Some(Ok(last))) => Ok(EphemeralPorts { first, last }),
        _ => Err(io::ErrorKind::InvalidData.into()),
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

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<aya::maps::Map, KernelError> {
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
    e.downcast_ref::<io::Error>()
        .is_some_and(|e| e.kind() == io::ErrorKind::PermissionDenied)
        || e.source().is_some_and(is_permission)
}
