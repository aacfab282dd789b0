//! ebb lets Kubernetes pods end without cutting anybody off. See ARCHITECTURE.md for the rooms.

pub mod agent;
pub mod api;
pub mod cli;
pub mod clock;
pub mod drain;
pub mod exit;
pub mod flow;
pub mod hold;
pub mod ids;
pub mod kernel;
pub mod pods;
pub mod report;
pub mod start;
