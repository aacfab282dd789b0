//! The command line: one file per verb.

mod advise;
mod agent;
mod completion;
mod doctor;
mod drain;
mod drains;
pub mod exit;
mod explain;
mod flows;
mod follow;
mod install_cri;
pub mod kubectl;
mod man;
mod output;
mod pods;
mod release;
mod top;
mod uninstall_cri;
mod version;
mod wait;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use ebb_core::socket_path;
use ebb_protocol::{client::AgentClient, service::log::LogFormat};
use tokio::runtime::{Builder, Runtime};

use self::output::print;

/// Lets Kubernetes pods end without cutting off their clients.
#[derive(Parser)]
#[command(name = "ebb", version, max_term_width = 100, args_override_self = true, after_help = exit::HELP)]
pub struct Cli {
    #[command(subcommand)]
    verb: CliVerb,
}

#[derive(Subcommand)]
enum CliVerb {
    /// Run the agent: track the connections of this node's pods and decide about holds.
    Agent(agent::AgentFlags),
    /// List this node's pods and how many connections each has.
    #[command(after_help = pods::LEGEND)]
    Pods(pods::PodsFlags),
    /// List connections.
    #[command(after_help = flows::LEGEND)]
    Flows(flows::FlowsFlags),
    /// Show the busiest pods, their connections and drains, and refresh until q or Ctrl-C.
    #[command(after_help = top::LEGEND)]
    Top(top::TopFlags),
    /// List the drains under way and the last ones that ended, with their reports.
    #[command(after_help = drains::LEGEND)]
    Drains(drains::DrainsFlags),
    /// Show what would hold a pod if it were deleted now.
    #[command(after_help = flows::LEGEND)]
    Drain(drain::DrainFlags),
    /// Wait until a pod has drained, and print the report of its drain. Exit status 13: it has not.
    ///
    /// The drain begins with the wait, as with a preStop hook. If the API server says that the pod is not being deleted, the
    /// wait ends soon, and nothing is closed or cut. Delete the pod first, or run `kubectl delete --wait=false`.
    #[command(after_help = drains::LEGEND)]
    Wait(wait::WaitFlags),
    /// Advise on grace periods and annotations, from the drains that the agent remembers.
    #[command(after_help = advise::LEGEND)]
    Advise(advise::AdviseFlags),
    /// Release a pod's holds now.
    Release(release::ReleaseFlags),
    /// Explain why the stops of a pod were held or not, and what its policy is.
    Explain(explain::ExplainFlags),
    /// Check whether ebb works on this node, or whether a pod would lose requests in spite of ebb.
    #[command(after_help = doctor::LEGEND)]
    Doctor(doctor::DoctorFlags),
    /// Install the CRI proxy on this host.
    InstallCri(install_cri::InstallCriFlags),
    /// Undo what install-cri did.
    UninstallCri(uninstall_cri::UninstallCriFlags),
    /// Print the versions of this program, the agent and the running CRI proxies.
    Version(version::VersionFlags),
    /// Print the completion of commands and flags for a shell, as in `source <(ebb completion bash)`.
    Completion(completion::CompletionFlags),
    /// Print the manual page of ebb, as in `ebb man | man -l -`.
    Man(man::ManFlags),
}

impl Cli {
    /// Runs the verb.
    ///
    /// # Errors
    ///
    /// [`exit::code`] gives the exit status of each.
    pub async fn run(self) -> Result<()> {
        match self.verb {
            CliVerb::Agent(flags) => agent::run(flags).await,
            CliVerb::Pods(flags) => pods::run(&flags).await,
            CliVerb::Flows(flags) => flows::run(&flags).await,
            CliVerb::Top(flags) => top::run(&flags).await,
            CliVerb::Drains(flags) => drains::run(&flags).await,
            CliVerb::Drain(flags) => drain::run(&flags).await,
            CliVerb::Wait(flags) => wait::run(&flags).await,
            CliVerb::Advise(flags) => advise::run(&flags).await,
            CliVerb::Release(flags) => release::run(&flags).await,
            CliVerb::Explain(flags) => explain::run(&flags).await,
            CliVerb::Doctor(flags) => doctor::run(&flags).await,
            CliVerb::InstallCri(flags) => install_cri::run(&flags).await,
            CliVerb::UninstallCri(flags) => uninstall_cri::run(&flags),
            CliVerb::Version(flags) => version::run(&flags).await,
            CliVerb::Completion(flags) => completion::run(&flags),
            CliVerb::Man(flags) => man::run(&flags),
        }
    }

    /// The async runtime. Two threads are enough for the agent, and cheap for the node.
    ///
    /// # Errors
    ///
    /// The system can't create a thread or an event queue.
    pub fn runtime() -> std::io::Result<Runtime> {
        Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
    }

    /// How the agent writes its log. `None` for the other verbs, which only print.
    pub const fn log_format(&self) -> Option<LogFormat> {
        match &self.verb {
            CliVerb::Agent(flags) => Some(flags.log_format),
            _ => None,
        }
    }
}

/// How to reach the agent.
#[derive(Args)]
struct ConnectFlags {
    /// The agent's unix socket.
    #[arg(
        long = "agent",
        env = "EBB_AGENT",
        default_value = "/run/ebb/agent.sock",
        value_name = "SOCKET",
        value_parser = socket_path::parse
    )]
    socket: PathBuf,
}

impl ConnectFlags {
    fn client(&self) -> AgentClient {
        AgentClient::new(&self.socket)
    }
}

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory as _};
    use ebb_core::flow::FlowState;
    use ebb_protocol::{
        table::{self, RenderedTable, TableStyle},
        views::{AdviceList, DrainList, PodList, SCHEMA},
    };

    use super::*;

    const WIDE: TableStyle = TableStyle {
        wide: true,
        no_headers: false,
    };

    /// The names that a legend explains: before the first two spaces of a line that is indented by two.
    fn explained(legend: &str) -> Vec<&str> {
        let names = legend
            .lines()
            .filter_map(|line| line.strip_prefix("  "))
            .filter(|line| !line.starts_with(' '))
            .filter_map(|line| line.split("  ").next());
        names.flat_map(|names| names.split(", ")).collect()
    }

    fn headings(table: &RenderedTable) -> Vec<&str> {
        let line = table.table.lines().next().unwrap_or_default();
        let cells = line.split("  ").map(str::trim);
        cells.filter(|cell| !cell.is_empty()).collect()
    }

    /// The end of the help of a verb.
    fn legend(verb: &str) -> String {
        let ebb = Cli::command();
        let help = ebb.find_subcommand(verb).and_then(Command::get_after_help);
        help.map(ToString::to_string).unwrap_or_default()
    }

    #[test]
    fn each_column_is_in_the_help_of_each_verb_that_prints_its_table_and_no_other_is() {
        let schema = || SCHEMA.into();
        let pods = PodList {
            schema: schema(),
            pods: vec![],
        };
        let drains = DrainList {
            schema: schema(),
            version: 0,
            drains: vec![],
        };
        let advice = AdviceList {
            schema: schema(),
            workloads: vec![],
        };
        for (table, verbs) in [
            (table::pods(&pods, WIDE), &["pods"][..]),
            (table::flows([].into_iter(), &[], WIDE), &["flows", "drain"]),
            (table::drains(&drains, WIDE), &["drains", "wait"]),
            (table::advice(&advice, WIDE), &["advise"]),
        ] {
            for verb in verbs {
                assert_eq!(explained(&legend(verb)), headings(&table), "{verb}");
            }
        }
    }

    #[test]
    fn the_legend_of_flows_has_each_state() {
        let mut lines = flows::LEGEND.lines();
        let states = lines.find(|line| line.contains("STATE")).unwrap();
        for state in FlowState::ALL {
            assert!(states.contains(state.name()), "no {state} in {states}");
        }
    }
}
