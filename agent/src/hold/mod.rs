//! Holding calls and requests.

pub mod caller;
pub mod cri_proxy;
pub mod holding;
pub mod judge;
pub mod node_port;
pub mod wire;
