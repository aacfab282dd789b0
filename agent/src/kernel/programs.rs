//! Loads and attaches the BPF programs.

use std::{
    collections::HashSet,
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
    sync::Arc,
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, RingBuf},
    programs::{BtfTracePoint, ProgramError, SchedClassifier, SocketFilter},
};
use ebb_common::{KubeletCgroups, LOSSES, Workload, WorkloadKey};
use ebb_core::{
    clock::BootTime,
    ids::{CgroupId, NetnsInode},
};

use super::{
    KernelError,
    inspector::{self, Inspector},
    offsets,
    watches::Watches,
};
use crate::linux::{async_fd, malloc, sync::lock};

/// Compiled from `ebpf/` by the build script.
const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ebb-ebpf"));

/// The program that runs at state changes.
const TRACK: &str = "track";

/// The running programs, and their maps.
pub(super) struct Programs {
    /// Owns the object: the programs are detached when this is dropped.
    pub(super) inspector: Inspector,
    /// `maps::WORKLOADS` of the programs. Locked, because a removal during an iteration would make the iteration start
    /// again.
    workloads: std::sync::Mutex<HashMap<MapData, WorkloadKey, Workload>>,
    pub(super) watches: std::sync::Mutex<Watches>,
    losses: Arc<Array<MapData, u64>>,
    drop_until: std::sync::Mutex<Array<MapData, u64>>,
    kubelet: std::sync::Mutex<Array<MapData, KubeletCgroups>>,
    /// A descriptor of the program `track`.
    track: OwnedFd,
}

/// The ring buffer of events, and the count of events that it dropped because it was full.
pub(super) struct EventSource {
    pub(super) ring: RingBuf<MapData>,
    pub(super) losses: Arc<Array<MapData, u64>>,
}

impl Programs {
    /// Loads and attaches the programs. From then on every state change is either seen, or counted as missed or lost.
    pub(super) fn start(
        host_netns: NetnsInode,
        log: bool,
    ) -> Result<(Self, EventSource), KernelError> {
        offsets::check_release(&offsets::release())?;
        let offsets = offsets::resolve(Path::new(offsets::VMLINUX_BTF))?;
        // aya-log's levels: 0 is off, 4 is debug.
        let level: u8 = if log { 4 } else { 0 };
        let jiffy = inspector::jiffy();
        let jiffy_ns = u64::try_from(jiffy.as_nanos()).unwrap_or(u64::MAX);
        let mut ebpf = EbpfLoader::new()
            .override_global("JIFFY", &jiffy_ns, true)
            .override_global("OFFSETS", &offsets, true)
            .override_global("HOST_NETNS", &host_netns.0, true)
            .override_global("AYA_LOG_LEVEL", &level, true)
            .load(OBJECT)
            .map_err(|e| refused("the BPF maps", e))?;
        // Loading a program resolves its maps, so all programs are loaded before a map is taken out of the object.
        let btf = Btf::from_sys_fs().map_err(|e| refused("its own BTF", e))?;
        program::<BtfTracePoint>(&mut ebpf, TRACK)?
            .load("inet_sock_set_state", &btf)
            .map_err(|e| refused("the program tp_btf/inet_sock_set_state", e))?;
        program::<SchedClassifier>(&mut ebpf, "inspect")?
            .load()
            .map_err(|e| refused("the classifier", e))?;
        for name in ["drop_payload_for_now", "drop_payload"] {
            program::<SocketFilter>(&mut ebpf, name)?
                .load()
                .map_err(|e| refused("the socket filter", e))?;
        }
        if log {
            forward_logs(&mut ebpf)?;
        }
        let track: &mut BtfTracePoint = program(&mut ebpf, TRACK)?;
        let fd = track.fd().map_err(|e| refused(TRACK, e))?;
        let fd = fd.as_fd().try_clone_to_owned();
        let fd = fd.map_err(|e| refused("a second descriptor of a program", e))?;
        track
            .attach()
            .map_err(|e| refused("the program tp_btf/inet_sock_set_state", e))?;
        let losses = Arc::new(array(&mut ebpf, "LOST")?);
        let events = EventSource {
            ring: RingBuf::try_from(take(&mut ebpf, "EVENTS")?)
                .map_err(|e| refused("the ring buffer", e))?,
            losses: Arc::clone(&losses),
        };
        let programs = Self {
            workloads: hash(&mut ebpf, "WORKLOADS")?.into(),
            watches: Watches::new(
                hash(&mut ebpf, "WATCHED")?,
                array(&mut ebpf, "WATCHED_COUNT")?,
            )
            .into(),
            drop_until: array(&mut ebpf, "DROP_UNTIL")?.into(),
            kubelet: array(&mut ebpf, "KUBELET")?.into(),
            losses,
            track: fd,
            inspector: Inspector::new(ebpf, jiffy)?,
        };
        malloc::trim();
        Ok((programs, events))
    }

    /// For how many state changes the kernel did not run `track`, because it was already running on that CPU. Kernels
    /// before 6.1 always run it.
    ///
    /// # Errors
    ///
    /// The kernel does not report the number (`bpf_prog_show_fdinfo` in kernel/bpf/syscall.c).
    pub(super) fn missed_changes(&self) -> io::Result<u64> {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.track.as_raw_fd()))?;
        let misses = info
            .lines()
            .find_map(|line| line.strip_prefix("recursion_misses:")?.trim().parse().ok());
        misses.ok_or_else(|| {
            io::Error::other("the kernel does not report how many state changes it skipped")
        })
    }

    /// Drops the payload that a socket receives until `until`, even if the agent exits. Replaces the socket's filter.
    /// All sockets share the time, so a later `until` applies to those that are already blocked.
    pub(super) fn block_receive_until(&self, socket: &OwnedFd, until: BootTime) -> io::Result<()> {
        {
            let mut map = lock(&self.drop_until);
            let before = map.get(&0, 0).map_err(io::Error::other)?;
            let until = before.max(until.as_nanos());
            map.set(0, until, 0).map_err(io::Error::other)?;
        }
        self.filter("drop_payload_for_now", socket)
    }

    /// Drops all payload that a socket receives from now on.
    pub(super) fn block_receive(&self, socket: &OwnedFd) -> io::Result<()> {
        self.filter("drop_payload", socket)
    }

    fn filter(&self, name: &'static str, socket: &OwnedFd) -> io::Result<()> {
        self.inspector.with_object(|ebpf| {
            let filter: &mut SocketFilter = program(ebpf, name).map_err(io::Error::other)?;
            filter.attach(socket).map(drop).map_err(io::Error::other)
        })
    }

    /// Tells `track` the kubelet's cgroups, so that it does not count probes as clients. `cgroups` is called while no
    /// other caller can set them. If there are more than it has places for, the connections of the others count as
    /// clients.
    pub(super) fn set_kubelet(
        &self,
        cgroups: impl FnOnce() -> HashSet<CgroupId>,
    ) -> io::Result<()> {
        let mut map = lock(&self.kubelet);
        let mut kubelet = KubeletCgroups::default();
        for (place, cgroup) in kubelet.each.iter_mut().zip(cgroups()) {
            *place = cgroup.0;
        }
        map.set(0, kubelet, 0).map_err(io::Error::other)
    }

    /// The counters of a workload; `None` if nothing was counted.
    pub(super) fn counters(&self, key: &WorkloadKey) -> Option<Workload> {
        lock(&self.workloads).get(key, 0).ok()
    }

    /// The counters of the workloads whose key is `wanted`. Makes some system calls per workload.
    pub(super) fn all_counters(
        &self,
        wanted: impl Fn(&WorkloadKey) -> bool,
    ) -> io::Result<Vec<(WorkloadKey, Workload)>> {
        let map = lock(&self.workloads);
        let mut found = Vec::new();
        for key in map.keys() {
            let key = key.map_err(io::Error::other)?;
            if wanted(&key) {
                found.extend(map.get(&key, 0).ok().map(|workload| (key, workload)));
            }
        }
        Ok(found)
    }

    /// Removes the counters of a workload. The next change starts them again at zero.
    pub(super) fn remove_counters(&self, key: &WorkloadKey) {
        // They may not exist.
        let _ = lock(&self.workloads).remove(key);
    }

    /// Losses since the start, by `ebb_common::LOST_…`.
    pub(super) fn losses(&self) -> Result<[u64; LOSSES], KernelError> {
        let mut losses = [0; LOSSES];
        for (index, n) in (0..).zip(&mut losses) {
            *n = self
                .losses
                .get(&index, 0)
                .map_err(|e| refused("reading the losses", e))?;
        }
        Ok(losses)
    }
}

/// Forwards the log of the programs (aya-log) to the agent's log.
fn forward_logs(ebpf: &mut Ebpf) -> Result<(), KernelError> {
    let logger = aya_log::EbpfLogger::init(ebpf).map_err(|e| refused("the log buffer", e))?;
    let mut logger = async_fd::readable(logger).map_err(|source| KernelError::Io {
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

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, KernelError> {
    ebpf.take_map(name)
        .ok_or_else(|| refused(name, "missing from the object"))
}

/// Takes a map out of the object.
pub(super) fn array<V: aya::Pod>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<Array<MapData, V>, KernelError> {
    Array::try_from(take(ebpf, name)?).map_err(|e| refused(name, e))
}

fn hash<K: aya::Pod, V: aya::Pod>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<HashMap<MapData, K, V>, KernelError> {
    HashMap::try_from(take(ebpf, name)?).map_err(|e| refused(name, e))
}

pub(super) fn program<'a, P: 'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut P, KernelError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or_else(|| refused(name, "missing from the object"))?
        .try_into()
        .map_err(|e| refused(name, e))
}

/// How many of ebb's programs that count connections are loaded, by any process. Recognises them by name.
pub(crate) fn loaded_programs() -> usize {
    aya::programs::loaded_programs()
        .filter_map(Result::ok)
        .filter(|p| p.name_as_str() == Some(TRACK))
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
    // The verifier also returns EACCES for a program that reads forbidden memory, but then its log is not empty.
    if let Some(ProgramError::LoadError { verifier_log, .. }) = e.downcast_ref()
        && !verifier_log.to_string().is_empty()
    {
        return false;
    }
    e.downcast_ref::<io::Error>()
        .is_some_and(|e| e.kind() == io::ErrorKind::PermissionDenied)
        || e.source().is_some_and(is_permission)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
        time::{Duration, Instant},
    };

    use ebb_common::{LOST_COUNT, WORKLOADS_MAX};

    use super::*;
    use crate::linux::netns::Netns;

    fn start() -> Programs {
        let own = Netns::of_process(std::process::id()).unwrap();
        Programs::start(own.inode(), false).unwrap().0
    }

    /// An agent that is killed can't detach the filter.
    #[test]
    fn a_socket_receives_payload_again_when_the_time_of_its_filter_is_over() {
        let programs = start();
        let duration = Duration::from_secs(1);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let started = Instant::now();
        let socket = OwnedFd::from(server.try_clone().unwrap());
        let until = BootTime::now() + duration;
        programs.block_receive_until(&socket, until).unwrap();
        client.write_all(b"request").unwrap();
        server.read_exact(&mut [0; 7]).unwrap();
        assert!(started.elapsed() >= duration, "the payload was not dropped");
        // Acknowledgements were never dropped, and the other direction still works.
        server.write_all(b"answer").unwrap();
        client.read_exact(&mut [0; 6]).unwrap();
    }

    /// A pod without counters has had no client. So none may be evicted, and one that could not be added is a loss.
    #[test]
    fn a_full_map_of_counters_keeps_all_and_what_it_can_not_count_is_lost() {
        let programs = start();
        // No cgroup has such an id.
        let key = |n| WorkloadKey {
            cgroup: u64::MAX - u64::from(n),
            netns: 0,
            zero: 0,
        };
        let others = |key: &WorkloadKey| key.netns != 0;
        let lost = || programs.losses().unwrap()[LOST_COUNT as usize];
        let is_kept = |n| programs.counters(&key(n)).is_some();
        // Connections of other tests take places, too.
        let is_full_of_these = (0..100).any(|_| {
            for n in 0..WORKLOADS_MAX {
                let _ = lock(&programs.workloads).insert(key(n), Workload::default(), 0);
            }
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            drop(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
            let are_kept = (0..WORKLOADS_MAX).all(is_kept);
            for (key, _) in programs.all_counters(others).unwrap() {
                programs.remove_counters(&key);
            }
            are_kept && lost() > 0
        });
        assert!(is_full_of_these, "{} lost", lost());
    }

    #[test]
    fn the_kernel_reports_missed_changes_and_verifies_the_programs_quickly() {
        let programs = start();
        programs.missed_changes().unwrap();
        assert_eq!(programs.losses().unwrap(), [0; LOSSES]);
        let verified = programs.inspector.with_object(|ebpf| {
            let inspect: &mut SchedClassifier = program(ebpf, "inspect").unwrap();
            inspect.info().unwrap().verified_instruction_count()
        });
        // Kernels before 5.16 don't report it.
        assert!(verified.is_none_or(|n| n < 10_000), "{verified:?}");
    }
}
