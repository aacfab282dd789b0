//! `kubectl ebb`: the same verbs for a whole cluster, from a workstation.
//!
//! The program `ebb` is this plugin when it is called `kubectl-ebb`. It finds the agents' pods through the API server and
//! runs each verb there, as `kubectl exec` does. A list comes from all agents as JSON, and is printed here as one. A verb
//! about one pod runs on that pod's node.

mod agents;
mod args;
mod exec;
mod list;

use std::{
    ffi::{OsStr, OsString},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Result, bail};
use clap::{Args, FromArgMatches as _};
use ebb_protocol::filter::{OwnerRef, PeerNetworks};

use self::agents::{Agents, RemoteAgent};
use super::{
    Cli, CliVerb,
    output::{NamespaceFlags, OtherNamespace},
};

/// The name by which kubectl finds the plugin.
const NAME: &str = "kubectl-ebb";

/// The exit status of a command that some agent did not answer, as in [`super::exit::HELP`].
const NO_ANSWER: u8 = 9;

/// Which cluster and which of its nodes.
#[derive(Args, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Cluster")]
struct ClusterFlags {
    /// The context in the kubeconfig. Without this flag, the current one.
    #[arg(long, global = true, value_name = "NAME")]
    context: Option<String>,
    /// The kubeconfig. Without this flag, the file that $KUBECONFIG names, or ~/.kube/config.
    #[arg(long, global = true, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Ask only the agent of this node.
    #[arg(long, global = true, value_name = "NODE")]
    node: Option<String>,
    /// The namespace of the agents' DaemonSet.
    #[arg(
        long,
        global = true,
        default_value = "ebb-system",
        value_name = "NAMESPACE"
    )]
    agent_namespace: String,
}

/// A command line of `kubectl ebb`.
pub struct Plugin {
    cluster: ClusterFlags,
    verb: CliVerb,
    /// What the agent's `ebb` gets: the arguments without the cluster's flags.
    remote: Vec<String>,
}

/// Where a verb runs.
enum Route {
    /// On all nodes, and the lists become one.
    List,
    /// On the node of this pod: its name, or `NAMESPACE/NAME`. If the verb changes something, the API server must know
    /// the pod.
    Pod { pod: String, changes: bool },
    /// On each node after another.
    EachNode,
    /// On one node, with the terminal.
    Terminal,
    /// Nowhere: it is about the host that it runs on.
    Nowhere,
}

impl Plugin {
    /// Whether a program that was started by this name is the plugin.
    pub fn is_called_by(program: Option<&OsStr>) -> bool {
        program.and_then(|path| Path::new(path).file_stem()) == Some(OsStr::new(NAME))
    }

    /// Parses a command line. Prints help or an error and exits where clap does.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Self {
        let args: Vec<_> = args.into_iter().collect();
        let matches = args::command().get_matches_from(&args);
        let parsed = Cli::from_arg_matches(&matches)
            .and_then(|cli| Ok((cli.verb, ClusterFlags::from_arg_matches(&matches)?)));
        let (verb, cluster) = parsed.unwrap_or_else(|e| e.exit());
        Self {
            cluster,
            verb,
            remote: args::without_cluster_flags(&args[1..]),
        }
    }

    /// Runs the verb, and returns the exit status of the agents' `ebb`.
    ///
    /// # Errors
    ///
    /// The API server can't be used, or no agent runs where the verb belongs.
    pub async fn run(mut self) -> Result<ExitCode> {
        let route = route(&self.verb)?;
        if matches!(route, Route::Nowhere) {
            bail!("this command is about the host that it runs on: run `ebb` on the node");
        }
        let agents = Agents::find(&self.cluster).await?;
        if let Some(pod) = peer_pod(&self.verb) {
            // The last of two flags is obeyed.
            let addresses = agents.addresses_of_pod(pod).await?;
            self.remote.extend(["--peer".into(), addresses]);
        }
        let status = match route {
            Route::List => list::run(&self.verb, &agents, &self.remote).await?,
            Route::Pod { pod, changes } => self.on_the_pods_node(&agents, &pod, changes).await?,
            Route::EachNode => each_node(&agents, &self.remote).await,
            Route::Terminal => agents.only()?.with_terminal(&self.remote).await?,
            Route::Nowhere => 1,
        };
        Ok(ExitCode::from(status))
    }

    async fn on_the_pods_node(&self, agents: &Agents, pod: &str, changes: bool) -> Result<u8> {
        if let Some(agent) = agents.of_pod(pod).await? {
            return agent.print(&self.remote).await;
        }
        if changes {
            bail!("the API server knows no pod {pod}; give its whole name, or NAMESPACE/NAME");
        }
        // A pod that is gone, or only the beginning of a name: an agent may know it.
        first_success(agents.all(), &self.remote).await
    }
}

/// Prints the output of the first agent that succeeds, or the errors of all.
async fn first_success(agents: &[RemoteAgent], args: &[String]) -> Result<u8> {
    let mut failed = Vec::new();
    let mut status = NO_ANSWER;
    for agent in agents {
        match agent.output(args).await {
            Ok(output) if output.status == 0 => {
                super::output::print(&output.stdout)?;
                let _ = io::stderr().write_all(output.stderr.as_bytes());
                return Ok(0);
            }
            Ok(output) => {
                status = output.status;
                failed.push(format!("{}: {}", agent.node, output.stderr.trim_end()));
            }
            Err(e) => failed.push(format!("{}: {e:#}", agent.node)),
        }
    }
    let _ = writeln!(io::stderr(), "{}", failed.join("\n"));
    Ok(status)
}

/// Runs a verb on each node after another, below the node's name. Returns the highest exit status.
async fn each_node(agents: &Agents, args: &[String]) -> u8 {
    let mut status = 0;
    for agent in agents.all() {
        let _ = super::output::print(&format!("node {}:\n", agent.node));
        status = status.max(agent.print(args).await.unwrap_or_else(|e| {
            let _ = writeln!(io::stderr(), "{}: {e:#}", agent.node);
            NO_ANSWER
        }));
    }
    status
}

/// The pod that `--peer` names.
fn peer_pod(verb: &CliVerb) -> Option<&str> {
    match verb {
        CliVerb::Flows(flags) => {
            let peer = flags.peer.as_deref()?;
            peer.parse::<PeerNetworks>().is_err().then_some(peer)
        }
        _ => None,
    }
}

fn route(verb: &CliVerb) -> Result<Route, OtherNamespace> {
    let to_pod = |scope: &NamespaceFlags, pod: &str, changes: bool| {
        let pod = scope.pod(pod)?;
        Ok(Route::Pod { pod, changes })
    };
    Ok(match verb {
        // A watch never ends, so it can't be added up.
        CliVerb::Pods(flags) if flags.watch.watch => Route::Terminal,
        CliVerb::Drains(flags) if flags.watch => Route::Terminal,
        CliVerb::Flows(flags) if flags.watch.watch => Route::Terminal,
        CliVerb::Pods(_) | CliVerb::Drains(_) => Route::List,
        CliVerb::Flows(flags) => match &flags.pod {
            Some(pod) if OwnerRef::parse(pod).is_none() => {
                return to_pod(&flags.table.view.scope, pod, false);
            }
            // The pods of an owner may run on any node.
            _ => Route::List,
        },
        CliVerb::Drain(flags) => return to_pod(&flags.view.scope, &flags.pod, false),
        // The wait begins the pod's drain.
        CliVerb::Wait(flags) => return to_pod(&flags.view.scope, &flags.pod, true),
        CliVerb::Explain(flags) => return to_pod(&flags.view.scope, &flags.pod, false),
        CliVerb::Release(flags) => return to_pod(&flags.view.scope, &flags.pod, true),
        CliVerb::Doctor(flags) => match &flags.pod {
            Some(pod) => return to_pod(&flags.view.scope, pod, false),
            None => Route::EachNode,
        },
        // Each agent knows the drains of its node only, and percentiles can't be added up.
        CliVerb::Advise(_) | CliVerb::Version(_) => Route::EachNode,
        CliVerb::Top(_) => Route::Terminal,
        CliVerb::Agent(_)
        | CliVerb::InstallCri(_)
        | CliVerb::UninstallCri(_)
        | CliVerb::Completion(_)
        | CliVerb::Man(_) => Route::Nowhere,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plugin(args: &[&str]) -> Plugin {
        Plugin::parse(args.iter().map(OsString::from))
    }

    fn pod_of(plugin: &Plugin) -> Result<String, String> {
        match route(&plugin.verb) {
            Ok(Route::Pod { pod, .. }) => Ok(pod),
            Ok(_) => Err("it runs elsewhere".into()),
            Err(e) => Err(e.to_string()),
        }
    }

    #[test]
    fn the_program_is_the_plugin_by_its_name() {
        let is = |name: &str| Plugin::is_called_by(Some(OsStr::new(name)));
        assert!(is("/usr/local/bin/kubectl-ebb") && is("kubectl-ebb") && is("kubectl-ebb.exe"));
        assert!(!is("ebb") && !is("/opt/kubectl-ebb/ebb"));
        assert!(!Plugin::is_called_by(None));
    }

    #[test]
    fn the_clusters_flags_may_stand_anywhere_and_agents_do_not_get_them() {
        let p = plugin(&[
            "kubectl-ebb",
            "--context",
            "prod",
            "flows",
            "shop/web",
            "--node=a",
            "--port",
            "80",
        ]);
        assert_eq!(p.cluster.context.as_deref(), Some("prod"));
        assert_eq!(p.cluster.node.as_deref(), Some("a"));
        assert_eq!(p.cluster.agent_namespace, "ebb-system");
        assert_eq!(p.remote, ["flows", "shop/web", "--port", "80"]);
        assert_eq!(pod_of(&p), Ok("shop/web".into()));
    }

    #[test]
    fn the_namespace_of_the_flag_goes_to_the_api_server_and_to_the_agent() {
        for verb in ["flows", "explain", "wait", "release", "drain", "doctor"] {
            let p = plugin(&["kubectl-ebb", verb, "web-0", "-n", "shop"]);
            assert_eq!(pod_of(&p), Ok("shop/web-0".into()), "{verb}");
            assert_eq!(p.remote, [verb, "web-0", "-n", "shop"]);
            let other = plugin(&["kubectl-ebb", verb, "shop/web-0", "--namespace=test"]);
            assert!(pod_of(&other).is_err(), "{verb}");
            let all = plugin(&["kubectl-ebb", verb, "web-0", "-A"]);
            assert_eq!(pod_of(&all), Ok("web-0".into()), "{verb}");
        }
    }

    #[test]
    fn a_peer_that_is_no_address_is_a_pod_and_the_agents_get_its_addresses() {
        let of = |peer: &str| {
            let p = plugin(&["kubectl-ebb", "flows", "--peer", peer]);
            peer_pod(&p.verb).map(str::to_owned)
        };
        assert_eq!(of("shop/web").as_deref(), Some("shop/web"));
        for address in ["10.0.0.7", "10.0.0.0/8", "10.0.0.7,fd00::7"] {
            assert_eq!(of(address), None, "{address}");
        }
        let both = ["flows", "--peer", "shop/web", "--peer", "10.0.0.7,fd00::7"];
        let p = plugin(&[&["kubectl-ebb"], &both[..]].concat());
        assert_eq!(peer_pod(&p.verb), None, "the last one is obeyed");
    }

    #[test]
    fn a_verb_that_cuts_connections_needs_a_pod_that_the_api_server_knows() {
        let release = plugin(&["kubectl-ebb", "release", "shop/web"]);
        assert!(matches!(
            route(&release.verb).unwrap(),
            Route::Pod { changes: true, .. }
        ));
        let wait = plugin(&["kubectl-ebb", "wait", "shop/web"]);
        assert!(matches!(
            route(&wait.verb).unwrap(),
            Route::Pod { changes: true, .. }
        ));
        let watch = plugin(&["kubectl-ebb", "drains", "-w", "--node", "a"]);
        assert!(matches!(route(&watch.verb).unwrap(), Route::Terminal));
        let owner = plugin(&["kubectl-ebb", "flows", "deploy/web"]);
        assert!(matches!(route(&owner.verb).unwrap(), Route::List));
        let agent = plugin(&["kubectl-ebb", "man"]);
        assert!(matches!(route(&agent.verb).unwrap(), Route::Nowhere));
    }
}
