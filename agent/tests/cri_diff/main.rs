//! The CRI proxy changes no reply: a script with every RPC of the CRI runs against a real containerd, directly and
//! through the proxy. One client records HTTP/2 as it is, the other is gRPC's C core. Each of three Debian releases'
//! containerds also gets one hold.
//!
//! Every trial on a node starts this executable again, as the outer process of a sandbox of its own. Needs
//! root and what `cargo xtask setup` fetches, and fails without them.

mod canon;
mod client;
mod foreign;
mod hold;
mod node;
mod proto;
mod script;

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, ensure};
use ebb_testkit::{helpers, sandbox};
use libtest_mimic::{Arguments, Trial};

use crate::node::Stack;

/// The variable that tells a child process what to run: `RELEASE/SCENARIO`.
const SCENARIO: &str = "EBB_CRI_DIFF";

/// Debian releases, and the containerd version that each must have.
const RELEASES: [(&str, &str); 3] = [("bookworm", "1.6."), ("trixie", "1.7."), ("forky", "2.")];

const SCENARIOS: [(&str, &str); 3] = [
    (
        "raw",
        "answers_a_raw_http2_client_the_same_through_the_proxy",
    ),
    (
        "foreign",
        "answers_the_grpc_c_core_the_same_through_the_proxy",
    ),
    ("hold", "gets_no_stop_of_a_pod_until_it_has_drained"),
];

fn main() -> ExitCode {
    if let Some(code) = helpers::dispatch() {
        return code;
    }
    if let Ok(scenario) = std::env::var(SCENARIO) {
        sandbox::end_with_parent();
        return sandbox::inside(|| match run(&scenario) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        });
    }
    let mut trials = vec![Trial::test("the_script_has_every_rpc_of_the_cri", || {
        Ok(proto::is_covered()?)
    })];
    for (release, _) in RELEASES {
        for (scenario, what) in SCENARIOS {
            let name = format!("containerd_of_{release}_{what}");
            trials.push(Trial::test(name, move || {
                let result = child(&format!("{release}/{scenario}"));
                result.map_err(|e| format!("{e:#}").into())
            }));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Runs a scenario in a process of its own.
fn child(scenario: &str) -> Result<()> {
    let me = std::env::current_exe()?;
    let out = Command::new(me).env(SCENARIO, scenario).output()?;
    ensure!(
        out.status.success(),
        "{}\n{}",
        out.status,
        String::from_utf8_lossy(&out.stderr).trim()
    );
    Ok(())
}

fn run(scenario: &str) -> Result<()> {
    let (release, scenario) = scenario.split_once('/').context("RELEASE/SCENARIO")?;
    let known = RELEASES.into_iter().find(|(name, _)| *name == release);
    let (_, version) = known.context("no such release")?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let node = node::start(release, version).await?;
        match scenario {
            "raw" => node::compare(&node, Stack::Http2).await,
            "foreign" => node::compare(&node, Stack::GrpcCore).await,
            "hold" => hold::held_until_drained(&node).await,
            _ => anyhow::bail!("no such scenario"),
        }
    })
}
