//! Shows ebb's main job: stops a pod under load with a kubelet's calls, first to containerd directly, then through ebb.
//! `cargo xtask demo` starts it.

mod comparison;
mod ebb;
mod pictures;
mod round;
mod scene;
mod svg;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Parser;
use ebb_testkit::{Node, helpers, sandbox};

/// Show a pod stopped without ebb and with it.
#[derive(Parser)]
struct DemoArgs {
    /// The `ebb` binary. `ebb-cri-proxy` is in the same directory.
    #[arg(long)]
    ebb: PathBuf,
    /// Print one JSON document on standard output; progress goes to standard error.
    #[arg(long)]
    json: bool,
    /// Instead, write pictures of what ebb shows on a terminal to this directory.
    #[arg(long, value_name = "DIR", conflicts_with = "json")]
    pictures: Option<PathBuf>,
}

fn main() -> ExitCode {
    if let Some(code) = helpers::dispatch() {
        return code;
    }
    let arguments = DemoArgs::parse();
    sandbox::inside(|| match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("demo: {e:#}");
            ExitCode::FAILURE
        }
    })
}

fn run(arguments: &DemoArgs) -> Result<()> {
    tokio::runtime::Runtime::new()?.block_on(show(arguments))
}

async fn show(arguments: &DemoArgs) -> Result<()> {
    say("starting a node: containerd, runc, a bridge network; making images from local files");
    let node = Node::start().await?;
    if let Some(directory) = &arguments.pictures {
        return pictures::take(&node, &arguments.ebb, directory).await;
    }
    let without = without_ebb(&node).await.context("the round without ebb")?;
    let with = with_ebb(&node, arguments)
        .await
        .context("the round with ebb")?;
    let comparison = comparison::Comparison::new(&without, &with)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&comparison)?);
    } else {
        print!("{}", comparison.table());
    }
    comparison.check()
}

async fn without_ebb(node: &Node) -> Result<round::Round> {
    say("round 1: the kubelet calls containerd directly");
    round::play(node, &node.kubelet()?, "web-without", None).await
}

async fn with_ebb(node: &Node, arguments: &DemoArgs) -> Result<comparison::WithEbb> {
    say("round 2: ebb agent and ebb-cri-proxy start; the kubelet's calls go through the proxy");
    let mut ebb = ebb::Ebb::start(&arguments.ebb, node).await?;
    let kubelet = node.kubelet_at(ebb.cri_socket())?;
    let round = round::play(node, &kubelet, "web-with", Some(&ebb)).await?;
    let report = ebb.report("web-with").await?;
    if !arguments.json {
        say("`ebb drains` afterwards");
        eprint!("{}", ebb.table(&["drains"]).await?);
    }
    ebb.stop().await?;
    Ok(comparison::WithEbb { round, report })
}

/// Progress, on standard error.
fn say(what: &str) {
    eprintln!("--> {what}");
}
