//! What a connection is doing, decided from kernel facts alone. Pure: no I/O, no clock.
//!
//! [`sample`] is what the kernel said of one socket at one moment; [`classify`](mod@classify) turns a
//! sample into a [`FlowState`]; [`snapshot`] puts the flows of one pod together and says of each whether
//! it can hold a drain.

pub mod classify;
pub mod sample;
pub mod snapshot;

pub use classify::{FlowState, classify};
pub use sample::{Direction, Record, Sample, TcpState};
pub use snapshot::{Exempt, Flow, FlowCounts, Snapshot};
