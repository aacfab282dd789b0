//! Namespaces, sockets and processes to drive into a corner, and the readings to compare.

pub(crate) mod cgroup;
pub(crate) mod kernel;
pub(crate) mod link;
pub(crate) mod multipath;
pub(crate) mod namespace;
pub(crate) mod proc_net;
pub(crate) mod puppet;
pub(crate) mod raw;
pub(crate) mod sockets;
pub(crate) mod ss;
pub(crate) mod steps;
pub(crate) mod world;
