//! Holding calls and requests.
pub mod cri_proxy;
pub mod wire;
