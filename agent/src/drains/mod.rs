//! The drains of the node.
//!
//! [`policy`](ebb_core::policy) defines what a drain waits for, and [`machine`](ebb_core::machine) decides; both are
//! pure. [`driver`] owns all drains of the node and gives out holds. `history` answers whether a hold continues an
//! earlier drain, and [`journal`] keeps that across restarts of the agent. [`notify`] sends notifications to the
//! application, if annotations of its pod ask for it.

pub mod driver;
mod history;
pub mod journal;
pub mod notify;
