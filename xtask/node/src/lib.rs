//! A real Kubernetes node for tests and the demo, made of Debian parts.
//!
//! containerd, runc and the bridge network plugin run in namespaces of their own ([`sandbox`]),
//! images are made from local files ([`image`]), and [`kubelet`] makes the calls a kubelet makes.
//! [`fixture`] holds what runs inside containers and [`clients`] what connects to them. [`api_server`]
//! stands in for the cluster. Nothing here knows ebb: this crate is the reference that ebb is measured
//! against.
//!
//! A program that uses it starts so:
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! fn main() -> ExitCode {
//!     // Containers and the runtime start this same executable again, under other names.
//!     if let Some(code) = ebb_node::helpers::dispatch() {
//!         return code;
//!     }
//!     ebb_node::sandbox::inside(|| {
//!         // A tokio runtime, `Node::start()`, pods…
//!         ExitCode::SUCCESS
//!     })
//! }
//! ```

pub mod api_server;
pub mod clients;
pub mod containerd;
pub mod fixture;
pub mod helpers;
pub mod http;
pub mod image;
pub mod kubelet;
mod node;
pub mod parts;
mod runc;
pub mod sandbox;

pub use node::Node;
