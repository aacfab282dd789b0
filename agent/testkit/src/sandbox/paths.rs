//! The directory and the cgroup of a sandbox on the machine, and whether the machine supports a sandbox.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;
use std::{fmt, process};

use rustix::fs::{FlockOperation, flock};

use super::Lock;

const PREFIX: &str = "ebb-node-";
const STATE: &str = "/tmp";

/// Why a sandbox can't be made.
#[derive(Debug)]
pub enum SandboxError {
    /// The process is not root.
    NotRoot,
    /// cgroup2 is not mounted.
    NoCgroup2,
    /// The kernel has no BTF.
    NoBtf,
    /// Namespaces can't be made.
    NoNamespaces(io::Error),
    /// The process has this many threads, not one.
    Threads(usize),
    /// The directory or the lock of the run can't be made.
    State(PathBuf, io::Error),
    /// The namespaces can't be set up.
    Layout(anyhow::Error),
}

impl SandboxError {
    /// The exit status: 77 for missing rights, 69 for a missing kernel feature, 70 for any other reason.
    pub fn status(&self) -> u8 {
        match self {
            Self::NotRoot => 77,
            Self::NoCgroup2 | Self::NoBtf | Self::NoNamespaces(_) => 69,
            Self::Threads(_) | Self::State(..) | Self::Layout(_) => 70,
        }
    }

    pub(super) fn namespaces(error: impl Into<io::Error>) -> Self {
        Self::NoNamespaces(error.into())
    }
}

impl fmt::Display for SandboxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRoot => write!(f, "a node needs root: run it with sudo"),
            Self::NoCgroup2 => write!(
                f,
                "cgroup2 is not mounted: mount it, for instance on /sys/fs/cgroup/unified"
            ),
            Self::NoBtf => write!(
                f,
                "/sys/kernel/btf/vmlinux is missing: the kernel needs CONFIG_DEBUG_INFO_BTF"
            ),
            Self::NoNamespaces(error) => write!(
                f,
                "can't make namespaces ({error}): run outside a container or in a privileged one"
            ),
            Self::Threads(threads) => {
                write!(
                    f,
                    "a process must have one thread to enter a sandbox, this one has {threads}"
                )
            }
            Self::State(path, error) => write!(f, "can't make {}: {error}", path.display()),
            Self::Layout(error) => write!(f, "can't set up the node: {error:#}"),
        }
    }
}

impl std::error::Error for SandboxError {}

/// Checks that this machine and process can have a sandbox.
///
/// # Errors
/// The first thing that is missing.
pub fn check() -> Result<(), SandboxError> {
    if !rustix::process::geteuid().is_root() {
        return Err(SandboxError::NotRoot);
    }
    if cgroup2_mount().is_none() {
        return Err(SandboxError::NoCgroup2);
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Err(SandboxError::NoBtf);
    }
    let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        return Err(SandboxError::Threads(threads));
    }
    Ok(())
}

/// The directory and the cgroup of one run, named after the outer process.
#[derive(Debug, Clone)]
pub struct SandboxPaths {
    name: String,
}

impl SandboxPaths {
    /// Makes the directory and locks it. Forks inherit the lock, and the kernel releases it with the last of them; so
    /// [`sweep`] knows that the run is alive.
    pub(super) fn create() -> Result<(Self, Lock), SandboxError> {
        let paths = Self {
            name: format!("{PREFIX}{}", process::id()),
        };
        let directory = paths.directory();
        let failed = |error: io::Error| SandboxError::State(directory.clone(), error);
        fs::create_dir_all(&directory).map_err(failed)?;
        let lock = File::open(&directory).map_err(failed)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| failed(error.into()))?;
        Ok((paths, lock))
    }

    /// `ebb-node-<pid of the outer process>`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory with the run's state; removed at its end.
    pub fn directory(&self) -> PathBuf {
        Path::new(STATE).join(&self.name)
    }

    /// The parent of all pods' cgroups in the CRI's form: absolute in cgroup2.
    pub fn kubepods(&self) -> String {
        format!("/{}/kubepods", self.name)
    }

    /// The directory, inside the sandbox, of the cgroup for all processes outside pods.
    pub fn system_cgroup(&self) -> PathBuf {
        self.cgroup("system")
    }

    /// The directory, inside the sandbox, of another cgroup of the run. Does not make it.
    pub fn cgroup(&self, name: &str) -> PathBuf {
        Path::new("/sys/fs/cgroup").join(&self.name).join(name)
    }

    /// Removes directory and cgroup. Call this outside the sandbox, when all its processes have ended.
    pub(super) fn remove(&self) {
        if let Some(root) = cgroup2_mount() {
            remove_cgroup(&root.join(&self.name));
        }
        let _ = fs::remove_dir_all(self.directory());
    }
}

/// Removes directories and cgroups of runs that were killed.
pub(super) fn sweep() {
    let roots = [Some(PathBuf::from(STATE)), cgroup2_mount()];
    for entry in roots
        .iter()
        .flatten()
        .filter_map(|root| root.read_dir().ok())
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_run = name
            .strip_prefix(PREFIX)
            .is_some_and(|pid| pid.parse::<u32>().is_ok());
        if is_run && !is_alive(&name) {
            SandboxPaths { name }.remove();
        }
    }
}

/// A run is alive while its lock is held, or while its process exists, which may be about to take the lock. The
/// process alone does not suffice, because it may be in another PID namespace.
fn is_alive(name: &str) -> bool {
    let pid = name.trim_start_matches(PREFIX);
    Path::new("/proc").join(pid).exists()
        || File::open(Path::new(STATE).join(name))
            .is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_err())
}

/// What is left on the machine of the run whose outer process had this pid: its directory, cgroups, mounts and
/// processes. Empty after a clean end.
pub fn left_behind(outer: u32) -> Vec<String> {
    let name = format!("{PREFIX}{outer}");
    let mut found = Vec::new();
    let directory = Path::new(STATE).join(&name);
    let cgroup = cgroup2_mount().map(|root| root.join(&name));
    for path in [Some(directory), cgroup]
        .into_iter()
        .flatten()
        .filter(|path| path.exists())
    {
        found.push(path.display().to_string());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    found.extend(
        mounts
            .lines()
            .filter(|line| line.contains(&name))
            .map(|line| format!("mount {line}")),
    );
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let cgroups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        if cgroups
            .lines()
            .any(|line| line.split('/').any(|part| part == name))
        {
            found.push(format!("process {}", entry.file_name().to_string_lossy()));
        }
    }
    found
}

/// The machine's cgroup2 mount point, from the mount table (proc_pid_mountinfo(5)).
fn cgroup2_mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, target) = (fields.next()?, fields.next()?);
        (file_system.starts_with("cgroup2 ") && root == "/").then(|| target.into())
    })
}

/// Removes a cgroup and its descendants. Retries, because a cgroup can stay busy for a moment after its last process
/// was reaped. One that still has processes stays.
fn remove_cgroup(path: &Path) {
    let Ok(entries) = path.read_dir() else { return };
    for entry in entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
    {
        remove_cgroup(&entry.path());
    }
    for _ in 0..100 {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                sleep(Duration::from_millis(20))
            }
            _ => return,
        }
    }
}
