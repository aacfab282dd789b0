//! README.md and docs/: annotations, flags, exit statuses, commands, links.

use std::{collections::BTreeSet, fs, path::Path};

use clap::{CommandFactory as _, Parser as _};
use ebb::cli::{Cli, exit};
use ebb_core::policy::annotations;

use crate::{
    default,
    manifest::{read, repository},
};

/// The document with the whole table of annotations.
const POLICY: &str = "docs/policy.md";

/// All documents, by their paths in the repository.
pub(crate) fn documents() -> Vec<String> {
    let mut paths = vec![
        "README.md".into(),
        "ARCHITECTURE.md".into(),
        "deploy/README.md".into(),
    ];
    for folder in ["docs", "docs/decisions"] {
        for entry in fs::read_dir(repository().join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.ends_with(".md") {
                paths.push(format!("{folder}/{name}"));
            }
        }
    }
    paths
}

/// The cells of a document's table of annotations, without back-ticks and the empty ones at both ends.
fn policy_table(document: &str) -> Vec<Vec<String>> {
    let text = read(document);
    let rows = text
        .lines()
        .skip_while(|line| !line.starts_with("| annotation |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let row = row.trim_matches('|').replace('`', "");
        row.split('|').map(|cell| cell.trim().to_owned()).collect()
    })
    .collect()
}

#[test]
fn the_policy_table_names_every_annotation_and_no_other() {
    let known: BTreeSet<String> = annotations::KEYS
        .iter()
        .map(|key| format!("{}{key}", annotations::PREFIX))
        .collect();
    let table: BTreeSet<String> = policy_table(POLICY)
        .iter()
        .map(|cells| cells[0].clone())
        .collect();
    assert_eq!(table, known);

    // The documents name no other annotation either. `ebb.dev/v1` is the name of the JSON schema.
    for document in documents() {
        let text = read(&document);
        for (at, _) in text.match_indices(annotations::PREFIX) {
            let rest = &text[at..];
            let end = rest
                .find(|c: char| !(c.is_ascii_alphanumeric() || "./-".contains(c)))
                .unwrap_or(rest.len());
            let name = rest[..end].trim_end_matches(['.', '/']);
            assert!(
                name == ebb_protocol::views::SCHEMA || known.contains(name),
                "{document}: {name}"
            );
        }
    }
}

#[test]
fn the_readme_has_the_rows_and_the_defaults_of_the_policy_table() {
    let whole: Vec<[String; 2]> = policy_table(POLICY)
        .iter()
        .map(|cells| [cells[0].clone(), cells[2].clone()])
        .collect();
    let short: Vec<[String; 2]> = policy_table("README.md")
        .iter()
        .map(|cells| [cells[0].clone(), cells[1].clone()])
        .collect();
    assert_eq!(short, whole);
}

#[test]
fn the_policy_table_names_every_flag_with_its_default() {
    let command = Cli::command();
    let agent = command.find_subcommand("agent").unwrap();
    let flags: BTreeSet<String> = agent
        .get_arguments()
        .filter(|a| a.get_help_heading().is_some())
        .filter_map(|a| a.get_long().map(str::to_owned))
        .collect();
    let mut named = BTreeSet::new();
    for cells in policy_table(POLICY) {
        let Some(flag) = cells[1].strip_prefix("--") else {
            continue;
        };
        let of_clap = default("agent", flag);
        let shown = if of_clap.is_empty() { "none" } else { &of_clap };
        assert_eq!(cells[2], shown, "--{flag}");
        named.insert(flag.to_owned());
    }
    assert_eq!(named, flags);
}

#[test]
fn the_documented_exit_statuses_are_those_of_help() {
    assert!(
        read("docs/using.md").contains(&format!("```text\n{}\n```", exit::HELP)),
        "docs/using.md lacks this block:\n{}",
        exit::HELP
    );
}

#[test]
fn every_ebb_command_in_the_documents_is_accepted() {
    for document in ["README.md", "docs/using.md"] {
        let text = read(document);
        let commands = commands(&text);
        assert!(commands.len() >= 6, "{document}: {commands:?}");
    }
    for document in documents() {
        for command in commands(&read(&document)) {
            accepts(&document, command);
        }
    }
}

/// The commands of ebb in the shell blocks of a document.
fn commands(text: &str) -> Vec<&str> {
    text.split("```sh\n")
        .skip(1)
        .flat_map(|rest| rest.split("```").next().unwrap_or_default().lines())
        .filter(|line| line.starts_with("ebb ") || line.starts_with("ebb-cri-proxy "))
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .collect()
}

fn accepts(document: &str, command: &str) {
    let words = command.split_whitespace();
    let parsed = match command.starts_with("ebb ") {
        true => Cli::try_parse_from(words).map(drop),
        false => ebb_cri_proxy::ProxyCli::try_parse_from(words).map(drop),
    };
    parsed.unwrap_or_else(|e| panic!("{document}: {command}: {e}"));
}

#[test]
fn the_documents_link_to_files_and_headings_that_exist() {
    for document in documents() {
        let text = read(&document);
        let folder = Path::new(&document).parent().unwrap();
        for (at, _) in text.match_indices("](") {
            let link = text[at + 2..].split(')').next().unwrap();
            if link.starts_with("http") {
                continue;
            }
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match path {
                "" => repository().join(&document),
                path => repository().join(folder).join(path),
            };
            assert!(target.exists(), "{document}: {link}");
            if !heading.is_empty() {
                let target = fs::read_to_string(target).unwrap();
                let mut headings = target.lines().filter(|line| line.starts_with('#'));
                assert!(headings.any(|h| anchor(h) == heading), "{document}: {link}");
            }
        }
    }
}

/// The anchor that GitHub gives to a heading.
fn anchor(heading: &str) -> String {
    let words = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = words.replace(|c: char| !(c.is_alphanumeric() || " -_".contains(c)), "");
    kept.replace(' ', "-")
}
