//! ebb lets Kubernetes pods end without cutting anybody off. See ARCHITECTURE.md for the rooms.

pub mod agent;
pub mod api;
mod audits;
pub mod cleanup;
pub mod cli;
pub mod clock;
pub mod drain;
pub mod exit;
pub mod flow;
pub mod hold;
pub mod host;
pub mod ids;
pub mod kernel;
mod limits;
pub mod listen;
mod lock;
pub mod log;
mod memory;
pub mod pods;
pub mod report;
mod run_dir;
pub mod start;
