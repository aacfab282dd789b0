//! Holding calls and requests.

pub mod caller;
pub mod cri_proxy;
mod door;
pub mod holding;
pub mod judge;
pub mod judgements;
pub mod node_port;
pub mod pod_port;
pub mod shares;
pub mod wait;
pub mod wire;
