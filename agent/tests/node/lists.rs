//! What the lists of `ebb` print: filters, formats and where each line goes.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use ebb_protocol::views::{FlowView, PodList, PodView, SCHEMA, Versions};
use ebb_testkit::kubelet::PodSpec;
use libtest_mimic::Trial;
use tokio::process::Command;

use crate::{
    agent::{Agent, EBB},
    peer::Peer,
    scene::{NODE_V4, SECOND, Scene, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("pods_are_listed_by_label_in_every_format", pods),
        trial("flows_are_listed_by_state_peer_and_port", flows),
        trial("drains_are_listed_by_namespace_and_time", drains),
        trial("a_closed_pipe_is_no_error", closed_pipe),
        trial("completions_and_manual_pages_name_every_command", generated),
        trial("the_versions_of_agent_and_proxy_are_printed", versions),
    ]
}

/// The lines that a verb prints to standard output.
async fn lines(agent: &Agent, verb: &[&str]) -> Result<Vec<String>> {
    let text = agent.query(verb).await?;
    Ok(text.lines().map(str::to_owned).collect())
}

async fn pods(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    for (name, tier) in [("listed-a", "front"), ("listed-b", "back")] {
        let spec = PodSpec::new(name)
            .label("list", "ed")
            .label("tier", tier)
            .annotation("ebb.dev/untill", "idle")
            .container(server("app", 8080));
        scene.run(spec).await?;
    }
    let both = "list=ed";
    let names = lines(&agent, &["pods", "-l", both, "-o", "name"]).await?;
    ensure!(
        names == ["default/listed-a", "default/listed-b"],
        "{names:?}"
    );
    let one = lines(&agent, &["pods", "-l", "list=ed,tier!=back", "-o", "name"]).await?;
    ensure!(one == ["default/listed-a"], "{one:?}");
    for pod in ["listed-a", "default/listed-a", "listed-"] {
        let verb = ["pods", pod, "-l", "tier=front", "-o", "name"];
        let named = agent.verb(&verb).await?;
        match pod {
            "listed-" => ensure!(named.status.code() == Some(10), "{named:?}"),
            _ => ensure!(named.stdout == b"default/listed-a\n", "{named:?}"),
        }
    }
    let none = lines(&agent, &["pods", "-n", "elsewhere", "-o", "name"]).await?;
    ensure!(none.is_empty(), "{none:?}");

    // Warnings are no rows.
    let out = agent.verb(&["pods", "-l", both, "--no-headers"]).await?;
    let rows = String::from_utf8(out.stdout)?;
    ensure!(rows.lines().count() == 2, "{rows}");
    ensure!(
        rows.lines().all(|row| row.starts_with("default  ")),
        "{rows}"
    );
    let warnings = String::from_utf8(out.stderr)?;
    ensure!(
        warnings.lines().count() == 2 && warnings.contains("untill"),
        "{warnings}"
    );

    let wide = lines(&agent, &["pods", "-l", both, "-o", "wide"]).await?;
    ensure!(wide[0].ends_with("UID"), "{wide:?}");
    let list = |text: &str| -> Result<PodList> { Ok(serde_saphyr::from_str(text)?) };
    let yaml = agent.query(&["pods", "-l", both, "-o", "yaml"]).await?;
    let yaml = list(&yaml).with_context(|| yaml.clone())?;
    ensure!(yaml.pods.len() == 2 && yaml.schema == SCHEMA, "{yaml:?}");
    ensure!(yaml.pods[0].labels["tier"] == "front", "{yaml:?}");
    for line in lines(&agent, &["pods", "-l", both, "-o", "jsonl"]).await? {
        let pod: PodView = serde_json::from_str(&line)?;
        ensure!(pod.pod.name.starts_with("listed-"), "{line}");
    }
    let out = agent.verb(&["pods", "-l", "a in b"]).await?;
    ensure!(out.status.code() == Some(2), "{out:?}");
    Ok(())
}

async fn flows(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--idle-after", "1s"]).await?;
    let spec = PodSpec::new("filtered")
        .container(server("app", 8080))
        .container(server("side", 8081));
    let pod = scene.run(spec).await?;
    let _slow = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    let idle = Peer::served(pod.v4(8081)?).await?;
    tokio::time::sleep(2 * SECOND).await;
    let count = async |more: &[&str]| {
        let verb = [&["flows", "filtered", "--no-headers"], more].concat();
        Ok::<_, anyhow::Error>(lines(&agent, &verb).await?.len())
    };
    ensure!(count(&[]).await? == 2);
    ensure!(count(&["--port", "8080"]).await? == 1);
    ensure!(count(&["--state", "idle"]).await? == 1);
    ensure!(count(&["--state", "idle,awaiting"]).await? == 2);
    ensure!(count(&["--state", "backlog"]).await? == 0);
    ensure!(count(&["--peer", NODE_V4]).await? == 2);
    let peers = agent.flows("filtered").await?;
    let from_node = |f: &FlowView| f.peer.as_deref() == Some("node");
    ensure!(peers.iter().all(from_node), "{peers:?}");
    ensure!(count(&["--peer", "192.0.2.0/24"]).await? == 0);
    // No connection comes from the pod itself.
    ensure!(count(&["--peer", "default/filtered"]).await? == 0);
    ensure!(count(&["-n", "default", "--peer", "10.0.0.0/8"]).await? == 2);
    let quiet = [
        "flows",
        "filtered",
        "--no-headers",
        "--sort-by",
        "out",
        "-o",
        "wide",
    ];
    let rows = lines(&agent, &quiet).await?;
    ensure!(rows[0].ends_with("  side"), "it has answered: {rows:?}");
    let out = agent.verb(&["flows", "--peer", "no-such-pod"]).await?;
    let text = String::from_utf8(out.stderr)?;
    ensure!(
        !out.status.success() && text.contains("no-such-pod"),
        "{text}"
    );
    let out = agent.verb(&["flows", "--state", "busy"]).await?;
    ensure!(out.status.code() == Some(2), "{out:?}");
    drop(idle);
    Ok(())
}

async fn drains(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "300ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("drain-listed").await?;
    let stopped = scene.kubelet_at(&proxy)?.stop(&pod, 30 * SECOND).await;
    ensure!(stopped.error().is_none(), "{stopped:?}");
    let rows = lines(&agent, &["drains", "drain-listed", "--since", "1h"]).await?;
    ensure!(
        rows.len() == 2 && rows[0].contains("OPEN AT START"),
        "{rows:?}"
    );
    ensure!(rows[1].ends_with("drained"), "{rows:?}");
    // No drain and no such pod look alike.
    let typo = agent.verb(&["drains", "drain-lsited"]).await?;
    let note = String::from_utf8(typo.stderr)?;
    ensure!(note.starts_with("no drain of drain-lsited"), "{note}");
    let none = lines(&agent, &["drains", "--since", "0s", "--no-headers"]).await?;
    ensure!(none.is_empty(), "{none:?}");
    let none = lines(&agent, &["drains", "-n", "elsewhere", "-o", "name"]).await?;
    ensure!(none.is_empty(), "{none:?}");
    Ok(())
}

async fn closed_pipe(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    for verb in [
        &["pods"][..],
        &["drains", "-o", "json"],
        &["completion", "bash"],
        &["man"],
    ] {
        let mut command = Command::new(EBB);
        command.args(verb).env("EBB_AGENT", agent.socket());
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let out = command.stdout(writer).output().await?;
        // Other trials' pods may have warnings.
        let stderr = String::from_utf8_lossy(&out.stderr);
        ensure!(
            out.status.success() && !stderr.contains("pipe"),
            "{verb:?}: {out:?}"
        );
    }
    Ok(())
}

async fn generated(scene: Scene) -> Result<()> {
    const VERBS: [&str; 4] = ["agent", "drains", "install-cri", "completion"];
    let prints = async |verb: &[&str]| {
        let out = Command::new(EBB).args(verb).output().await?;
        ensure!(out.status.success(), "{verb:?}: {out:?}");
        Ok::<_, anyhow::Error>(String::from_utf8(out.stdout)?)
    };
    for shell in ["bash", "zsh", "fish"] {
        let script = prints(&["completion", shell]).await?;
        ensure!(VERBS.iter().all(|verb| script.contains(verb)), "{script}");
    }
    let page = prints(&["man"]).await?;
    ensure!(
        page.contains(".TH") && page.contains("Exit status"),
        "{page}"
    );
    let directory = scene.directory("man")?;
    let directory_name = directory.to_str().context("a path that is text")?;
    prints(&["man", "--out", directory_name]).await?;
    let pages: BTreeSet<_> = std::fs::read_dir(&directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    for verb in VERBS {
        let page = format!("ebb-{verb}.1");
        ensure!(pages.contains(&page), "{pages:?}");
    }
    ensure!(pages.contains("ebb.1"), "{pages:?}");
    Ok(())
}

async fn versions(scene: Scene) -> Result<()> {
    let own = Some(env!("CARGO_PKG_VERSION").to_owned());
    let agent = scene.agent(&[]).await?;
    let _proxy = scene.proxy(&agent).await?;
    let versions: Versions = agent.json(&["version"]).await?;
    ensure!(
        Some(&versions.ebb) == own.as_ref() && versions.agent == own,
        "{versions:?}"
    );
    // Other trials have proxies, too.
    ensure!(
        versions.proxies.iter().any(|proxy| proxy.version == own),
        "{versions:?}"
    );
    let text = agent.query(&["version"]).await?;
    ensure!(text.starts_with("ebb            "), "{text}");
    Ok(())
}
