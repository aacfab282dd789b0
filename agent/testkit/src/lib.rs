//! A real Kubernetes node for tests, the demo and the bench, made of Debian parts.
//!
//! containerd, runc and the bridge network plugin run in namespaces of their own ([`sandbox`]). [`image`] makes
//! images from local files, and [`kubelet`] makes a kubelet's CRI calls. [`fixture`] has the programs inside
//! containers, [`clients`] the clients that connect to them, and [`api_server`] replaces the cluster's API server.
//! [`terminal`] runs a program in a pseudo-terminal. Nothing here depends on ebb, because this crate is the reference
//! for ebb's tests.
//!
//! Test suites that need no node use [`trial`], [`namespace`], [`cgroup`] and [`proc_net`].
//!
//! A program uses it like this:
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! fn main() -> ExitCode {
//!     // Containers and the runtime start this executable again, under other names.
//!     if let Some(code) = ebb_testkit::helpers::dispatch() {
//!         return code;
//!     }
//!     ebb_testkit::sandbox::inside(|| {
//!         // A tokio runtime, `Node::start()`, pods…
//!         ExitCode::SUCCESS
//!     })
//! }
//! ```

pub mod api_server;
pub mod cgroup;
pub mod clients;
pub mod containerd;
pub mod fixture;
pub mod helpers;
pub mod http;
pub mod image;
pub mod kubelet;
pub mod namespace;
mod node;
pub mod parts;
pub mod proc_net;
mod runc;
pub mod sandbox;
pub mod terminal;
pub mod trial;

pub use node::Node;
