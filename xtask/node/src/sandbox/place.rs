//! What a sandbox owns on the machine: a directory and a cgroup. And whether the machine can have one.

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

/// Why a machine can't have a node.
#[derive(Debug)]
pub enum Refusal {
    /// The process is not root.
    NotRoot,
    /// cgroup2 is not mounted.
    NoCgroup2,
    /// The kernel carries no type information.
    NoBtf,
    /// Namespaces can't be made.
    NoNamespaces(io::Error),
    /// More than one thread runs; says how many.
    Threads(usize),
    /// The directory or the lock of the run can't be made.
    State(PathBuf, io::Error),
    /// The inside of the namespaces can't be arranged.
    Layout(anyhow::Error),
}

impl Refusal {
    /// The exit status that goes with it: 77 for missing rights, 69 for something the kernel lacks, 70
    /// for all else.
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

impl fmt::Display for Refusal {
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
                "can't make namespaces ({error}): run on a machine or in a privileged container"
            ),
            Self::Threads(threads) => {
                write!(
                    f,
                    "a sandbox must be entered with one thread, there are {threads}"
                )
            }
            Self::State(path, error) => write!(f, "can't make {}: {error}", path.display()),
            Self::Layout(error) => write!(f, "can't arrange the node: {error:#}"),
        }
    }
}

impl std::error::Error for Refusal {}

/// Whether this machine and process can have a sandbox.
///
/// # Errors
/// The first thing that is missing.
pub fn check() -> Result<(), Refusal> {
    if !rustix::process::geteuid().is_root() {
        return Err(Refusal::NotRoot);
    }
    if cgroup2_mount().is_none() {
        return Err(Refusal::NoCgroup2);
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Err(Refusal::NoBtf);
    }
    let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        return Err(Refusal::Threads(threads));
    }
    Ok(())
}

/// What one run owns on the machine, all named after the outer process.
#[derive(Debug, Clone)]
pub struct Place {
    name: String,
}

impl Place {
    /// Makes the directory and locks it. The lock is the sign of life that [`sweep`] looks for; it
    /// is inherited by the forks and given up by the kernel with the last of them.
    pub(super) fn create() -> Result<(Self, Lock), Refusal> {
        let place = Self {
            name: format!("{PREFIX}{}", process::id()),
        };
        let directory = place.directory();
        let failed = |error: io::Error| Refusal::State(directory.clone(), error);
        fs::create_dir_all(&directory).map_err(failed)?;
        let lock = File::open(&directory).map_err(failed)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| failed(error.into()))?;
        Ok((place, lock))
    }

    /// `ebb-node-<pid of the outer process>`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the run keeps its state; removed at its end.
    pub fn directory(&self) -> PathBuf {
        Path::new(STATE).join(&self.name)
    }

    /// The parent of all pods' cgroups as the CRI wants it: absolute in cgroup2.
    pub fn kubepods(&self) -> String {
        format!("/{}/kubepods", self.name)
    }

    /// The directory, inside the sandbox, of the cgroup that everything but pods starts in.
    pub fn system_cgroup(&self) -> PathBuf {
        self.cgroup("system")
    }

    /// The directory, inside the sandbox, of a further cgroup of the run. Not made by this call.
    pub fn cgroup(&self, name: &str) -> PathBuf {
        Path::new("/sys/fs/cgroup").join(&self.name).join(name)
    }

    /// Removes everything, once all processes are gone. To be called outside.
    pub(super) fn remove(&self) {
        if let Some(root) = cgroup2_mount() {
            remove_cgroup(&root.join(&self.name));
        }
        let _ = fs::remove_dir_all(self.directory());
    }
}

/// Removes what dead runs left behind: a run that was killed can't clean up.
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
            Place { name }.remove();
        }
    }
}

/// A run is alive while its lock is held, or its process is there and about to take the lock. The
/// process alone would not do: it may be in another PID namespace.
fn is_alive(name: &str) -> bool {
    let pid = name.trim_start_matches(PREFIX);
    Path::new("/proc").join(pid).exists()
        || File::open(Path::new(STATE).join(name))
            .is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_err())
}

/// Everything on the machine that still bears the name of the run whose outer process had this pid:
/// its directory, cgroups, mounts and processes. Empty after a clean end.
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

/// Where the machine has its cgroup2, from the mount table (proc_pid_mountinfo(5)).
fn cgroup2_mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, target) = (fields.next()?, fields.next()?);
        (file_system.starts_with("cgroup2 ") && root == "/").then(|| target.into())
    })
}

/// Removes a cgroup with all below it. A cgroup can stay busy for a moment after its last process was
/// reaped; one that still has processes belongs to somebody and stays.
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
