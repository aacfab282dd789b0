//! The agent's own HTTP interface on its unix socket.
pub mod client;
mod explain;
pub mod server;
