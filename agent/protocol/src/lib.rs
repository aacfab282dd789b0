//! The data that ebb's processes exchange over sockets or print as JSON.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`views`] | the JSON of `ebb.dev/v1`, below |
//! | [`drain_report`] | its largest part: the report of a drain. The drain machine writes it, so the types are in `ebb-core` |
//! | [`table`] | views as aligned tables, for the agent and the command line |
//! | [`filter`] | what lists leave out: labels, networks, states |
//! | [`client`] | a client of the agent: HTTP/1.1 with JSON over its unix socket |
//! | [`hold`] | the protocol between the CRI proxy and the agent |
//! | [`proxy_metrics`] | the proxy's metrics, which the agent shows |
//! | [`service`] | the start of both long-running processes: log, socket, signals and limits |
//!
//! # The JSON of `ebb.dev/v1`
//!
//! The agent serves it on `RUN_DIR/agent.sock`, for root only, and `-o json` prints it. A schema may gain fields, but
//! never loses or changes one. `…_ms` are whole milliseconds, addresses are `IP:PORT` (IPv6 in brackets), times are
//! RFC 3339 in UTC, and counts of flows are an object with one number per flow state. An optional field is absent if
//! its value is not known or does not apply; unknown is never zero.
//!
//! | request or command | answer |
//! | --- | --- |
//! | `GET /v1/pods` with [`filter::PodQuery`] | [`views::PodList`] |
//! | `GET /v1/flows` with [`filter::FlowQuery`] | [`views::FlowList`]; without `all`, inbound flows only |
//! | `GET /v1/flows/table` with the same | [`table::RenderedTable`], the text of `ebb flows`: 100,000 flows as JSON take longer than their dump |
//! | `GET /v1/drains` with [`filter::DrainQuery`] | [`views::DrainList`]: drains under way, then those that are over, newest first |
//! | `GET /v1/explain?pod=NAME` | [`views::Explanation`], or 404: the agent knows neither the pod nor a stop of it |
//! | `GET /v1/advice` | [`views::AdviceList`] |
//! | `GET /v1/wait?pod=NAME`, and `until` and `timeout` as on the node port | [`views::WaitReply`], or 404 (no such pod, or several) |
//! | `GET /v1/version` | [`views::VersionView`] |
//! | `POST /v1/release` with [`views::ReleaseRequest`] | [`views::Released`], 404 (no such pod, or several) or 409 (it is not draining) |
//! | `GET /v1/wait` on the node port and inside pods | [`views::WaitReply`] |
//! | `ebb doctor -o json` | [`views::Diagnosis`] |
//! | `ebb version -o json` | [`views::Versions`] |
//! | `ebb drain POD --dry-run -o json` | [`views::DryRun`] |
//! | `kubectl ebb advise`, `doctor` or `version` with `-o json` | [`views::NodeDocuments`] |
//! | any failure | [`views::Problem`] |
//! | `POST /v1/holds`, `POST /v1/passed` | for the CRI proxy: [`hold`] |
//!
//! `reason` is one of these:
//!
//! | of | |
//! | --- | --- |
//! | a drain | `drained`, `deadline`, `manual`, `untracked`, `not-terminating`, `shutdown`; `exited` if it was only observed ([`ReleaseReason`](ebb_core::release::ReleaseReason)) |
//! | a stop that was held | that of its drain; `exited`: what the call stops has exited by itself; `agent-ended`: the agent was killed |
//! | a stop that was forwarded at once, by the agent | `not-terminating`, `observe`, `drain-off`, `nothing-runs`, `exited` |
//! | … by the proxy | `no-time`, `agent-away`, `agent-silent`, `unreadable` (only counted: the proxy knows no pod), `other` (of a newer proxy; [`BypassReason`](hold::BypassReason)) |

pub mod client;
pub mod filter;
pub mod hold;
pub mod proxy_metrics;
#[cfg(feature = "schema")]
pub mod schema;
pub mod service;
pub mod table;
pub mod views;

pub use ebb_core::drain_report;
