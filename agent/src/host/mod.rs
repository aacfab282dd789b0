//! The host: its kubelet, the installation of the CRI proxy, and checks of the node and its pods.
//!
//! ```text
//!  /proc, /etc ──► kubelet (its endpoint, where that is set, its version)
//!                     │
//!        install: desired ──► plan (pure) ──► apply ──► state file ──► undo
//!                     │
//!        doctor:  gather ──► checks (pure)
//! ```

pub mod doctor;
pub(crate) mod install;
pub mod kubelet;
mod plan;
pub(crate) mod proxy;
mod state;
