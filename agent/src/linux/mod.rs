//! Access to Linux without BPF: namespaces, cgroups, processes, descriptors, files, memory.

pub(crate) mod async_fd;
pub(crate) mod boot_id;
pub(crate) mod cgroup_descendants;
pub(crate) mod cgroups;
pub mod files;
pub(crate) mod logind;
pub(crate) mod malloc;
pub mod netns;
pub(crate) mod pidfd;
pub(crate) mod processes;
pub(crate) mod signal_handling;
pub(crate) mod socket_filter;
pub(crate) mod sync;
