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
}

impl NodeList for PodList {
    fn append(&mut self, mut other: Self) {
        self.pods.append(&mut other.pods);
    }
}

impl NodeList for FlowList {
    fn append(&mut self, mut other: Self) {
        self.flows.append(&mut other.flows);
        self.untracked.append(&mut other.untracked);
    }
}

impl NodeList for DrainList {
    fn append(&mut self, mut other: Self) {
        self.drains.append(&mut other.drains);
    }
}

/// Prints the lists of all agents as one. Returns 0 if all answered.
pub(super) async fn run(verb: &CliVerb, agents: &Agents, args: &[String]) -> Result<u8> {
    match verb {
        CliVerb::Pods(flags) => {
            let sort = |list: &mut PodList| flags.sort(list);
            print_all(&flags.table, agents, args, sort).await
        }
        CliVerb::Drains(flags) => {
            // Each agent's are sorted by their start, newest first; the times are RFC 3339 in UTC.
            let newest_first = |list: &mut DrainList| {
                list.drains.sort_by(|a, b| b.started_at.cmp(&a.started_at));
            };
            print_all(&flags.table, agents, args, newest_first).await
        }
        CliVerb::Flows(flags) => {
            let sort = |list: &mut FlowList| flags.sort(list);
            print_all(&flags.table, agents, args, sort).await
        }
        _ => Ok(1),
    }
}

async fn print_all<T: NodeList>(
    table: &TableFlags,
    agents: &Agents,
    args: &[String],
    sort: impl FnOnce(&mut T),
) -> Result<u8> {
    let (list, status) = collect::<T>(agents, args).await;
    if let Some(mut list) = list {
        sort(&mut list);
        table.print(&list)?;
    }
    Ok(status)
}

/// The lists of all agents as one. An agent that does not answer is named on standard error.
async fn collect<T: NodeList>(agents: &Agents, args: &[String]) -> (Option<T>, u8) {
    let args = [args, &["--output".to_owned(), "json".to_owned()]].concat();
    let asked = agents.all().iter().map(|agent| ask::<T>(agent, &args));
    let mut whole: Option<T> = None;
    let mut status = 0;
    for (agent, answer) in agents.all().iter().zip(join_all(asked).await) {
        match (answer, &mut whole) {
            (Ok(list), Some(whole)) => whole.append(list),
            (Ok(list), None) => whole = Some(list),
            (Err((code, why)), _) => {
                let _ = writeln!(io::stderr(), "{}: {why}", agent.node);
                status = status.max(code);
            }
        }
    }
    (whole, status)
}

async fn ask<T: DeserializeOwned>(agent: &RemoteAgent, args: &[String]) -> Result<T, (u8, String)> {
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
