//! `cargo xtask vmtest`: the tests that depend on the kernel, on other kernels in virtual machines.
//!
//! The kernels come from Debian's suites ([`crate::setup::kernels`]). qemu emulates the processor, because machines may
//! lack KVM. A guest is fifteen to twenty-five times slower than its host. It has only an initramfs ([`image`]): the
//! test program `flows`, the programs that `flows` starts, and the modules that it needs.

mod console;
mod cpio;
mod guest;
mod image;
mod modules;
mod programs;
mod verdict;

use std::{fs, path::PathBuf, thread};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use guest::GuestReport;
use programs::GuestPrograms;
use verdict::{is_supported, summary};

use crate::{
    process::{say, target},
    setup::kernels::{self, DebianKernel},
};

/// The factor for the test suite's time limits in a guest (`EBB_TEST_SLOW`).
const SLOW: u32 = 10;

/// Parts of the names of the tests that CI runs: opening, closing and handing over of connections, their direction, their
/// owners and their other ends, lookups, and closing idle connections. The whole suite takes too long in a guest to run at
/// each change.
const IN_CI: &[&str] = &[
    "case_0",
    "case_1",
    "case_20",
    "case_21",
    "case_22",
    "owns_the_flows",
    "told_apart_by_namespace",
    "counters_are_removed",
    "are_released_by_lookups",
    "through_its_owner",
    "inbound",
    "outbound",
    "probe",
    "lookups_fail",
    "gaps_between",
    "a_peer_that_is_gone",
];

/// Exceptions among those: they race a timer of the kernel and lose in a guest.
const NOT_IN_GUESTS: &[&str] = &["given_up"];

/// Which tests to run, and on which kernels.
#[derive(Args)]
pub(crate) struct VmtestOptions {
    /// Boot only these kernels: 5.10, 6.1, 6.12 or 7. On 5.10 the agent has to refuse to start.
    #[arg(long, value_delimiter = ',', value_name = "VERSION")]
    kernel: Vec<String>,
    /// Skip the tests whose names contain this. May be given more than once.
    #[arg(long, value_name = "FILTER")]
    skip: Vec<String>,
    /// Run only tests whose names contain one of these.
    filters: Vec<String>,
}

impl VmtestOptions {
    /// What CI runs: [`IN_CI`] on the oldest and the newest kernel.
    pub(crate) fn for_ci() -> Self {
        Self {
            kernel: kernels::FOR_CI.iter().map(|k| (*k).to_owned()).collect(),
            skip: NOT_IN_GUESTS.iter().map(|f| (*f).to_owned()).collect(),
            filters: IN_CI.iter().map(|f| (*f).to_owned()).collect(),
        }
    }
}

/// Boots the kernels, two at a time, prints the suite's output, and then one line per kernel.
pub(crate) fn vmtest(options: &VmtestOptions) -> Result<()> {
    let mut wanted = options.kernel.clone();
    if wanted.is_empty() {
        wanted.extend(kernels::names().into_iter().map(str::to_owned));
    }
    crate::setup::ensure(crate::setup::Needs::All)?;
    let kernels = kernels::ensure(&wanted)?;
    say("building the test suite `flows`");
    let programs = GuestPrograms::build()?;
    let suite = programs.suite_command(&options.filters, &options.skip, SLOW)?;
    say(&format!(
        "booting Linux {} under qemu, emulated: this takes minutes",
        wanted.join(", ")
    ));
    let mut lines = Vec::new();
    let mut failed = Vec::new();
    for pair in kernels.chunks(2) {
        let reports = thread::scope(|scope| {
            let guests: Vec<_> = pair
                .iter()
                .map(|kernel| scope.spawn(|| test(kernel, &programs, &suite)))
                .collect();
            let reports = guests.into_iter().map(|guest| guest.join());
            reports.collect::<Vec<_>>()
        });
        for (kernel, report) in pair.iter().zip(reports) {
            let report = report.unwrap_or_else(|_| bail!("panicked"));
            let (passed, line) = summary(kernel, &report);
            lines.push(line);
            if !passed {
                failed.push(kernel.name);
            }
        }
    }
    println!();
    for line in lines {
        println!("{line}");
    }
    if !failed.is_empty() {
        bail!("failed on Linux {}", failed.join(", "));
    }
    Ok(())
}

/// The directory for files that are made for guests.
fn directory() -> Result<PathBuf> {
    let directory = target().join("vmtest");
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    Ok(directory)
}

fn test(kernel: &DebianKernel, programs: &GuestPrograms, suite: &str) -> Result<GuestReport> {
    let initramfs = if is_supported(kernel) {
        let modules = modules::needed(&kernel.modules)?;
        image::build(&[&programs.flows], &modules, suite)?
    } else {
        image::build(&[&programs.ebb], &[], &programs.agent_command()?)?
    };
    let path = directory()?.join(format!("{}.cpio", kernel.name));
    fs::write(&path, initramfs).with_context(|| format!("writing {}", path.display()))?;
    let processors = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(4);
    let report = guest::run(&kernel.image, &path, processors, |line| {
        println!("{}: {line}", kernel.name);
    });
    let _ = fs::remove_file(&path);
    report
}
