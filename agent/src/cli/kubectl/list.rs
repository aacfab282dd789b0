//! Lists from all agents, printed as one, and the documents of all nodes.

use anyhow::Result;
use ebb_protocol::{
    table::{RenderedTable, TableStyle},
    views::{
        AdviceList, Diagnosis, DrainList, FlowList, NodeDocument, NodeDocuments, PodList, SCHEMA,
        Versions,
    },
};
use futures_util::future::join_all;
use serde::de::DeserializeOwned;

use super::{
    super::{
        CliVerb,
        output::{Document, OutputFormat, TableFlags, each, print_notes},
    },
    NO_ANSWER,
    agents::{Agents, RemoteAgent},
    exec::RemoteOutput,
};

/// A list that another node's can be appended to.
trait NodeList: Document + DeserializeOwned {
    fn append(&mut self, other: Self);

    /// Sorts a list that was put together from those of several agents, which are sorted, as the verb's flags say.
    fn sort_as(&mut self, verb: &CliVerb);

    /// Prints what the verb says about such a list on standard error.
    fn note(&self, _: &CliVerb) {}
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

    fn sort_as(&mut self, verb: &CliVerb) {
        if let CliVerb::Drains(flags) = verb {
            flags.sort(self);
        }
    }

    fn note(&self, verb: &CliVerb) {
        if let CliVerb::Drains(flags) = verb {
            flags.note_if_empty(self);
        }
    }
}

/// Prints the lists of all agents as one, or the document of each node. Returns 0 if all answered.
pub(super) async fn run(verb: &CliVerb, agents: &Agents, args: &[String]) -> Result<u8> {
    match verb {
        CliVerb::Pods(flags) => print_all::<PodList>(&flags.table, verb, agents, args).await,
        CliVerb::Drains(flags) => print_all::<DrainList>(&flags.table, verb, agents, args).await,
        CliVerb::Flows(flags) => print_all::<FlowList>(&flags.table, verb, agents, args).await,
        CliVerb::Advise(flags) => {
            let table = &flags.table;
            print_each::<AdviceList>(table.view.output, table.no_headers, agents, args).await
        }
        CliVerb::Doctor(flags) => {
            print_each::<Diagnosis>(flags.view.output, false, agents, args).await
        }
        CliVerb::Version(flags) => print_each::<Versions>(flags.output, false, agents, args).await,
        _ => Ok(1),
    }
}

async fn print_all<T: NodeList>(
    table: &TableFlags,
    verb: &CliVerb,
    agents: &Agents,
    args: &[String],
) -> Result<u8> {
    let (lists, status) = collect::<T>(agents, args).await;
    if let Some(list) = joined(lists, verb) {
        table.print(&list)?;
        list.note(verb);
    }
    Ok(status)
}

async fn print_each<T: Document + DeserializeOwned>(
    output: OutputFormat,
    no_headers: bool,
    agents: &Agents,
    args: &[String],
) -> Result<u8> {
    let (nodes, status) = collect::<T>(agents, args).await;
    let schema = SCHEMA.into();
    output.print(&NodeDocuments { schema, nodes }, no_headers)?;
    Ok(status)
}

/// The lists of the nodes as one.
fn joined<T: NodeList>(lists: Vec<NodeDocument<T>>, verb: &CliVerb) -> Option<T> {
    let lists = lists.into_iter().map(|list| list.document);
    let mut list = lists.reduce(|mut all, list| {
        all.append(list);
        all
    })?;
    list.sort_as(verb);
    Some(list)
}

impl<T: Document> Document for NodeDocuments<T> {
    fn lines(&self) -> serde_json::Result<Vec<String>> {
        each(&self.nodes)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.nodes.iter().flat_map(|n| n.document.names()).collect();
        // The pods of a workload may run on several nodes.
        names.sort();
        names.dedup();
        names
    }

    fn text(&self, style: TableStyle) -> RenderedTable {
        let mut all = RenderedTable::default();
        for NodeDocument { node, document } in &self.nodes {
            let RenderedTable { table, notes } = document.text(style);
            all.table += &format!("node {node}:\n{table}");
            let of_node = notes.into_iter().map(|note| format!("{node}: {note}"));
            all.notes.extend(of_node);
        }
        all
    }
}

/// The documents of all agents, and the highest exit status. An agent that does not answer is named on standard error.
async fn collect<T: DeserializeOwned>(
    agents: &Agents,
    args: &[String],
) -> (Vec<NodeDocument<T>>, u8) {
    let asked = agents.all().iter().map(|agent| ask::<T>(agent, args));
    let nodes = agents.all().iter().map(|agent| agent.node.as_str());
    let (documents, said, status) = sorted_out(nodes.zip(join_all(asked).await));
    print_notes(&said);
    (documents, status)
}

/// What an agent's `ebb` has printed.
pub(super) struct NodeAnswer<T> {
    /// Its document, or why there is none.
    pub(super) document: Result<T, String>,
    /// Its exit status.
    pub(super) status: u8,
    /// What it has written to standard error beside a document.
    stderr: String,
}

impl<T> NodeAnswer<T> {
    /// An answer with nothing on standard error beside its document.
    pub(super) const fn of(document: Result<T, String>, status: u8) -> Self {
        Self {
            document,
            status,
            stderr: String::new(),
        }
    }
}

/// The documents of the nodes, what else to say about each node, and the highest exit status.
fn sorted_out<'a, T>(
    answers: impl Iterator<Item = (&'a str, NodeAnswer<T>)>,
) -> (Vec<NodeDocument<T>>, Vec<String>, u8) {
    let (mut documents, mut said, mut highest) = (Vec::new(), Vec::new(), 0);
    for (node, answer) in answers {
        highest = highest.max(answer.status);
        match answer.document {
            Ok(document) => {
                said.extend(answer.stderr.lines().map(|line| format!("{node}: {line}")));
                let node = node.to_owned();
                documents.push(NodeDocument { node, document });
            }
            Err(why) => said.push(format!("{node}: {why}")),
        }
    }
    (documents, said, highest)
}

/// Runs a verb on an agent's node, and reads the document that it prints.
pub(super) async fn ask<T: DeserializeOwned>(
    agent: &RemoteAgent,
    args: &[String],
) -> NodeAnswer<T> {
    let args = [args, &["--output".to_owned(), "json".to_owned()]].concat();
    match agent.output(&args).await {
        Ok(output) => answer(output),
        Err(e) => NodeAnswer::of(Err(format!("{e:#}")), NO_ANSWER),
    }
}

fn answer<T: DeserializeOwned>(output: RemoteOutput) -> NodeAnswer<T> {
    let RemoteOutput {
        stdout,
        stderr,
        status,
    } = output;
    match serde_json::from_str(&stdout) {
        // With an error there may be a document: `ebb doctor` prints the checks of which some failed.
        Ok(document) => NodeAnswer {
            document: Ok(document),
            status,
            stderr,
        },
        Err(e) if status == 0 => {
            let why = format!("its answer is not valid: {e}; is it another version?");
            NodeAnswer::of(Err(why), NO_ANSWER)
        }
        Err(_) => NodeAnswer::of(Err(stderr.trim_end().to_owned()), status),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clap::Parser as _;
    use ebb_core::{
        drain_report::{ReleaseReason, Report, testing::report},
        flow::{Direction, FlowState},
        ids::{PodName, PodUid},
    };
    use ebb_protocol::views::{Check, CheckStatus, FlowView, Network, PodView, UntrackedPod};

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
        let [a, b] = lists;
        let answers = [("a", found(a)), ("b", away()), ("c", found(b))];
        let (lists, said, status) = sorted_out(answers.into_iter());
        assert_eq!((said, status), (vec!["b: it is away".into()], NO_ANSWER));
        joined(lists, &verb(args)).unwrap()
    }

    fn verb(args: &[&str]) -> CliVerb {
        Cli::parse_from([&["ebb"], args].concat()).verb
    }

    fn found<T>(document: T) -> NodeAnswer<T> {
        NodeAnswer::of(Ok(document), 0)
    }

    fn away<T>() -> NodeAnswer<T> {
        NodeAnswer::of(Err("it is away".into()), NO_ANSWER)
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
    fn drains_of_several_nodes_are_one_list_with_those_under_way_and_then_the_newest_first() {
        let over = Some(ReleaseReason::Drained);
        let node = |drains: &[(&str, &str, Option<ReleaseReason>, u64)]| DrainList {
            schema: SCHEMA.into(),
            version: 1,
            drains: drains
                .iter()
                .map(|(name, time, reason, held_ms)| Report {
                    pod: pod(name),
                    started_at: format!("2026-01-01T{time}.000Z"),
                    held_ms: *held_ms,
                    ..report(*reason)
                })
                .collect(),
        };
        let lists = || {
            [
                node(&[("b", "03:00:00", None, 1), ("d", "05:00:00", over, 1)]),
                // It began before the other one that is over, and ended later.
                node(&[("a", "04:00:00", None, 1), ("c", "04:59:00", over, 120_000)]),
            ]
        };
        let names = |args: &[&str]| {
            let list = list(lists(), args);
            let names: Vec<_> = list.drains.into_iter().map(|r| r.pod.name).collect();
            names.concat()
        };
        assert_eq!(names(&["drains"]), "abcd");
        assert_eq!(names(&["drains", "--sort-by", "held"]), "cabd");
    }

    #[test]
    fn without_any_answer_there_is_no_list() {
        let (lists, said, status) = sorted_out::<PodList>([("a", away())].into_iter());
        assert!(joined(lists, &verb(&["pods"])).is_none());
        assert_eq!((said.len(), status), (1, NO_ANSWER));
    }

    fn diagnosis() -> Diagnosis {
        Diagnosis {
            schema: SCHEMA.into(),
            pod: None,
            checks: vec![Check::new("kernel", CheckStatus::Fail, "too old")],
        }
    }

    #[test]
    fn the_documents_of_several_nodes_are_one_in_each_format() {
        let node = |node: &str| NodeDocument {
            node: node.into(),
            document: diagnosis(),
        };
        let all = NodeDocuments {
            schema: SCHEMA.into(),
            nodes: vec![node("a"), node("b")],
        };
        let json = serde_json::to_value(&all).unwrap();
        assert_eq!(json["nodes"][1]["node"], "b");
        assert_eq!(json["nodes"][1]["checks"][0]["name"], "kernel");
        let lines = all.lines().unwrap();
        assert!(
            lines.len() == 2 && lines[0].contains(r#""node":"a""#),
            "{lines:?}"
        );
        let text = all.text(TableStyle::default()).table;
        let of_one = diagnosis().text(TableStyle::default()).table;
        assert_eq!(text, format!("node a:\n{of_one}node b:\n{of_one}"));
    }

    #[test]
    fn a_verb_that_fails_may_still_have_a_document() {
        let of = |stdout: &str, stderr: &str, status| {
            answer::<Diagnosis>(RemoteOutput {
                stdout: stdout.into(),
                stderr: stderr.into(),
                status,
            })
        };
        let json = serde_json::to_string(&diagnosis()).unwrap();
        let failed = of(&json, "ebb: 1 of the checks failed\n", 11);
        let (documents, said, status) = sorted_out([("a", failed)].into_iter());
        assert_eq!((documents.len(), status), (1, 11));
        assert_eq!(said, ["a: ebb: 1 of the checks failed"]);
        let away = of("", "ebb: no agent\n", 9);
        assert_eq!(
            (away.document, away.status),
            (Err("ebb: no agent".into()), 9)
        );
        let other = of("ebb 2", "", 0);
        assert!(other.document.is_err() && other.status == NO_ANSWER);
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
