//! Runs one guest: qemu without KVM.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::console::{Console, GuestEnd};
use crate::process::killed_with_parent;

/// A kernel warning or panic ends the guest. The kernel prints only errors.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 loglevel=4 oops=panic panic_on_warn=1 panic=-1";

/// The result of a guest. `output` and `boot` are those of [`Console`].
pub(super) struct GuestReport {
    pub(super) end: GuestEnd,
    pub(super) output: Vec<String>,
    pub(super) boot: Duration,
    /// From the start of the emulator to the guest's end.
    pub(super) total: Duration,
}

/// Boots a kernel and runs the initramfs's command. Calls `print` with each line of the console.
///
/// # Errors
/// If the emulator does not start.
pub(super) fn run(
    kernel: &Path,
    initramfs: &Path,
    processors: usize,
    print: impl Fn(&str),
) -> Result<GuestReport> {
    let begun = Instant::now();
    let mut emulator = Emulator::start(kernel, initramfs, processors)?;
    let serial = emulator.0.stdout.take().context("no console")?;
    let (sender, lines) = mpsc::channel();
    // The thread ends with the emulator.
    thread::spawn(move || {
        for line in BufReader::new(serial).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let mut console = Console::new(begun);
    let end = loop {
        match lines.recv_timeout(console.left()) {
            Ok(line) => {
                print(&line);
                if let Some(end) = console.take(line) {
                    break end;
                }
            }
            Err(RecvTimeoutError::Timeout) => break GuestEnd::TimedOut(console.phase),
            Err(RecvTimeoutError::Disconnected) => break GuestEnd::Down(console.phase),
        }
    };
    Ok(GuestReport {
        end,
        output: console.output,
        boot: console.boot,
        total: begun.elapsed(),
    })
}

/// A qemu process. It is killed when this is dropped or this process ends.
struct Emulator(Child);

impl Emulator {
    fn start(kernel: &Path, initramfs: &Path, processors: usize) -> Result<Self> {
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none"])
            // qemu ends when the guest reboots or panics.
            .arg("-no-reboot")
            .args(["-accel", "tcg,thread=multi"])
            // A CPU with cmpxchg16b, which kmalloc_nolock (mm/slub.c) of Linux 7.2 needs; BPF allocates by it.
            .args(["-cpu", "max"])
            .args(["-smp", &processors.to_string(), "-m", "2G"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", KERNEL_ARGUMENTS])
            .args(["-serial", "stdio"]);
        let child = killed_with_parent(&qemu)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting qemu-system-x86_64")?;
        Ok(Self(child))
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
