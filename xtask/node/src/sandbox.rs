//! Namespaces of their own for a node, which vanish with it.
//!
//! ```text
//!  outer ── waits, passes on the exit status, removes the cgroups and the directory
//!    └─ init ── pid 1 of a new PID namespace; reaps orphans (containerd's shims leave many)
//!         └─ worker ── runs the closure: containerd, pods, clients are its descendants
//! ```
//!
//! Everything below init dies with init, and init dies with outer (PR_SET_PDEATHSIG), so no way of
//! ending leaves a process behind; mounts and network namespaces go with their last process. What
//! stays after a SIGKILL of outer, empty cgroups and a directory, the next run sweeps away.
//!
//! The outer process must not start threads or processes of its own afterwards: its children would
//! land in the dead PID namespace.

#![allow(unsafe_code)] // fork, unshare, signal masks and one ioctl have no safe interface.

mod layout;
mod place;

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::OnceLock;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use rustix::thread::{UnshareFlags, unshare_unsafe};

pub use place::{Place, Refusal, check, left_behind};

static PLACE: OnceLock<Place> = OnceLock::new();

/// The sandbox that this process runs in.
///
/// # Errors
/// If the process is not inside [`inside`].
pub fn place() -> anyhow::Result<&'static Place> {
    PLACE
        .get()
        .ok_or_else(|| anyhow::anyhow!("not inside a node sandbox: call sandbox::inside first"))
}

/// Runs `f` in fresh mount, network, PID, IPC and UTS namespaces and returns its exit status.
///
/// To be called while the process has one thread. `f` runs in a descendant, as root of a small node:
/// cgroup2 at `/sys/fs/cgroup`, an empty `/run`, loopback up, forwarding on, writes to `/var/lib`
/// kept off the machine. When the machine can't do that, prints one line that says why and returns
/// [`Refusal::status`]. SIGINT, SIGTERM and SIGHUP end the node and return 128 + the signal.
pub fn inside(f: impl FnOnce() -> ExitCode) -> ExitCode {
    match enter() {
        Ok(Side::Outer(status)) => ExitCode::from(status),
        Ok(Side::Worker) => {
            let code = f();
            // An ExitCode can't be read, only compared. Leaving here keeps whatever the caller does
            // after `inside` to the outer process.
            let status = (0..=u8::MAX).find(|status| ExitCode::from(*status) == code);
            std::process::exit(status.unwrap_or(1).into())
        }
        Err(refusal) => {
            eprintln!("error: {refusal}");
            ExitCode::from(refusal.status())
        }
    }
}

/// Has this process end (by SIGTERM, and so in order) when its parent does: for a test program, which a
/// runner that is killed leaves behind otherwise. To be called before [`inside`].
pub fn end_with_parent() {
    let parent = rustix::process::getppid();
    let set = rustix::process::set_parent_process_death_signal(Some(Signal::TERM));
    // It may have died just before.
    if set.is_ok() && rustix::process::getppid() != parent {
        std::process::exit(1);
    }
}

enum Side {
    Outer(u8),
    Worker,
}

fn enter() -> Result<Side, Refusal> {
    check()?;
    place::sweep();
    let (place, _lock) = Place::create()?;
    let signals = Signals::block();
    // Closed when outer dies, however it dies.
    let (alive, alive_outer) = pipe_with(PipeFlags::CLOEXEC).map_err(Refusal::namespaces)?;

    unshare(UnshareFlags::NEWPID).inspect_err(|_| place.remove())?;
    match fork().inspect_err(|_| place.remove())? {
        Some(init) => {
            let status = watch(init, &signals);
            place.remove();
            Ok(Side::Outer(status))
        }
        None => {
            drop(alive_outer);
            signals.restore();
            init(place, &alive)
        }
    }
}

/// The outer process: waits for init to end or for a signal that ends it.
fn watch(init: Pid, signals: &Signals) -> u8 {
    loop {
        let signal = signals.wait();
        if signal == libc::SIGCHLD {
            if let Ok(Some((_, status))) = rustix::process::waitpid(Some(init), WaitOptions::NOHANG)
            {
                return exit_status(status);
            }
            continue;
        }
        // Init can't be asked to end: it has no handlers. Its death is everybody's.
        let _ = rustix::process::kill_process(init, Signal::KILL);
        let _ = rustix::process::waitpid(Some(init), WaitOptions::empty());
        return u8::try_from(128 + signal).unwrap_or(u8::MAX);
    }
}

/// Pid 1: makes the namespaces and mounts, starts the worker and reaps until the worker has ended.
fn init(place: Place, alive: &OwnedFd) -> Result<Side, Refusal> {
    let fail = |refusal: Refusal| -> ! {
        eprintln!("error: {refusal}");
        std::process::exit(refusal.status().into())
    };
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::KILL)) {
        fail(Refusal::namespaces(error));
    }
    // Outer may have died before the line above; then nobody would ever send that signal.
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
    if let Err(error) = layout::arrange(&place).and_then(|()| loopback_up()) {
        fail(Refusal::Layout(error));
    }
    match fork() {
        Err(refusal) => fail(refusal),
        Ok(None) => {
            let _ = PLACE.set(place);
            Ok(Side::Worker)
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

fn unshare(flags: UnshareFlags) -> Result<(), Refusal> {
    // SAFETY: the call is unsafe for file descriptor tables shared between threads; this process has
    // one thread (`check` made sure) and CLONE_FILES is not among the flags.
    unsafe { unshare_unsafe(flags) }.map_err(Refusal::namespaces)
}

/// Forks; `None` in the child.
fn fork() -> Result<Option<Pid>, Refusal> {
    // What is buffered now would be written by both.
    let _ = io::stdout().flush();
    // SAFETY: the process has one thread, so no lock is held by a thread that the child lacks. The
    // safe way, Command, can only start another program, and the closure has to go along.
    match unsafe { libc::fork() } {
        -1 => Err(Refusal::namespaces(io::Error::last_os_error())),
        0 => Ok(None),
        child => Ok(Pid::from_raw(child)),
    }
}

/// Sets `lo` up in the current network namespace, as `ip link set lo up`.
fn loopback_up() -> anyhow::Result<()> {
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

/// The signals that outer waits for instead of dying from them.
struct Signals {
    waited: libc::sigset_t,
    before: libc::sigset_t,
}

impl Signals {
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
        // SAFETY: reads a live set; the old mask is not asked for.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &self.before, std::ptr::null_mut()) };
    }
}

/// An open file whose lock says that a run is alive.
type Lock = File;
