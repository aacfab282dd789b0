//! `kubectl ebb`: the same verbs for a whole cluster, from a workstation.
//!
//! The program `ebb` is this plugin when it is called `kubectl-ebb`. It finds the agents' pods through the API server and
//! runs each verb there, as `kubectl exec` does. A list comes from all agents as JSON, and is printed here as one; so do
//! the documents about nodes, such as that of `doctor`. A verb about one pod runs on that pod's node.

mod agents;
mod args;
mod exec;
mod find;
mod list;

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Result, bail};
use clap::{Args, FromArgMatches as _};
use ebb_protocol::filter::{OwnerRef, PeerNetworks};

use self::agents::{Agents, RemoteAgent};
use super::{
    Cli, CliVerb,
    output::{NamespaceFlags, OtherNamespace, TableFlags},
};

/// The name by which kubectl finds the plugin.
const NAME: &str = "kubectl-ebb";

/// The exit status of a command that some agent did not answer, as in [`super::exit::HELP`].
const NO_ANSWER: u8 = 9;

/// The exit status of a command whose pod no agent knows, or more than one.
const NO_MATCH: u8 = 10;

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
    /// On all nodes. Their lists become one, and other documents a list by node.
    AllNodes,
    /// On the node of this pod: its name, or `NAMESPACE/NAME`. If the verb changes something, the API server must know
    /// the pod.
    Pod { pod: String, changes: bool },
    /// On one node, until Ctrl-C: that of the pod, if there is one.
    Watch { pod: Option<String> },
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
            Route::AllNodes => list::run(&self.verb, &agents, &self.remote).await?,
            Route::Pod { pod, changes } => match agent_of(&agents, &pod, changes).await? {
                Ok(agent) => agent.print(&self.remote).await?,
                Err(status) => status,
            },
            Route::Watch { pod } => match watched_agent(&agents, pod.as_deref()).await? {
                Ok(agent) => agent.print_watch(&self.remote).await?,
                Err(status) => status,
            },
            Route::Terminal => agents.only()?.with_terminal(&self.remote).await?,
            Route::Nowhere => 1,
        };
        Ok(ExitCode::from(status))
    }
}

/// The agent of the pod's node. If none knows the pod, or more than one does, that has been printed, and the exit status is
/// returned.
async fn agent_of<'a>(
    agents: &'a Agents,
    pod: &str,
    changes: bool,
) -> Result<Result<&'a RemoteAgent, u8>> {
    match agents.of_pod(pod).await? {
        Some(agent) => Ok(Ok(agent)),
        None if changes => {
            bail!("the API server knows no pod {pod}; give its whole name, or NAMESPACE/NAME")
        }
        // A pod that is gone, or only the beginning of a name: an agent may know it.
        None => Ok(find::by_agents(agents, pod).await),
    }
}

/// The same for a watch. With one agent to choose from, the pod need not exist yet.
async fn watched_agent<'a>(
    agents: &'a Agents,
    pod: Option<&str>,
) -> Result<Result<&'a RemoteAgent, u8>> {
    match (agents.only(), pod) {
        (Err(_), Some(pod)) => agent_of(agents, pod, false).await,
        (only, _) => Ok(Ok(only?)),
    }
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
    let list = |table: &TableFlags, pod: &Option<String>, watch: bool| {
        // The pods of an owner may run on any node.
        let pod = pod.as_ref().filter(|pod| OwnerRef::parse(pod).is_none());
        let pod = pod.map(|pod| table.view.scope.pod(pod)).transpose()?;
        Ok(match (pod, watch) {
            // A watch never ends, so it can't be added up.
            (pod, true) => Route::Watch { pod },
            (Some(pod), false) => Route::Pod {
                pod,
                changes: false,
            },
            (None, false) => Route::AllNodes,
        })
    };
    Ok(match verb {
        CliVerb::Pods(flags) => return list(&flags.table, &flags.pod, flags.watch.watch),
        CliVerb::Flows(flags) => return list(&flags.table, &flags.pod, flags.watch.watch),
        CliVerb::Drains(flags) if flags.watch => return list(&flags.table, &flags.pod, true),
        // The pods of drains may be gone.
        CliVerb::Drains(_) => Route::AllNodes,
        CliVerb::Drain(flags) => return to_pod(&flags.view.scope, &flags.pod, false),
        // The wait begins the pod's drain.
        CliVerb::Wait(flags) => return to_pod(&flags.view.scope, &flags.pod, true),
        CliVerb::Explain(flags) => return to_pod(&flags.view.scope, &flags.pod, false),
        CliVerb::Release(flags) => return to_pod(&flags.view.scope, &flags.pod, true),
        CliVerb::Doctor(flags) => match &flags.pod {
            Some(pod) => return to_pod(&flags.view.scope, pod, false),
            None => Route::AllNodes,
        },
        CliVerb::Advise(_) | CliVerb::Version(_) => Route::AllNodes,
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
        let agent = plugin(&["kubectl-ebb", "man"]);
        assert!(matches!(route(&agent.verb).unwrap(), Route::Nowhere));
    }

    #[test]
    fn a_list_comes_from_all_nodes_unless_it_names_a_pod_or_is_a_watch() {
        let of = |args: &[&str]| route(&plugin(&[&["kubectl-ebb"], args].concat()).verb).unwrap();
        for verb in ["pods", "flows"] {
            assert!(matches!(of(&[verb]), Route::AllNodes), "{verb}");
            assert!(matches!(of(&[verb, "deploy/web"]), Route::AllNodes));
            let named = of(&[verb, "web-0", "-n", "shop"]);
            assert!(matches!(named, Route::Pod { pod, .. } if pod == "shop/web-0"));
        }
        assert!(matches!(of(&["drains", "shop/web-0"]), Route::AllNodes));
        for verb in ["doctor", "advise", "version"] {
            assert!(matches!(of(&[verb]), Route::AllNodes), "{verb}");
        }
        for verb in ["pods", "flows", "drains"] {
            assert!(matches!(of(&[verb, "-w"]), Route::Watch { pod: None }));
            let owner = of(&[verb, "-w", "deploy/web"]);
            assert!(matches!(owner, Route::Watch { pod: None }), "{verb}");
            let named = of(&[verb, "-w", "shop/web-0"]);
            let is_named = |pod: &str| pod == "shop/web-0";
            assert!(matches!(named, Route::Watch { pod: Some(pod) } if is_named(&pod)));
        }
    }
}
