//! `ebb doctor`: is this node able, and is this pod going to lose requests anyway?

mod checks;
mod gather;
mod pod;

use serde::{Deserialize, Serialize};

pub use checks::CAPABILITIES;
pub use gather::{Where, node};
pub use pod::advise;

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Something is less than it could be.
    Warn,
    /// ebb, or the hold, can't work so.
    Fail,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// How it went.
    pub status: Status,
    /// One line: what is, and what to do.
    pub detail: String,
}

impl Check {
    fn new(name: &str, status: Status, detail: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            status,
            detail: detail.into(),
        }
    }
}

/// What `ebb doctor` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// `ebb.dev/v1`.
    pub schema: String,
    /// The pod, if it was asked about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The checks.
    pub checks: Vec<Check>,
}

/// Something fails. The checks themselves have been printed.
#[derive(Debug, thiserror::Error)]
#[error("{0} of the checks failed")]
pub struct Failing(pub usize);

impl Diagnosis {
    /// The checks for people.
    pub fn text(&self) -> String {
        let width = self.checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
        let line = |c: &Check| {
            let status = match c.status {
                Status::Ok => "ok  ",
                Status::Warn => "warn",
                Status::Fail => "FAIL",
            };
            format!("{status}  {:<width$}  {}\n", c.name, c.detail)
        };
        self.checks.iter().map(line).collect()
    }

    /// # Errors
    ///
    /// [`Failing`] if any check fails. Warnings do not count.
    pub fn verdict(&self) -> Result<(), Failing> {
        let failing = self.checks.iter().filter(|c| c.status == Status::Fail);
        match failing.count() {
            0 => Ok(()),
            n => Err(Failing(n)),
        }
    }
}
