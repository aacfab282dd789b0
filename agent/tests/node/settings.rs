//! Settings that are well formed and wrong on this node, and sockets as users write them.

use std::{fs, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use ebb_testkit::{api_server::ApiServer, helpers::beside, kubelet::PodSpec};
use libtest_mimic::Trial;
use tokio::{process::Command, time::timeout};

use crate::{
    agent::{Agent, EBB, NODE_NAME, agent, proxy},
    scene::{SOON, Scene, eventually, free_port, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "sockets_may_be_written_as_in_the_kubelets_configuration",
            with_scheme,
        ),
        trial(
            "the_proxy_is_refused_as_the_runtime_of_an_agent_and_of_itself",
            own_sockets,
        ),
        trial("a_cgroup_root_that_is_none_is_named_in_the_log", no_cgroups),
        trial(
            "a_node_name_that_the_api_server_does_not_know_is_named_in_the_log",
            unknown_node,
        ),
        trial(
            "a_release_takes_whole_names_only_and_the_others_are_listed",
            candidates,
        ),
        trial(
            "install_cri_changes_nothing_if_no_runtime_answers",
            install_without_runtime,
        ),
    ]
}

/// Runs a command that must exit with this status. Returns what it prints to standard error.
async fn exits(mut command: Command, status: i32) -> Result<String> {
    command.kill_on_drop(true).env("EBB_LOG", "error");
    let out = timeout(SOON, command.output()).await;
    let out = out.context("it does not end")??;
    let text = String::from_utf8(out.stderr)?;
    ensure!(out.status.code() == Some(status), "{}: {text}", out.status);
    Ok(text)
}

async fn with_scheme(scene: Scene) -> Result<()> {
    let run = scene.directory("ebb")?;
    let url = |path: &std::path::Path| format!("unix://{}", path.display());
    let mut command = Command::new(EBB);
    command
        .args(["agent", "--kube", "off", "--run-dir"])
        .arg(&run)
        .args(["--cri-socket", &url(scene.node.socket())])
        .args(["--http", &format!("127.0.0.1:{}", free_port())])
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let _agent = command.spawn()?;
    let socket = url(&run.join("agent.sock"));
    eventually("the agent answers", async || {
        let mut pods = Command::new(EBB);
        pods.args(["pods", "--agent", &socket]);
        Ok(pods.output().await?.status.success().then_some(()))
    })
    .await?;
    let mut command = Command::new(beside(EBB, "ebb-cri-proxy"));
    command
        .args(["--listen", "unix://cri.sock"])
        .current_dir(&run);
    let text = exits(command, 2).await?;
    ensure!(text.contains("absolute path"), "{text}");
    ensure!(!run.join("unix:").exists());
    Ok(())
}

async fn own_sockets(scene: Scene) -> Result<()> {
    let ebb = scene.agent(&[]).await?;
    let served = scene.proxy(&ebb).await?;
    let run = scene.directory("other")?;
    let text = exits(agent(&served.socket, &run), 2).await?;
    ensure!(
        text.contains("--cri-socket") && text.contains("ebb-cri-proxy"),
        "{text}"
    );
    let socket = run.join("cri.sock");
    let text = exits(proxy(&socket, &socket, &ebb.socket()), 2).await?;
    ensure!(
        text.contains("--runtime") && text.contains("cri.sock"),
        "{text}"
    );
    ensure!(!socket.exists(), "the socket stays");
    // By another name.
    let link = run.join("link.sock");
    std::os::unix::fs::symlink(&socket, &link)?;
    exits(proxy(&link, &socket, &ebb.socket()), 2).await?;
    Ok(())
}

/// Waits until the agent has logged a line with all of `parts`.
async fn logged(agent: &Agent, parts: &[&str]) -> Result<()> {
    eventually("the agent logs it", async || {
        let log = fs::read_to_string(agent.log())?;
        let mut lines = log.lines();
        let found = lines.any(|line| parts.iter().all(|part| line.contains(part)));
        Ok(found.then_some(()))
    })
    .await
}

async fn no_cgroups(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--cgroup-root", "/etc"]).await?;
    logged(&agent, &["WARN", "--cgroup-root /etc"]).await?;
    agent.stop().await
}

async fn unknown_node(scene: Scene) -> Result<()> {
    scene.serve("somewhere").await?;
    let api = ApiServer::start(([127, 0, 0, 1], free_port()).into()).await?;
    let known = PodSpec::new("somewhere-else").container(server("app", 8080));
    api.create(&known, NODE_NAME);
    let agent = scene
        .agent_with_api(&api, &["--node-name", "node-of-nowhere"])
        .await?;
    logged(&agent, &["WARN", "node-of-nowhere", "--node-name"]).await?;
    agent.stop().await
}

async fn candidates(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    for name in ["many-0", "many-1"] {
        scene.serve(name).await?;
    }
    let out = agent.verb(&["flows", "many"]).await?;
    ensure!(out.status.code() == Some(10), "{out:?}");
    let text = String::from_utf8(out.stderr)?;
    let lines: Vec<_> = text.lines().collect();
    ensure!(
        lines[0].starts_with("ebb: \"many\" matches 2 pods"),
        "{text}"
    );
    ensure!(
        lines[1..] == ["  default/many-0", "  default/many-1"],
        "{text}"
    );
    let out = agent.verb(&["release", "many"]).await?;
    ensure!(out.status.code() == Some(10), "{out:?}");
    let text = String::from_utf8(out.stderr)?;
    ensure!(text.contains("no pod on this node is called"), "{text}");
    agent.stop().await
}

async fn install_without_runtime(scene: Scene) -> Result<()> {
    let installs = |runtime: String| {
        let mut command = Command::new(EBB);
        command.args(["install-cri", "--dry-run", "--runtime", &runtime]);
        command
    };
    // A dry run on this host: nothing is written either way.
    let socket = scene.node.socket().display();
    exits(installs(format!("unix://{socket}")), 0).await?;
    let nowhere = scene.directory("run")?.join("nowhere.sock");
    let text = exits(installs(nowhere.display().to_string()), 5).await?;
    ensure!(
        text.contains("nothing was changed") && text.contains("nowhere.sock"),
        "{text}"
    );
    let text = exits(installs("/var/run/ebb/cri.sock".into()), 12).await?;
    ensure!(text.contains("the proxy's own socket"), "{text}");
    let text = exits(installs("containerd.sock".into()), 2).await?;
    ensure!(text.contains("absolute path"), "{text}");
    Ok(())
}
