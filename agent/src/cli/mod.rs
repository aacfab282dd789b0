//! The command line: one file per verb.

mod agent;
mod audit;
mod cri_proxy;
mod doctor;
mod drains;
mod explain;
mod flows;
mod install_cri;
mod pods;
mod release;
mod top;
mod uninstall_cri;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;
use tokio::runtime::{Builder, Runtime};

use crate::{api::client::AgentClient, exit};

/// Lets Kubernetes pods end without cutting anybody off.
#[derive(Parser)]
#[command(name = "ebb", version, max_term_width = 100, after_help = exit::HELP)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Track the connections of this node's pods and decide about holds.
    Agent(agent::Flags),
    /// Stand between the kubelet and the container runtime, and hold the stop of pods.
    CriProxy(cri_proxy::Flags),
    /// List this node's pods and how many connections each has.
    Pods(ViewFlags),
    /// List connections.
    Flows(flows::Flags),
    /// Show the busiest pods, again and again.
    Top(top::Flags),
    /// List drains, under way and over, with their reports.
    Drains(ViewFlags),
    /// Compare the counters with the kernel's own tables, and correct them.
    Audit(audit::Flags),
    /// Release a pod's holds now.
    Release(release::Flags),
    /// Say why the stops of a pod were held or not, and what its policy is.
    Explain(explain::Flags),
    /// Check whether this node is able, and whether a pod is going to lose requests anyway.
    Doctor(doctor::Flags),
    /// Install the CRI proxy on this host.
    InstallCri(install_cri::Flags),
    /// Undo what install-cri did.
    UninstallCri(uninstall_cri::Flags),
}

impl Cli {
    /// Runs the verb.
    ///
    /// # Errors
    ///
    /// Any; [`exit::code`] tells them apart.
    pub async fn run(self) -> Result<()> {
        match self.verb {
            Verb::Agent(flags) => agent::run(flags).await,
            Verb::CriProxy(flags) => cri_proxy::run(flags).await,
            Verb::Pods(flags) => pods::run(&flags).await,
            Verb::Flows(flags) => flows::run(&flags).await,
            Verb::Top(flags) => top::run(&flags).await,
            Verb::Drains(flags) => drains::run(&flags).await,
            Verb::Audit(flags) => audit::run(&flags).await,
            Verb::Release(flags) => release::run(&flags).await,
            Verb::Explain(flags) => explain::run(&flags).await,
            Verb::Doctor(flags) => doctor::run(&flags).await,
            Verb::InstallCri(flags) => install_cri::run(&flags).await,
            Verb::UninstallCri(flags) => uninstall_cri::run(&flags),
        }
    }

    /// The runtime for this verb. Two threads are plenty for what an agent does, and little for a node to give. The
    /// proxy has one: a call goes through half a dozen tasks that have little to do, and waking another thread for
    /// each costs more than all of them do. Nothing in it may block, not even the log ([`crate::log`]).
    ///
    /// # Errors
    /// If the system has no thread to give, or no event queue.
    pub fn runtime(&self) -> std::io::Result<Runtime> {
        match self.verb {
            Verb::CriProxy(_) => Builder::new_current_thread().enable_all().build(),
            _ => Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build(),
        }
    }

    /// Whether this is a service, with a log, or a question, with an answer.
    pub const fn is_service(&self) -> bool {
        matches!(self.verb, Verb::Agent(_) | Verb::CriProxy(_))
    }
}

/// Where the agent is.
#[derive(Args)]
struct AgentFlags {
    /// The agent's unix socket.
    #[arg(
        long = "agent",
        env = "EBB_AGENT",
        default_value = "/run/ebb/agent.sock",
        value_name = "SOCKET"
    )]
    socket: PathBuf,
}

impl AgentFlags {
    fn client(&self) -> AgentClient {
        AgentClient::new(&self.socket)
    }
}

/// Flags of all verbs that show something.
#[derive(Args)]
struct ViewFlags {
    #[command(flatten)]
    agent: AgentFlags,
    /// How to print it.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Output {
    /// Aligned columns, for people.
    #[default]
    Table,
    /// One JSON document, for programs (schema ebb.dev/v1).
    Json,
}

impl ViewFlags {
    /// Prints `document` in the wanted form.
    fn print<T: Serialize>(&self, document: &T, table: impl FnOnce(&T) -> String) -> Result<()> {
        match self.output {
            Output::Table => print(&table(document)),
            Output::Json => print_json(document),
        }
    }
}

fn print_json<T: Serialize>(document: &T) -> Result<()> {
    print(&(serde_json::to_string_pretty(document)? + "\n"))
}

/// Writes to standard output.
fn print(text: &str) -> Result<()> {
    use std::io::Write as _;
    match std::io::stdout().write_all(text.as_bytes()) {
        // The reader (`head`, a pager) has seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}
