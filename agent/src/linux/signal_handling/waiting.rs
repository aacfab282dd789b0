//! The signals that a process waits for instead of catching them.
//!
//! While a thread waits in sigwait or sigtimedwait, `/proc/PID/status` shows neither a handler nor a blocked signal:
//! the kernel takes the signals out of the thread's mask, so that they wake it (`do_sigtimedwait`, kernel/signal.c).
//! `/proc/PID/task/TID/syscall` has the address of the set, and `/proc/PID/mem` the set. tini waits so. A signalfd
//! shows its set in `/proc/PID/fdinfo` (`signalfd_show_fdinfo`, fs/signalfd.c). catatonit and s6 wait so.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::Path,
};

/// How many threads and descriptors of a process are read. A program that waits for signals does so early, in one of
/// its first threads.
const MOST: usize = 1024;

/// Whether the process's main thread is running, or waits for a CPU. It may have been woken from a wait for signals, and
/// then its mask is still open, but `syscall` does not show its set.
pub(super) fn is_running(process: &Path) -> bool {
    fs::read_to_string(process.join("syscall")).is_ok_and(|call| call.trim_end() == "running")
}

/// The signals that the process waits for, as a mask. 0 if its files can't be read.
pub(super) fn signals(process: &Path) -> u64 {
    let entries = |directory| {
        let entries = fs::read_dir(process.join(directory)).into_iter().flatten();
        entries.flatten().take(MOST)
    };
    let threads = entries("task").filter_map(|task| in_sigtimedwait(process, &task.path()));
    let descriptors = entries("fd").filter_map(|fd| {
        let target = fs::read_link(fd.path()).ok()?;
        if target.as_os_str() != "anon_inode:[signalfd]" {
            return None;
        }
        let info = process.join("fdinfo").join(fd.file_name());
        mask_of_signalfd(&fs::read_to_string(info).ok()?)
    });
    threads.chain(descriptors).fold(0, |all, set| all | set)
}

/// The set of a thread that is in `rt_sigtimedwait`.
fn in_sigtimedwait(process: &Path, task: &Path) -> Option<u64> {
    let set = || set_address(&fs::read_to_string(task.join("syscall")).ok()?);
    let address = set()?;
    let mut bytes = [0; 8];
    let memory = File::open(process.join("mem")).ok()?;
    memory.read_exact_at(&mut bytes, address).ok()?;
    // If the thread has returned meanwhile, the memory may have been used for something else.
    (set() == Some(address)).then_some(u64::from_ne_bytes(bytes))
}

/// The first argument of `rt_sigtimedwait` (`NR ARG1 …`, proc_pid_syscall(5)); `None` for another system call.
fn set_address(syscall: &str) -> Option<u64> {
    let mut words = syscall.split_ascii_whitespace();
    let number: i64 = words.next()?.parse().ok()?;
    if number != libc::SYS_rt_sigtimedwait {
        return None;
    }
    u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()
}

fn mask_of_signalfd(fdinfo: &str) -> Option<u64> {
    let line = fdinfo.lines().find_map(|l| l.strip_prefix("sigmask:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_set_of_a_waiting_thread_is_found() {
        let number = libc::SYS_rt_sigtimedwait;
        let line = format!("{number} 0x7ffc9bb29fc0 0x0 0x55820ff84020 0x8 0x7 0x0 0x7ffc 0x7f1e");
        assert_eq!(set_address(&line), Some(0x7ffc_9bb2_9fc0));
        assert_eq!(set_address("0 0x3 0x7ffd544dbb00 0x80"), None);
        assert_eq!(set_address("running"), None);
    }

    #[test]
    fn the_set_of_a_signalfd_is_found() {
        let info = "pos:\t0\nflags:\t02\nmnt_id:\t15\nsigmask:\tfffffffe3ffbfa07\n";
        assert_eq!(mask_of_signalfd(info), Some(0xffff_fffe_3ffb_fa07));
        assert_eq!(mask_of_signalfd("pos:\t0\n"), None);
    }
}
