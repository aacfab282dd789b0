//! The decisions of ebb, without I/O.
//!
//! Nothing here waits, opens a file or uses a socket, and every function that depends on the time takes it as an
//! argument. The agent and the CRI proxy share this crate, so both decide the same about the same call, and the tests
//! of each rule need no kernel, runtime or cluster.
//!
//! | module | what it decides or defines |
//! | --- | --- |
//! | [`flow`] | what a connection is doing, which side opened it, and whether it can hold a drain |
//! | [`machine`] | when a terminating pod may be stopped: the drain state machine |
//! | [`drain_report`] | the report of a drain |
//! | [`advice`] | what the drains of a workload say about its grace period |
//! | [`notification`] | what a drain tells the application: signals and a request |
//! | [`arrivals`] | how often clients connect to a pod |
//! | [`scope`] | where a pod's sockets are |
//! | [`ip_network`] | IP networks, as users write them |
//! | [`ids`] | one type per kind of id, so that the compiler finds a mix-up |
//! | [`clock`] | a moment on the boot-time clock. [`clock::BootTime::now`] is this crate's only system call |
//! | [`mod@format`] | how durations, sizes, addresses and errors are printed and parsed |
//! | [`pod_end`] | what is known of a pod's end, and which holds belong to the same end |
//! | [`policy`] | what a drain waits for and how long it may take, and what a pod's annotations change about that |
//! | [`release`] | why a hold ended |
//! | `setting` | settings that are one of a few names |
//! | [`socket_path`] | how the path of a unix socket is written |
//! | [`termination`] | whether a StopContainer is part of its pod's termination or a container restart |
//! | [`time_budget`] | how long a CRI call may be held, and which timeout is forwarded afterwards |

pub mod advice;
pub mod arrivals;
pub mod clock;
pub mod drain_report;
pub mod flow;
pub mod format;
pub mod ids;
pub mod ip_network;
pub mod machine;
pub mod notification;
pub mod pod_end;
pub mod policy;
pub mod release;
pub mod scope;
mod setting;
pub mod socket_path;
pub mod termination;
pub mod time_budget;
