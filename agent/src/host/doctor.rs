//! `ebb doctor`: can ebb work on this node, and will this pod lose requests anyway?

mod checks;
mod gather;
mod hooks;
mod pod;
mod programs;

pub use checks::CAPABILITIES;
pub use ebb_protocol::views::{Check, CheckStatus, Diagnosis};
pub(crate) use gather::{DoctorOptions, host_root, node};
pub(crate) use pod::advise;

/// Some checks failed. `ebb doctor` has printed them.
#[derive(Debug, thiserror::Error)]
#[error("{0} of the checks failed")]
pub(crate) struct FailedChecks(usize);

/// The checks as text: one line each, and below it why it matters and what to do.
pub(crate) fn text(diagnosis: &Diagnosis) -> String {
    let width = diagnosis
        .checks
        .iter()
        .map(|c| c.name.len())
        .max()
        .unwrap_or(0);
    let indent = "warn".len() + 2 + width + 2;
    let line = |c: &Check| {
        let status = match c.status {
            CheckStatus::Ok => "ok  ",
            CheckStatus::Unknown => "?   ",
            CheckStatus::Warn => "warn",
            CheckStatus::Fail => "FAIL",
        };
        let mut text = format!("{status}  {:<width$}  {}\n", c.name, c.detail);
        let more = [("why:", &c.why), ("change:", &c.change)];
        for (label, what) in more.into_iter().filter_map(|(l, w)| Some((l, w.as_ref()?))) {
            text += &format!("{:indent$}{label:<7} {what}\n", "");
        }
        text
    };
    diagnosis.checks.iter().map(line).collect()
}

/// # Errors
///
/// [`FailedChecks`] if any check fails. Warnings, and what ebb can't tell, do not count.
pub(crate) fn verdict(diagnosis: &Diagnosis) -> Result<(), FailedChecks> {
    let failing = diagnosis
        .checks
        .iter()
        .filter(|c| c.status == CheckStatus::Fail);
    match failing.count() {
        0 => Ok(()),
        n => Err(FailedChecks(n)),
    }
}
