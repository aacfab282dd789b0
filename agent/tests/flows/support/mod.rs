//! What trials open, start and change, and the readings that they compare.

pub(crate) mod cgroup;
pub(crate) mod kernel;
pub(crate) mod link;
pub(crate) mod multipath;
pub(crate) mod raw;
pub(crate) mod sockets;
pub(crate) mod ss;
pub(crate) mod worker;
pub(crate) mod world;
