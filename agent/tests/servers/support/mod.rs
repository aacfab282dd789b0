//! Pods with real servers in them, drains of them, and the table in README.md.

pub(crate) mod drains;
pub(crate) mod pod;
pub(crate) mod readme;

// What these trials share with those of the flows.
#[path = "../../flows/support/cgroup.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
pub(crate) mod cgroup;
#[path = "../../flows/support/kernel.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
pub(crate) mod kernel;
#[path = "../../flows/support/namespace.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
pub(crate) mod namespace;
#[path = "../../flows/support/puppet.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
pub(crate) mod puppet;
#[path = "../../flows/support/raw.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
mod raw;
#[path = "../../flows/support/sockets.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
mod sockets;
#[path = "../../flows/support/steps.rs"]
pub(crate) mod steps;
