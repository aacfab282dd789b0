//! The main job of ebb on real input: a pod under load is stopped as a kubelet would, first straight at
//! containerd, then through ebb. `cargo xtask demo` starts it.

mod ebb;
mod outcome;
mod round;
mod scene;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Parser;
use ebb_node::{Node, helpers, sandbox};

/// What the demo is told by xtask.
#[derive(Parser)]
struct Arguments {
    /// The `ebb` binary.
    #[arg(long)]
    ebb: PathBuf,
    /// Print one JSON document on standard output; progress goes to standard error.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    if let Some(code) = helpers::dispatch() {
        return code;
    }
    let arguments = Arguments::parse();
    sandbox::inside(|| match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("demo: {e:#}");
            ExitCode::FAILURE
        }
    })
}

fn run(arguments: &Arguments) -> Result<()> {
    tokio::runtime::Runtime::new()?.block_on(show(arguments))
}

async fn show(arguments: &Arguments) -> Result<()> {
    say("starting a node: containerd, runc, a bridge network; making images from local files");
    let node = Node::start().await?;
    let without = without_ebb(&node).await.context("the round without ebb")?;
    let with = with_ebb(&node, arguments)
        .await
        .context("the round with ebb")?;
    let outcome = outcome::Outcome::new(&without, &with)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&outcome)?);
    } else {
        print!("{}", outcome.table());
    }
    outcome.check()
}

async fn without_ebb(node: &Node) -> Result<round::Round> {
    say("round 1: the pod is stopped straight at containerd");
    round::play(node, &node.kubelet()?, "web-without", None).await
}

async fn with_ebb(node: &Node, arguments: &Arguments) -> Result<outcome::WithEbb> {
    say(
        "round 2: ebb agent and ebb cri-proxy are started, the kubelet's calls go through the proxy",
    );
    let mut ebb = ebb::Ebb::start(&arguments.ebb, node).await?;
    let kubelet = node.kubelet_at(ebb.cri_socket())?;
    let round = round::play(node, &kubelet, "web-with", Some(&ebb)).await?;
    let report = ebb.report("web-with").await?;
    if !arguments.json {
        say("what `ebb drains` says afterwards");
        eprint!("{}", ebb.table(&["drains"]).await?);
    }
    ebb.stop().await?;
    Ok(outcome::WithEbb { round, report })
}

/// Progress, on standard error.
fn say(what: &str) {
    eprintln!("--> {what}");
}
