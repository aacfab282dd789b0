//! Holding calls and requests.
pub mod wire;
