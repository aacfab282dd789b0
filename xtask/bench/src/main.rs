//! What ebb costs: each figure beside its baseline, both measured in the same run. `cargo xtask bench` starts it.

mod bpf;
mod churn;
mod cost;
mod cri;
mod crowd;
mod ebb;
mod figures;
mod held;
mod keepalive;
mod lab;
mod load;
mod machine;
mod many;
mod netns;
mod peer;
mod release;
mod stats;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use ebb_node::{helpers, sandbox};
use serde_json::json;

use crate::{
    figures::Figures,
    lab::{Extent, Lab},
};

/// What the bench is told by xtask.
#[derive(Parser)]
#[command(name = "ebb-bench", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Tracking connections, listing and releasing.
    Flows(Options),
    /// The CRI proxy.
    Cri(Options),
    /// Keeps connections open, for a bench.
    #[command(hide = true)]
    Dial {
        server: SocketAddr,
        connections: usize,
    },
    /// Prints state changes, for a bench.
    #[command(hide = true)]
    Peer,
}

#[derive(Args)]
struct Options {
    /// The `ebb` binary.
    #[arg(long)]
    ebb: PathBuf,
    /// Print one JSON document on standard output; progress goes to standard error.
    #[arg(long)]
    json: bool,
    /// Three pairs instead of eleven, and less of everything: whether it can be measured, not what it is.
    #[arg(long)]
    quick: bool,
    /// Only these parts: cost, churn, keepalive, many, release; calls, held.
    #[arg(long, value_delimiter = ',', value_name = "PART")]
    only: Vec<String>,
}

/// A part of a bench, by its name.
type Part = (&'static str, fn(&Lab, &mut Figures) -> Result<()>);

const FLOWS: &[Part] = &[
    ("cost", cost::measure),
    ("churn", churn::measure),
    ("keepalive", keepalive::measure),
    ("many", many::measure),
    ("release", release::measure),
];

const CRI: &[Part] = &[("calls", cri::measure), ("held", held::measure)];

fn main() -> ExitCode {
    if let Some(code) = helpers::dispatch() {
        return code;
    }
    let arguments = Arguments::parse();
    match arguments.what {
        What::Flows(options) => sandbox::inside(|| exit_code(run(&options, "flows", FLOWS))),
        What::Cri(options) => sandbox::inside(|| exit_code(run(&options, "cri", CRI))),
        What::Dial {
            server,
            connections,
        } => exit_code(crowd::dial(server, connections)),
        What::Peer => exit_code(peer::run()),
    }
}

fn exit_code(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options, name: &'static str, parts: &[Part]) -> Result<()> {
    let extent = if options.quick {
        Extent::QUICK
    } else {
        Extent::FULL
    };
    say("starting a node: containerd, runc, a bridge network; making images from local files");
    let lab = Lab::start(&options.ebb, extent)?;
    let mut figures = Figures::default();
    figures.fact("bench", json!(name));
    figures.fact("quick", json!(options.quick));
    figures.fact("pairs", json!(extent.pairs));
    figures.fact("machine", machine::facts());
    for (part, measure) in parts {
        if options.only.is_empty() || options.only.iter().any(|only| only == part) {
            measure(&lab, &mut figures).with_context(|| format!("measuring {part}"))?;
        }
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&figures.json())?);
    } else {
        print!("{}", figures.table());
    }
    Ok(())
}

/// Progress, on standard error.
fn say(what: &str) {
    eprintln!("--> {what}");
}
