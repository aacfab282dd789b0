//! The host under the node: which kubelet runs there, how the CRI proxy is installed, and what stands in the way.
//!
//! ```text
//!  /proc, /etc ──► kubelet (which endpoint, by whom, which version)
//!                     │
//!        install: desired ──► plan (pure) ──► apply ──► state file ──► undo
//!                     │
//!        doctor:  gather ──► checks (pure)
//! ```

pub mod doctor;
pub mod files;
pub mod install;
pub mod kubelet;
pub mod pid1;
pub mod plan;
pub mod state;
