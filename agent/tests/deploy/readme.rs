//! README.md: annotations, flags, exit statuses, commands.

use std::collections::BTreeSet;

use clap::{CommandFactory as _, Parser as _};
use ebb::{cli::Cli, drain::policy::annotations, exit};

use crate::{default, manifest::read};

/// The cells of README's policy table: annotation, flag, default; without back-ticks.
fn policy_table() -> Vec<[String; 3]> {
    let readme = read("README.md");
    let rows = readme
        .lines()
        .skip_while(|line| !line.starts_with("| annotation |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let cells: Vec<String> = row.split('|').map(|c| c.trim().replace('`', "")).collect();
        [cells[1].clone(), cells[2].clone(), cells[3].clone()]
    })
    .collect()
}

#[test]
fn the_readme_names_every_annotation_and_no_other() {
    let known: BTreeSet<String> = annotations::KEYS
        .iter()
        .map(|key| format!("{}{key}", annotations::PREFIX))
        .collect();
    let table: BTreeSet<String> = policy_table()
        .into_iter()
        .map(|[annotation, ..]| annotation)
        .filter(|annotation| !annotation.is_empty())
        .collect();
    assert_eq!(table, known);

    // Elsewhere in the text, too. `ebb.dev/v1` is the name of the JSON schema.
    for document in ["README.md", "ARCHITECTURE.md", "deploy/README.md"] {
        for (at, _) in read(document).match_indices(annotations::PREFIX) {
            let text = read(document);
            let rest = &text[at..];
            let end = rest
                .find(|c: char| !(c.is_ascii_alphanumeric() || "./-".contains(c)))
                .unwrap_or(rest.len());
            let name = rest[..end].trim_end_matches(['.', '/']);
            assert!(
                name == ebb::report::view::SCHEMA || known.contains(name),
                "{document}: {name}"
            );
        }
    }
}

#[test]
fn the_readme_names_every_policy_flag_with_its_default() {
    let command = Cli::command();
    let agent = command.find_subcommand("agent").unwrap();
    let flags: BTreeSet<String> = agent
        .get_arguments()
        .filter(|a| a.get_help_heading().is_some())
        .filter_map(|a| a.get_long().map(str::to_owned))
        .collect();
    let mut named = BTreeSet::new();
    for [_, flag, value] in policy_table() {
        let Some(flag) = flag.strip_prefix("--") else {
            continue;
        };
        let of_clap = default("agent", flag);
        let shown = if of_clap.is_empty() { "none" } else { &of_clap };
        assert_eq!(value, shown, "--{flag}");
        named.insert(flag.to_owned());
    }
    assert_eq!(named, flags);
}

#[test]
fn the_readmes_exit_statuses_are_those_of_help() {
    let readme = read("README.md");
    assert!(
        readme.contains(&format!("```text\n{}\n```", exit::HELP)),
        "README.md has not this block:\n{}",
        exit::HELP
    );
}

#[test]
fn every_ebb_command_in_the_readme_is_accepted() {
    let readme = read("README.md");
    let commands: Vec<&str> = readme
        .split("```sh\n")
        .skip(1)
        .flat_map(|rest| rest.split("```").next().unwrap_or_default().lines())
        .filter(|line| line.starts_with("ebb "))
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .collect();
    assert!(commands.len() >= 6, "{commands:?}");
    for command in commands {
        Cli::try_parse_from(command.split_whitespace())
            .map(drop)
            .unwrap_or_else(|e| panic!("{command}: {e}"));
    }
}
