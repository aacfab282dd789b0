//! The formats of `-o`, and where each part of the output goes: documents to standard output, notes to standard error.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use ebb_protocol::{
    table::{RenderedTable, TableStyle},
    views::{Diagnosis, DrainList, Explanation, PodList, Released},
};
use serde::Serialize;

use super::ConnectFlags;
use crate::host::doctor;

/// Flags of the verbs that print a document.
#[derive(Args)]
pub(super) struct ViewFlags {
    #[command(flatten)]
    pub(super) agent: ConnectFlags,
    /// The format of the output.
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: OutputFormat,
    #[command(flatten)]
    pub(super) scope: NamespaceFlags,
}

/// Flags of the verbs about pods.
#[derive(Args, Clone)]
pub(super) struct NamespaceFlags {
    /// Only pods of this namespace.
    #[arg(short, long, value_name = "NAMESPACE")]
    pub(super) namespace: Option<String>,
    /// Pods of all namespaces, which is the default.
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
}

/// `-n` names another namespace than the pod's name does.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{pod} is not in namespace {namespace}: give its name alone, or leave out -n")]
pub(super) struct OtherNamespace {
    pod: String,
    namespace: String,
}

/// Flags of the verbs that print a table.
#[derive(Args)]
pub(super) struct TableFlags {
    #[command(flatten)]
    pub(super) view: ViewFlags,
    /// Leave out the line with the names of the columns.
    #[arg(long)]
    pub(super) no_headers: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum OutputFormat {
    /// Aligned columns, for people.
    #[default]
    Table,
    /// The same with more columns.
    Wide,
    /// One JSON document, for programs (schema ebb.dev/v1).
    Json,
    /// The same document as YAML.
    Yaml,
    /// Each element of the list as JSON on a line of its own.
    Jsonl,
    /// Only NAMESPACE/NAME of each pod, one per line.
    Name,
}

/// What a verb prints.
pub(super) trait Document: Serialize {
    /// Its elements as JSON, one per line; the document itself if it is no list.
    fn lines(&self) -> serde_json::Result<Vec<String>> {
        Ok(vec![serde_json::to_string(self)?])
    }

    /// The pods that it is about, as `namespace/name`.
    fn names(&self) -> Vec<String>;

    /// The text for people.
    fn text(&self, style: TableStyle) -> RenderedTable;

    /// What [`Self::lines`] and [`Self::names`] leave out although nothing is known without it, as lines of text.
    fn left_out(&self) -> Vec<String> {
        vec![]
    }
}

impl OutputFormat {
    /// Prints `document` in this format.
    pub(super) fn print(self, document: &impl Document, no_headers: bool) -> Result<()> {
        print_table(&self.render(document, no_headers)?)
    }

    /// `document` in this format, and what to say beside it.
    pub(super) fn render(
        self,
        document: &impl Document,
        no_headers: bool,
    ) -> Result<RenderedTable> {
        let style = TableStyle {
            wide: self == Self::Wide,
            no_headers,
        };
        let elements = |elements: &[String]| RenderedTable {
            table: lines(elements),
            notes: document.left_out(),
        };
        Ok(match self {
            Self::Table | Self::Wide => document.text(style),
            Self::Json => plain(serde_json::to_string_pretty(document)? + "\n"),
            Self::Yaml => {
                let text = serde_saphyr::to_string(document);
                plain(text.context("can't write the answer as YAML")?)
            }
            Self::Jsonl => elements(&document.lines()?),
            Self::Name => elements(&document.names()),
        })
    }
}

impl NamespaceFlags {
    /// The pod's name or UID with its namespace, if `-n` gives one: the agent takes `NAMESPACE/NAME`.
    ///
    /// # Errors
    ///
    /// [`OtherNamespace`] if the name has another one.
    pub(super) fn pod(&self, pod: &str) -> Result<String, OtherNamespace> {
        match (&self.namespace, pod.split_once('/')) {
            (None, _) => Ok(pod.to_owned()),
            (Some(namespace), None) => Ok(format!("{namespace}/{pod}")),
            (Some(namespace), Some((own, _))) if namespace == own => Ok(pod.to_owned()),
            (Some(namespace), Some(_)) => Err(OtherNamespace {
                pod: pod.to_owned(),
                namespace: namespace.clone(),
            }),
        }
    }

    /// Whether pods of this namespace are wanted.
    pub(super) fn includes(&self, namespace: &str) -> bool {
        self.namespace
            .as_deref()
            .is_none_or(|only| only == namespace)
    }
}

impl ViewFlags {
    /// Prints `document` in the chosen format.
    pub(super) fn print(&self, document: &impl Document) -> Result<()> {
        self.output.print(document, false)
    }
}

impl TableFlags {
    /// Prints `document` in the chosen format.
    pub(super) fn print(&self, document: &impl Document) -> Result<()> {
        self.view.output.print(document, self.no_headers)
    }
}

fn lines(lines: &[String]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// Prints a table to standard output, and its notes to standard error, so that a program reads rows only.
pub(super) fn print_table(rendered: &RenderedTable) -> Result<()> {
    print(&rendered.table)?;
    print_notes(&rendered.notes);
    Ok(())
}

/// Prints lines to standard error. Without a reader they are of no use, so a failure is no error.
pub(super) fn print_notes(notes: &[String]) {
    let _ = io::stderr().write_all(lines(notes).as_bytes());
}

/// Writes to standard output.
pub(super) fn print(text: &str) -> Result<()> {
    write_out(text).map(drop)
}

/// Writes to standard output. False if the reader (`head`, a pager) has closed the pipe.
pub(super) fn write_out(text: &str) -> Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        written => Ok(written.map(|()| true)?),
    }
}

pub(super) fn each<T: Serialize>(items: &[T]) -> serde_json::Result<Vec<String>> {
    items.iter().map(serde_json::to_string).collect()
}

/// A text without notes.
pub(super) fn plain(text: String) -> RenderedTable {
    RenderedTable {
        table: text,
        ..RenderedTable::default()
    }
}

impl Document for PodList {
    fn lines(&self) -> serde_json::Result<Vec<String>> {
        each(&self.pods)
    }

    fn names(&self) -> Vec<String> {
        self.pods.iter().map(|p| p.pod.to_string()).collect()
    }

    fn text(&self, style: TableStyle) -> RenderedTable {
        ebb_protocol::table::pods(self, style)
    }
}

impl Document for DrainList {
    fn lines(&self) -> serde_json::Result<Vec<String>> {
        each(&self.drains)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.drains.iter().map(|r| r.pod.to_string()).collect();
        // A pod may have several drains.
        names.sort();
        names.dedup();
        names
    }

    fn text(&self, style: TableStyle) -> RenderedTable {
        ebb_protocol::table::drains(self, style)
    }
}

impl Document for Explanation {
    fn names(&self) -> Vec<String> {
        vec![self.pod.to_string()]
    }

    fn text(&self, _: TableStyle) -> RenderedTable {
        plain(super::explain::text(self))
    }
}

impl Document for Diagnosis {
    fn lines(&self) -> serde_json::Result<Vec<String>> {
        each(&self.checks)
    }

    fn names(&self) -> Vec<String> {
        self.pod.iter().cloned().collect()
    }

    fn text(&self, _: TableStyle) -> RenderedTable {
        plain(doctor::text(self))
    }
}

impl Document for Released {
    fn names(&self) -> Vec<String> {
        vec![self.report.pod.to_string()]
    }

    fn text(&self, _: TableStyle) -> RenderedTable {
        plain(super::release::text(&self.report))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_name_gets_the_namespace_of_the_flag() {
        let named = |namespace: Option<&str>, pod: &str| {
            let flags = NamespaceFlags {
                namespace: namespace.map(Into::into),
                all_namespaces: false,
            };
            flags.pod(pod).map_err(|e| e.to_string())
        };
        assert_eq!(named(None, "web"), Ok("web".into()));
        assert_eq!(named(None, "shop/web"), Ok("shop/web".into()));
        assert_eq!(named(Some("shop"), "web"), Ok("shop/web".into()));
        assert_eq!(named(Some("shop"), "shop/web"), Ok("shop/web".into()));
        let why = named(Some("test"), "shop/web").unwrap_err();
        assert!(
            why.starts_with("shop/web is not in namespace test"),
            "{why}"
        );
    }
}
