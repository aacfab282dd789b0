//! Measures what ebb costs, each value beside its baseline of the same run. `cargo xtask bench` starts it.

mod beside;
mod bpf;
mod churn;
mod cost;
mod cri;
mod ebb;
mod held;
mod idle_conns;
mod keepalive;
mod load;
mod machine;
mod many;
mod netns;
mod release;
mod results;
mod stats;
mod tcpstates;
mod testbed;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use ebb_testkit::{helpers, sandbox};
use serde_json::json;

use crate::{
    results::BenchResults,
    testbed::{Scale, Testbed},
};

/// Measure what ebb costs.
#[derive(Parser)]
#[command(name = "ebb-bench", max_term_width = 100)]
struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Subcommand)]
enum BenchCommand {
    /// Tracking connections, listing and releasing.
    Flows(MeasureOptions),
    /// The CRI proxy.
    Cri(MeasureOptions),
    /// Keep connections open, as a helper of a bench.
    #[command(hide = true)]
    Dial {
        server: SocketAddr,
        connections: usize,
    },
    /// Print TCP state changes, as a helper of a bench.
    #[command(hide = true)]
    Tcpstates,
}

#[derive(Args)]
struct MeasureOptions {
    /// The `ebb` binary.
    #[arg(long)]
    ebb: PathBuf,
    /// Print one JSON document on standard output; progress goes to standard error.
    #[arg(long)]
    json: bool,
    /// One pair instead of eleven, and less of everything: a test of the bench, not a measurement.
    #[arg(long)]
    quick: bool,
    /// Only these parts: cost, churn, keepalive, many, release; calls, held.
    #[arg(long, value_delimiter = ',', value_name = "PART")]
    only: Vec<String>,
}

/// A part of a bench, by its name.
type Part = (&'static str, fn(&Testbed, &mut BenchResults) -> Result<()>);

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
    match BenchArgs::parse().command {
        BenchCommand::Flows(options) => {
            sandbox::inside(|| exit_code(run(&options, "flows", FLOWS)))
        }
        BenchCommand::Cri(options) => sandbox::inside(|| exit_code(run(&options, "cri", CRI))),
        BenchCommand::Dial {
            server,
            connections,
        } => exit_code(idle_conns::dial(server, connections)),
        BenchCommand::Tcpstates => exit_code(tcpstates::run()),
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

fn run(options: &MeasureOptions, name: &'static str, parts: &[Part]) -> Result<()> {
    let scale = if options.quick {
        Scale::QUICK
    } else {
        Scale::FULL
    };
    say("starting a node: containerd, runc, a bridge network; making images from local files");
    let testbed = Testbed::start(&options.ebb, scale)?;
    let mut results = BenchResults::default();
    results.fact("bench", json!(name));
    results.fact("quick", json!(options.quick));
    results.fact("pairs", json!(scale.pairs));
    results.fact("machine", machine::facts());
    for (part, measure) in parts {
        if options.only.is_empty() || options.only.iter().any(|only| only == part) {
            measure(&testbed, &mut results).with_context(|| format!("measuring {part}"))?;
        }
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&results.json())?);
    } else {
        print!("{}", results.table());
    }
    Ok(())
}

/// Progress, on standard error.
fn say(what: &str) {
    eprintln!("--> {what}");
}
