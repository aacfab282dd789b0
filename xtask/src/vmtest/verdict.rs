//! Decides whether a kernel passed.

use anyhow::Result;

use super::{console::GuestEnd, guest::GuestReport};
use crate::{preflight, setup::kernels::DebianKernel};

/// The oldest kernel that ebb supports. On an older one the agent must refuse to start.
const FLOOR: (u32, u32) = (5, 15);

/// Whether ebb supports a kernel, so that the suite runs on it.
pub(super) fn is_supported(kernel: &DebianKernel) -> bool {
    preflight::version(&kernel.release) >= Some(FLOOR)
}

/// Whether the kernel passed, with a line for the summary.
pub(super) fn summary(kernel: &DebianKernel, report: &Result<GuestReport>) -> (bool, String) {
    let DebianKernel { name, release, .. } = kernel;
    let (passed, what) = match report {
        Err(error) => (false, format!("{error:#}")),
        Ok(report) => {
            let (passed, what) = verdict(is_supported(kernel), report);
            let seconds = (report.boot.as_secs(), report.total.as_secs());
            (
                passed,
                format!("{what} (boot {} s, in all {} s)", seconds.0, seconds.1),
            )
        }
    };
    let word = if passed { "passed" } else { "FAILED" };
    (
        passed,
        format!("Linux {name:<5} {release:<24} {word}: {what}"),
    )
}

fn verdict(supported: bool, report: &GuestReport) -> (bool, String) {
    match (&report.end, supported) {
        (GuestEnd::Exited(status), true) => {
            let results = report
                .output
                .iter()
                .rfind(|l| l.starts_with("test result:"));
            let what = results.map_or_else(|| report.end.to_string(), Clone::clone);
            (*status == 0, what)
        }
        (GuestEnd::Exited(status), false) => {
            let floor = format!("{}.{}", FLOOR.0, FLOOR.1);
            let refusal = report.output.iter().find(|l| l.contains(&floor));
            match refusal {
                Some(line) if *status != 0 => (true, format!("refused: {line}")),
                _ => (
                    false,
                    format!(
                        "the agent did not refuse with a message that names Linux {floor}: {}",
                        report.end
                    ),
                ),
            }
        }
        (end, _) => (false, end.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::vmtest::console::GuestPhase;

    fn report(end: GuestEnd, output: &[&str]) -> GuestReport {
        GuestReport {
            end,
            output: output.iter().map(|line| (*line).to_owned()).collect(),
            boot: Duration::ZERO,
            total: Duration::ZERO,
        }
    }

    #[test]
    fn a_supported_kernel_passes_only_if_the_suite_exits_with_0() {
        let (passed, what) = verdict(
            true,
            &report(GuestEnd::Exited(0), &["test result: ok. 3 passed"]),
        );
        assert!(passed);
        assert_eq!(what, "test result: ok. 3 passed");
        for end in [
            GuestEnd::Exited(1),
            GuestEnd::Down(GuestPhase::Running),
            GuestEnd::TimedOut(GuestPhase::Booting),
        ] {
            assert!(!verdict(true, &report(end, &["test result: ok. 3 passed"])).0);
        }
    }

    #[test]
    fn a_kernel_below_the_floor_passes_if_the_agent_refuses_and_names_the_floor() {
        let refusal = ["ebb: Linux 5.10.0 is too old: ebb needs Linux 5.15 or later"];
        assert!(verdict(false, &report(GuestEnd::Exited(5), &refusal)).0);
        assert!(!verdict(false, &report(GuestEnd::Exited(0), &refusal)).0);
        assert!(!verdict(false, &report(GuestEnd::Exited(5), &["ebb: no runtime"])).0);
        assert!(
            !verdict(
                false,
                &report(GuestEnd::Down(GuestPhase::Running), &refusal)
            )
            .0
        );
    }
}
