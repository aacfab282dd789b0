//! Reports: log lines, Kubernetes Events, metrics and traces. Other parts of the agent call it; it queries none of them.

pub(crate) mod annotation_warnings;
pub mod events;
pub(crate) mod metrics;
pub mod pod_event;
pub(crate) mod reporter;
pub(crate) mod traces;
pub(crate) mod workloads;

pub use metrics::reference;
