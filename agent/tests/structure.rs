//! The folders of `src` import each other in one direction only. See the table in `src/lib.rs`.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// The folders of this crate that each folder may import. Each row names only folders of rows above it, so there is no
/// cycle.
const MAY_IMPORT: [(&str, &[&str]); 9] = [
    ("linux", &[]),
    ("kernel", &["linux"]),
    ("pods", &["linux"]),
    ("drains", &["kernel", "linux", "pods"]),
    ("telemetry", &["kernel", "linux", "pods"]),
    ("host", &["kernel", "linux", "pods"]),
    (
        "server",
        &["drains", "host", "kernel", "linux", "pods", "telemetry"],
    ),
    (
        "app",
        &["drains", "kernel", "linux", "pods", "server", "telemetry"],
    ),
    (
        "cli",
        &[
            "app",
            "drains",
            "host",
            "kernel",
            "linux",
            "pods",
            "server",
            "telemetry",
        ],
    ),
];

const MAX_LAYERS: usize = 6;

type Graph = BTreeMap<String, BTreeMap<String, BTreeSet<PathBuf>>>;

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// The text without comments. A `//` in a string hides the rest of its line, which is no import.
fn code(text: &str) -> String {
    let lines = text.lines();
    lines
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n")
}

/// The first names after `crate::` in a path, or in each branch of `crate::{…}`.
fn imported(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || "_$:".contains(c)) {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        let mut branches = vec![];
        if let Some(tree) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut start = Some(0);
            for (i, c) in tree.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => start = Some(i + 1),
                    _ => {}
                }
                if let Some(from) = start
                    && !c.is_whitespace()
                    && c != ','
                {
                    branches.push(tree[from..].trim_start());
                    start = None;
                }
            }
        } else {
            branches.push(rest);
        }
        let name = |text: &str| {
            let is_name = |c: char| c.is_alphanumeric() || c == '_';
            text.chars().take_while(|c| is_name(*c)).collect::<String>()
        };
        found.extend(branches.into_iter().map(name).filter(|n| !n.is_empty()));
    }
    found
}

/// The imports between folders of `src`, and the files that contain them. Files of `src` itself are left out.
fn graph() -> Graph {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![];
    rust_files(&src, &mut files);
    let mut graph = Graph::new();
    for file in files {
        let below = file.strip_prefix(&src).unwrap();
        let [folder, _, ..] = below.iter().collect::<Vec<_>>()[..] else {
            continue;
        };
        let folder = folder.to_str().unwrap();
        let imports = graph.entry(folder.into()).or_default();
        for other in imported(&code(&fs::read_to_string(&file).unwrap())) {
            if other != folder {
                imports.entry(other).or_default().insert(below.to_owned());
            }
        }
    }
    graph
}

/// The number of folders in the longest chain of imports from this one, itself included. A cycle is an error.
fn layers(graph: &Graph, folder: &str, above: &mut Vec<String>) -> Result<usize, String> {
    if above.iter().any(|f| f == folder) {
        return Err(format!("{} → {folder} is a cycle", above.join(" → ")));
    }
    above.push(folder.to_owned());
    let mut deepest = 0;
    for other in graph.get(folder).into_iter().flat_map(BTreeMap::keys) {
        deepest = deepest.max(layers(graph, other, above)?);
    }
    above.pop();
    Ok(deepest + 1)
}

#[test]
fn each_folder_imports_only_what_it_may() {
    let graph = graph();
    let may: BTreeMap<_, _> = MAY_IMPORT.into_iter().collect();
    assert_eq!(
        graph.keys().map(String::as_str).collect::<BTreeSet<_>>(),
        may.keys().copied().collect(),
        "a new folder needs a row in MAY_IMPORT"
    );
    for (folder, imports) in &graph {
        for (other, files) in imports {
            assert!(
                may[folder.as_str()].contains(&other.as_str()),
                "{folder} must not import {other}, and does in {files:?}"
            );
        }
    }
}

#[test]
fn the_folders_have_no_cycle_and_at_most_six_layers() {
    let graph = graph();
    for folder in graph.keys() {
        let layers = layers(&graph, folder, &mut vec![]).unwrap_or_else(|e| panic!("{e}"));
        assert!(layers <= MAX_LAYERS, "{folder} has {layers} layers");
    }
}

#[test]
fn the_parser_finds_what_is_imported() {
    let text = "use crate::{\n    a::{x, y}, b,\n    c::d as e, // crate::comment\n};\nfn f() { crate::g::h(); $crate::no(); my_crate::no() }\npub(in crate::i) use crate::j::k;";
    let names = imported(&code(text));
    assert_eq!(
        names.iter().map(String::as_str).collect::<Vec<_>>(),
        ["a", "b", "c", "g", "i", "j"]
    );
}

/// The name that a line defines a type or trait by.
fn defined(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace().peekable();
    words.next_if(|word| word.starts_with("pub"));
    // `pub(in crate::a)` has two words.
    words.next_if(|word| word.ends_with(')'));
    words.next_if(|word| ["struct", "enum", "trait", "union"].contains(word))?;
    let name = words.next()?;
    let end = name.find(|c: char| !c.is_alphanumeric());
    Some(&name[..end.unwrap_or(name.len())])
}

#[test]
fn each_type_has_a_name_of_its_own_in_the_workspace() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut files = vec![];
    for folder in ["agent", "ebpf", "xtask"] {
        rust_files(&root.join(folder), &mut files);
    }
    let mut names = BTreeMap::<String, PathBuf>::new();
    for file in files {
        let is_test = |part: &std::ffi::OsStr| part == "tests" || part == "tests.rs";
        if file.iter().any(is_test) {
            continue;
        }
        let text = code(&fs::read_to_string(&file).unwrap());
        let shipped = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
        for name in shipped.lines().filter_map(defined) {
            if let Some(other) = names.insert(name.to_owned(), file.clone()) {
                panic!(
                    "{name} is defined in {} and {}",
                    other.display(),
                    file.display()
                );
            }
        }
    }
    assert!(
        names.contains_key("Machine") && names.len() > 500,
        "{}",
        names.len()
    );
}
