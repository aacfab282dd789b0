//! `ebb version`.

use anyhow::Result;
use clap::Args;
use ebb_core::format::one_line;
use ebb_protocol::{
    table::{RenderedTable, TableStyle},
    views::{ProxyVersion, SCHEMA, VersionView, Versions},
};

use super::{
    ConnectFlags,
    output::{Document, OutputFormat, plain},
};
use crate::host::{doctor::host_root, proxy};

#[derive(Args)]
pub(super) struct VersionFlags {
    #[command(flatten)]
    agent: ConnectFlags,
    /// The format of the output.
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: OutputFormat,
}

pub(super) async fn run(flags: &VersionFlags) -> Result<()> {
    let agent: Result<VersionView, _> = flags.agent.client().get_json("/v1/version").await;
    let (agent, agent_error) = match agent {
        Ok(view) => (Some(view.version), None),
        Err(e) => (None, Some(one_line(&e))),
    };
    let versions = Versions {
        schema: SCHEMA.into(),
        ebb: env!("CARGO_PKG_VERSION").into(),
        agent,
        agent_error,
        proxies: proxy::running(&host_root()),
    };
    flags.output.print(&versions, false)
}

fn text(v: &Versions) -> String {
    let mut lines = vec![format!("ebb            {}", v.ebb)];
    let agent = v.agent.clone().or_else(|| v.agent_error.clone());
    lines.push(format!("agent          {}", agent.unwrap_or_default()));
    if v.proxies.is_empty() {
        lines.push("ebb-cri-proxy  not running, or not visible from here".into());
    }
    for ProxyVersion {
        pid,
        version,
        error,
    } in &v.proxies
    {
        let version = version.clone().or_else(|| error.clone());
        let version = version.unwrap_or_default();
        lines.push(format!("ebb-cri-proxy  {version} (process {pid})"));
    }
    lines.join("\n") + "\n"
}

impl Document for Versions {
    fn names(&self) -> Vec<String> {
        vec![]
    }

    fn text(&self, _: TableStyle) -> RenderedTable {
        plain(text(self))
    }
}
