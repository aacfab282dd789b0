//! What a connection is doing, decided from kernel facts alone. Pure: no I/O, no clock.
//!
//! [`sample`] is what the kernel said of one socket at one moment; [`origin`] who opened it; [`classify`](mod@classify) turns a
//! sample into a [`FlowState`]; [`snapshot`] puts the flows of one pod together and says of each whether
//! it can hold a drain.

pub mod classify;
mod multipath;
pub mod origin;
pub mod sample;
pub mod snapshot;

pub use classify::{FlowState, classify};
pub use origin::{Acceptance, Origin};
pub use sample::{Direction, Sample, TcpState};
pub use snapshot::{Exempt, Flow, FlowCounts, Since, Snapshot};
