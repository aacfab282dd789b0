//! BPF programs: loads the bench's own, and reads the kernel's statistics of others.

use std::{collections::HashSet, fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::Array,
    programs::{BtfTracePoint, ProgramInfo, TracePoint, loaded_programs},
};
use rustix::mount::{MountFlags, mount};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ebb-bench-ebpf"));

const TRACEFS: &str = "/sys/kernel/tracing";

/// The kernel's run statistics of a program, collected while `aya::sys::enable_stats` is in force.
#[derive(Clone, Debug)]
pub(crate) struct Runs {
    pub(crate) name: String,
    pub(crate) count: u64,
    pub(crate) ns: u64,
}

/// The statistics of all programs that a process holds open, sorted by name.
pub(crate) fn runs_of_process(pid: u32) -> Result<Vec<Runs>> {
    let ids = ids(pid, "prog_id:")?;
    let mut runs = Vec::new();
    for info in loaded_programs() {
        // Another process may have unloaded its program meanwhile.
        let Ok(info) = info else { continue };
        if ids.contains(&info.id()) {
            runs.push(runs_of(&info));
        }
    }
    ensure!(!runs.is_empty(), "process {pid} has no BPF programs");
    runs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(runs)
}

/// The memory of all BPF maps that a process holds open, in bytes (`memlock` in fdinfo).
pub(crate) fn map_memory(pid: u32) -> Result<f64> {
    let mut seen = HashSet::new();
    let mut bytes = 0.0;
    for text in descriptors(pid)? {
        if let Some(id) = number(&text, "map_id:")
            && seen.insert(id)
        {
            bytes += number(&text, "memlock:").unwrap_or(0) as f64;
        }
    }
    Ok(bytes)
}

fn ids(pid: u32, key: &str) -> Result<HashSet<u32>> {
    let texts = descriptors(pid)?;
    let found = texts.iter().filter_map(|text| number(text, key));
    Ok(found.filter_map(|id| u32::try_from(id).ok()).collect())
}

fn descriptors(pid: u32) -> Result<Vec<String>> {
    let path = format!("/proc/{pid}/fdinfo");
    let entries = fs::read_dir(&path).with_context(|| format!("can't read {path}"))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .collect())
}

fn number(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().parse().ok()
}

fn runs_of(info: &ProgramInfo) -> Runs {
    Runs {
        name: info.name_as_str().unwrap_or("?").to_owned(),
        count: info.run_count(),
        ns: u64::try_from(info.run_time().as_nanos()).unwrap_or(u64::MAX),
    }
}

/// The bench's own programs. Dropping it detaches them.
pub(crate) struct BenchPrograms(Ebpf);

impl BenchPrograms {
    /// Loads the programs and attaches none. [`BenchPrograms::changes`] counts the connections of `port` separately.
    pub(crate) fn load(port: u16) -> Result<Self> {
        let port = u32::from(port);
        let ebpf = EbpfLoader::new()
            .override_global("PORT", &port, true)
            .load(OBJECT);
        Ok(Self(ebpf.context("can't load the bench's BPF programs")?))
    }

    /// Attaches the empty program to the hook that ebb uses.
    pub(crate) fn attach_empty(&mut self) -> Result<()> {
        let empty = self.0.program_mut("empty").context("no program `empty`")?;
        let empty: &mut BtfTracePoint = empty.try_into()?;
        empty.load("inet_sock_set_state", &Btf::from_sys_fs()?)?;
        empty.attach()?;
        Ok(())
    }

    /// Statistics of the empty program.
    pub(crate) fn empty_runs(&self) -> Result<Runs> {
        let empty = self.0.program("empty").context("no program `empty`")?;
        Ok(runs_of(&empty.info()?))
    }

    /// Attaches the counter of state changes.
    pub(crate) fn attach_changes(&mut self) -> Result<()> {
        self.attach_tracepoint("changes")
    }

    /// State changes so far: of connections from or to the port, and in total.
    pub(crate) fn changes(&self) -> Result<(u64, u64)> {
        let map = self.0.map("CHANGES").context("no map `CHANGES`")?;
        let map: Array<_, u64> = Array::try_from(map)?;
        Ok((map.get(&0, 0)?, map.get(&1, 0)?))
    }

    /// Attaches the program whose events [`crate::tcpstates`] prints.
    pub(crate) fn attach_transition(&mut self) -> Result<()> {
        self.attach_tracepoint("transition")
    }

    /// Moves a map out of the loaded object.
    pub(crate) fn take_map(&mut self, name: &str) -> Result<aya::maps::Map> {
        let map = self.0.take_map(name);
        map.with_context(|| format!("no map `{name}`"))
    }

    fn attach_tracepoint(&mut self, name: &'static str) -> Result<()> {
        mount_tracefs()?;
        let program = self.0.program_mut(name);
        let program = program.with_context(|| format!("no program `{name}`"))?;
        let program: &mut TracePoint = program.try_into()?;
        program.load()?;
        program.attach("sock", "inet_sock_set_state")?;
        Ok(())
    }
}

/// aya finds tracepoints by name in tracefs. The sandbox has a mount namespace of its own, so this mount stays in it.
fn mount_tracefs() -> Result<()> {
    if Path::new(TRACEFS).join("events").exists() {
        return Ok(());
    }
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tracefs", TRACEFS, "tracefs", plain, c"").context("can't mount tracefs")
}
