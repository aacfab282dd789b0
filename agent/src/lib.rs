//! ebb lets Kubernetes pods end without cutting off their clients. ARCHITECTURE.md describes how the code works.
//!
//! | folder | purpose | may import |
//! | --- | --- | --- |
//! | [`cli`] | the command line: one file per verb | all |
//! | [`app`] | start and stop of the agent | all below |
//! | `server` | what the agent serves: API, holds, node port, ports inside pods | all below |
//! | [`drains`], [`telemetry`], [`host`] | the drains of the node; log lines, Events and metrics; the kubelet and the CRI proxy's installation | `kernel`, `pods`, `linux` |
//! | [`kernel`], [`pods`] | BPF and sock_diag; the container runtime and the API server | `linux` |
//! | [`linux`] | namespaces, cgroups, files, the allocator | none |
//!
//! `tests/structure.rs` checks the imports.

pub mod app;
pub mod cli;
pub mod drains;
pub mod host;
pub mod kernel;
pub mod linux;
pub mod pods;
mod server;
pub mod telemetry;
