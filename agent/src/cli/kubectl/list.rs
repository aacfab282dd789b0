//! Lists from all agents, printed as one.

use std::io::{self, Write as _};

use anyhow::Result;
use ebb_protocol::views::{DrainList, FlowList, PodList};
use futures_util::future::join_all;
use serde::de::DeserializeOwned;

use super::{
    super::{CliVerb, output::Document, output::TableFlags},
    NO_ANSWER,
    agents::{Agents, RemoteAgent},
};

/// A list that another node's can be appended to.
trait NodeList: Document + DeserializeOwned {
    fn append(&mut self, other: Self);

    /// Sorts a list that was put together from those of several agents, which are sorted, as the verb's flags say.
    fn sort_as(&mut self, verb: &CliVerb);
}

impl NodeList for PodList {
    fn append(&mut self, mut other: Self) {
        self.pods.append(&mut other.pods);
    }

    fn sort_as(&mut self, verb: &CliVerb) {
        if let CliVerb::Pods(flags) = verb {
            flags.sort(self);
        }
    }
}

impl NodeList for FlowList {
    fn append(&mut self, mut other: Self) {
        self.flows.append(&mut other.flows);
        self.untracked.append(&mut other.untracked);
    }

    fn sort_as(&mut self, verb: &CliVerb) {
        if let CliVerb::Flows(flags) = verb {
            flags.sort(self);
        }
    }
}

impl NodeList for DrainList {
    fn append(&mut self, mut other: Self) {
        self.drains.append(&mut other.drains);
    }

    fn sort_as(&mut self, _: &CliVerb) {
        // The newest first; the times are RFC 3339 in UTC.
        self.drains.sort_by(|a, b| b.started_at.cmp(&a.started_at));
    }
}

/// Prints the lists of all agents as one. Returns 0 if all answered.
pub(super) async fn run(verb: &CliVerb, agents: &Agents, args: &[String]) -> Result<u8> {
    match verb {
        CliVerb::Pods(flags) => print_all::<PodList>(&flags.table, verb, agents, args).await,
        CliVerb::Drains(flags) => print_all::<DrainList>(&flags.table, verb, agents, args).await,
        CliVerb::Flows(flags) => print_all::<FlowList>(&flags.table, verb, agents, args).await,
        _ => Ok(1),
    }
}

async fn print_all<T: NodeList>(
    table: &TableFlags,
    verb: &CliVerb,
    agents: &Agents,
    args: &[String],
) -> Result<u8> {
    let (list, status) = collect::<T>(agents, args).await;
    if let Some(mut list) = list {
        list.sort_as(verb);
        table.print(&list)?;
    }
    Ok(status)
}

/// The lists of all agents as one. An agent that does not answer is named on standard error.
async fn collect<T: NodeList>(agents: &Agents, args: &[String]) -> (Option<T>, u8) {
    let args = [args, &["--output".to_owned(), "json".to_owned()]].concat();
    let asked = agents.all().iter().map(|agent| ask::<T>(agent, &args));
    let nodes = agents.all().iter().map(|agent| agent.node.as_str());
    let (whole, failed) = joined(nodes.zip(join_all(asked).await));
    for (node, (_, why)) in &failed {
        let _ = writeln!(io::stderr(), "{node}: {why}");
    }
    let status = failed.iter().map(|(_, (status, _))| *status).max();
    (whole, status.unwrap_or(0))
}

/// The exit status of an agent that did not answer, and why.
type Failure = (u8, String);

/// The lists of the nodes as one, and the nodes whose agents did not answer.
fn joined<'a, T: NodeList>(
    answers: impl Iterator<Item = (&'a str, Result<T, Failure>)>,
) -> (Option<T>, Vec<(&'a str, Failure)>) {
    let mut whole: Option<T> = None;
    let mut failed = Vec::new();
    for (node, answer) in answers {
        match (answer, &mut whole) {
            (Ok(list), Some(whole)) => whole.append(list),
            (Ok(list), None) => whole = Some(list),
            (Err(failure), _) => failed.push((node, failure)),
        }
    }
    (whole, failed)
}

async fn ask<T: DeserializeOwned>(agent: &RemoteAgent, args: &[String]) -> Result<T, Failure> {
    let output = agent.output(args).await;
    let output = output.map_err(|e| (NO_ANSWER, format!("{e:#}")))?;
    if output.status != 0 {
        return Err((output.status, output.stderr.trim_end().to_owned()));
    }
    // Warnings, as of a policy that can't be read.
    let _ = io::stderr().write_all(output.stderr.as_bytes());
    serde_json::from_str(&output.stdout).map_err(|e| {
        (
            NO_ANSWER,
            format!("its answer is not valid: {e}; is it another version?"),
        )
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clap::Parser as _;
    use ebb_core::{
        drain_report::testing::report,
        flow::{Direction, FlowState},
        ids::{PodName, PodUid},
    };
    use ebb_protocol::views::{FlowView, Network, PodView, SCHEMA, UntrackedPod};

    use super::*;
    use crate::cli::Cli;

    fn pod(name: &str) -> PodName {
        PodName {
            uid: PodUid::new(name),
            namespace: "shop".into(),
            name: name.into(),
        }
    }

    /// The lists of three agents, one of which does not answer, joined and sorted by the flags of this command.
    fn list<T: NodeList>(lists: [T; 2], args: &[&str]) -> T {
        let away = (NO_ANSWER, "the agent is away".to_owned());
        let [a, b] = lists;
        let answers = [("a", Ok(a)), ("b", Err(away.clone())), ("c", Ok(b))];
        let (list, failed) = joined(answers.into_iter());
        assert_eq!(failed, [("b", away)]);
        let mut list = list.unwrap();
        let verb = Cli::parse_from([&["ebb"], args].concat()).verb;
        T::sort_as(&mut list, &verb);
        list
    }

    #[test]
    fn pods_of_several_nodes_are_one_list_by_name_or_by_the_column_of_the_flag() {
        let node = |pods: &[(&str, u64)]| PodList {
            schema: SCHEMA.into(),
            pods: pods
                .iter()
                .map(|(name, oldest_ms)| pod_view(name, *oldest_ms))
                .collect(),
        };
        let lists = || [node(&[("b", 2), ("d", 9)]), node(&[("a", 5), ("c", 1)])];
        let names = |args: &[&str]| list(lists(), args).names();
        assert_eq!(names(&["pods"]), ["shop/a", "shop/b", "shop/c", "shop/d"]);
        let oldest = names(&["pods", "--sort-by", "oldest"]);
        assert_eq!(oldest, ["shop/d", "shop/a", "shop/b", "shop/c"]);
    }

    #[test]
    fn flows_of_several_nodes_are_one_list_by_pod_or_by_the_column_of_the_flag() {
        let node = |flows: &[(&str, u64)], untracked: &str| FlowList {
            schema: SCHEMA.into(),
            flows: flows
                .iter()
                .map(|(pod, quiet_ms)| flow(pod, *quiet_ms))
                .collect(),
            untracked: vec![UntrackedPod {
                pod: pod(untracked),
                why: "runsc".into(),
            }],
        };
        let lists = || {
            [
                node(&[("b", 3), ("b", 1)], "x"),
                node(&[("a", 2), ("c", 4)], "y"),
            ]
        };
        let quiet = |args: &[&str]| {
            let list = list(lists(), args);
            assert_eq!(list.untracked.len(), 2);
            list.flows.iter().map(|f| f.quiet_ms).collect::<Vec<_>>()
        };
        // Each agent's own order within a pod stays.
        assert_eq!(quiet(&["flows"]), [2, 3, 1, 4]);
        assert_eq!(quiet(&["flows", "--sort-by", "quiet"]), [4, 3, 2, 1]);
    }

    #[test]
    fn drains_of_several_nodes_are_one_list_with_the_newest_first() {
        let node = |drains: &[(&str, &str)]| DrainList {
            schema: SCHEMA.into(),
            version: 1,
            drains: drains
                .iter()
                .map(|(name, time)| ebb_core::drain_report::Report {
                    pod: pod(name),
                    started_at: format!("2026-01-01T{time}.000Z"),
                    ..report(None)
                })
                .collect(),
        };
        let lists = [
            node(&[("b", "03:00:00"), ("d", "01:00:00")]),
            node(&[("a", "04:00:00"), ("c", "02:00:00")]),
        ];
        let list = list(lists, &["drains"]);
        let names: Vec<_> = list.drains.iter().map(|r| r.pod.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c", "d"]);
    }

    #[test]
    fn without_any_answer_there_is_no_list() {
        let away = (NO_ANSWER, "away".to_owned());
        let answers = [("a", Err(away))].into_iter();
        let (list, failed) = joined::<PodList>(answers);
        assert!(list.is_none() && failed.len() == 1);
    }

    fn pod_view(name: &str, oldest_ms: u64) -> PodView {
        PodView {
            pod: pod(name),
            network: Network::Pod,
            ips: vec![],
            labels: std::collections::BTreeMap::new(),
            containers: vec![],
            flows: None,
            peers: None,
            exempt: None,
            new_per_second: None,
            oldest_ms: Some(oldest_ms),
            oldest_is_at_least: false,
            untracked: None,
            warnings: vec![],
        }
    }

    fn flow(name: &str, quiet_ms: u64) -> FlowView {
        FlowView {
            pod: Arc::new(pod(name)),
            direction: Direction::Inbound,
            state: FlowState::Active,
            live: true,
            holds: true,
            exempt: None,
            local: "10.0.0.2:8080".parse().unwrap(),
            remote: "10.0.0.7:5000".parse().unwrap(),
            peer: None,
            age_ms: None,
            age_at_least_ms: None,
            quiet_ms,
            bytes_in: 0,
            bytes_out: 0,
            container: None,
        }
    }
}
