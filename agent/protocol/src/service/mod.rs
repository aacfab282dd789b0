//! The start of the agent and the CRI proxy: log, socket, signals and limits.

pub mod listen;
pub mod log;
mod rlimit;
mod signals;

pub use rlimit::raise_open_files;
pub use signals::stop_on_signal;
