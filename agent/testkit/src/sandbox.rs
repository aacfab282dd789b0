//! The namespaces of a test node, which end with it.
//!
//! ```text
//!  outer ── waits, returns the exit status, removes the cgroups and the directory
//!    └─ init ── pid 1 of a new PID namespace; reaps orphans (containerd's shims leave many)
//!         └─ worker ── runs the closure: containerd, pods, clients are its descendants
//! ```
//!
//! All processes below init die with init, and init dies with outer (PR_SET_PDEATHSIG), so no process stays behind.
//! Mounts and network namespaces end with their last process. After a SIGKILL of outer, empty cgroups and a directory
//! stay, which the next run removes.
//!
//! The outer process must not start threads or processes afterwards, because its children would be in the dead PID
//! namespace.

#![allow(unsafe_code)] // fork, unshare, signal masks and one ioctl have no safe interface.

mod layout;
mod paths;

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::OnceLock;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use rustix::thread::{UnshareFlags, unshare_unsafe};

pub use paths::{SandboxError, SandboxPaths, check, left_behind};

static PATHS: OnceLock<SandboxPaths> = OnceLock::new();

/// The paths of the sandbox that this process runs in.
///
/// # Errors
/// If the process does not run in [`inside`].
pub fn paths() -> anyhow::Result<&'static SandboxPaths> {
    PATHS
        .get()
        .ok_or_else(|| anyhow::anyhow!("not inside a node sandbox: call sandbox::inside first"))
}

/// Runs `f` in new mount, network, PID, IPC and UTS namespaces and returns its exit status.
///
/// Call this while the process has one thread. `f` runs in a descendant, as root of a small node: cgroup2 at
/// `/sys/fs/cgroup`, an empty `/run`, loopback up, forwarding on, and an overlay on `/var/lib`. If the machine does
/// not support that, it prints the reason and returns [`SandboxError::status`]. SIGINT, SIGTERM and SIGHUP end the
/// node and return 128 + the signal.
pub fn inside(f: impl FnOnce() -> ExitCode) -> ExitCode {
    match enter() {
        Ok(ForkSide::Outer(status)) => ExitCode::from(status),
        Ok(ForkSide::Worker) => {
            let code = f();
            // An ExitCode can't be read, only compared. Exit here, because only the outer process may run the code
            // after `inside`.
            let status = (0..=u8::MAX).find(|status| ExitCode::from(*status) == code);
            std::process::exit(status.unwrap_or(1).into())
        }
        Err(refusal) => {
            eprintln!("error: {refusal}");
            ExitCode::from(refusal.status())
        }
    }
}

/// Makes the kernel send SIGTERM to this process when its parent dies, so that a test program ends when its runner is
/// killed. Call this before [`inside`].
pub fn end_with_parent() {
    let parent = rustix::process::getppid();
    let set = rustix::process::set_parent_process_death_signal(Some(Signal::TERM));
    // The parent may have died before the call.
    if set.is_ok() && rustix::process::getppid() != parent {
        std::process::exit(1);
    }
}

enum ForkSide {
    Outer(u8),
    Worker,
}

fn enter() -> Result<ForkSide, SandboxError> {
    check()?;
    paths::sweep();
    let (paths, _lock) = SandboxPaths::create()?;
    let signals = BlockedSignals::block();
    // The kernel closes this end when outer dies.
    let (alive, alive_outer) = pipe_with(PipeFlags::CLOEXEC).map_err(SandboxError::namespaces)?;

    unshare(UnshareFlags::NEWPID).inspect_err(|_| paths.remove())?;
    match fork().inspect_err(|_| paths.remove())? {
        Some(init) => {
            let status = watch(init, &signals);
            paths.remove();
            Ok(ForkSide::Outer(status))
        }
        None => {
            drop(alive_outer);
            signals.restore();
            init(paths, &alive)
        }
    }
}

/// The outer process: waits for init to end or for a signal that ends it.
fn watch(init: Pid, signals: &BlockedSignals) -> u8 {
    loop {
        let signal = signals.wait();
        if signal == libc::SIGCHLD {
            if let Ok(Some((_, status))) = rustix::process::waitpid(Some(init), WaitOptions::NOHANG)
            {
                return exit_status(status);
            }
            continue;
        }
        // SIGKILL, because init has no signal handlers. All other processes die with it.
        let _ = rustix::process::kill_process(init, Signal::KILL);
        let _ = rustix::process::waitpid(Some(init), WaitOptions::empty());
        return u8::try_from(128 + signal).unwrap_or(u8::MAX);
    }
}

/// Pid 1: makes the namespaces and mounts, starts the worker and reaps until the worker has ended.
fn init(paths: SandboxPaths, alive: &OwnedFd) -> Result<ForkSide, SandboxError> {
    let fail = |refusal: SandboxError| -> ! {
        eprintln!("error: {refusal}");
        std::process::exit(refusal.status().into())
    };
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::KILL)) {
        fail(SandboxError::namespaces(error));
    }
    // Outer may have died before the line above; then the kernel never sends the signal.
    let mut hangup = [PollFd::new(alive, PollFlags::IN)];
    let now = rustix::time::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    if poll(&mut hangup, Some(&now)).is_ok_and(|ready| ready > 0) {
        std::process::exit(1);
    }
    let namespaces =
        UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    if let Err(refusal) = unshare(namespaces) {
        fail(refusal);
    }
    if let Err(error) = layout::arrange(&paths).and_then(|()| loopback_up()) {
        fail(SandboxError::Layout(error));
    }
    match fork() {
        Err(refusal) => fail(refusal),
        Ok(None) => {
            let _ = PATHS.set(paths);
            Ok(ForkSide::Worker)
        }
        Ok(Some(worker)) => reap_until(worker),
    }
}

fn reap_until(worker: Pid) -> ! {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == worker => {
                std::process::exit(exit_status(status).into())
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => std::process::exit(1),
        }
    }
}

fn exit_status(status: WaitStatus) -> u8 {
    let code = status
        .exit_status()
        .or_else(|| status.terminating_signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok())
        .unwrap_or(u8::MAX)
}

fn unshare(flags: UnshareFlags) -> Result<(), SandboxError> {
    // SAFETY: the call is unsafe if threads share a file descriptor table; this process has one thread (`check`
    // verified that) and CLONE_FILES is not among the flags.
    unsafe { unshare_unsafe(flags) }.map_err(SandboxError::namespaces)
}

/// Forks. Returns `None` in the child.
fn fork() -> Result<Option<Pid>, SandboxError> {
    // Both processes would write what is buffered now.
    let _ = io::stdout().flush();
    // SAFETY: the process has one thread, so no other thread holds a lock that stays locked in the child. The safe
    // Command can only start another program, but the child must run the closure.
    match unsafe { libc::fork() } {
        -1 => Err(SandboxError::namespaces(io::Error::last_os_error())),
        0 => Ok(None),
        child => Ok(Pid::from_raw(child)),
    }
}

/// Sets `lo` up in the current network namespace, as `ip link set lo up`.
pub(crate) fn loopback_up() -> anyhow::Result<()> {
    use rustix::net::{AddressFamily, SocketType, socket};
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    // SAFETY: ifreq is plain data for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which `request` is, and keeps no pointer to it.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } != 0 {
        return Err(anyhow::Error::new(io::Error::last_os_error()).context("can't set lo up"));
    }
    Ok(())
}

/// The signals that outer blocks and waits for.
struct BlockedSignals {
    waited: libc::sigset_t,
    before: libc::sigset_t,
}

impl BlockedSignals {
    fn block() -> Self {
        // SAFETY: sigset_t is plain data; sigemptyset makes it a valid empty set.
        let (mut waited, mut before): (libc::sigset_t, libc::sigset_t) =
            unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a live sigset_t.
        unsafe { libc::sigemptyset(&mut waited) };
        for signal in [
            libc::SIGCHLD,
            libc::SIGINT,
            libc::SIGTERM,
            libc::SIGHUP,
            libc::SIGQUIT,
        ] {
            // SAFETY: as above; the signal numbers are the system's own.
            unsafe { libc::sigaddset(&mut waited, signal) };
        }
        // SAFETY: both pointers are to live sets, one read and one written.
        unsafe { libc::sigprocmask(libc::SIG_BLOCK, &waited, &mut before) };
        Self { waited, before }
    }

    fn wait(&self) -> i32 {
        let mut signal = 0;
        // SAFETY: reads a live set and writes a live integer.
        while unsafe { libc::sigwait(&self.waited, &mut signal) } != 0 {}
        signal
    }

    fn restore(&self) {
        // SAFETY: reads a live set; no old mask is returned.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &self.before, std::ptr::null_mut()) };
    }
}

/// An open file whose lock shows that a run is alive.
type Lock = File;
