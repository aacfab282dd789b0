//! The proxy's log.

use std::{process::Command, time::Duration};

use serde_json::Value;

use super::{hold::*, support::*};

async fn until_logged(proxy: &ProxyProgram, parts: &[&str]) -> String {
    let line = |log: &str| {
        let mut lines = log.lines();
        let found = lines.find(|line| parts.iter().all(|part| line.contains(part)));
        found.map(str::to_owned)
    };
    soon(async {
        loop {
            if let Some(line) = line(&proxy.log()) {
                return line;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

/// Holds a stop and releases it.
async fn hold_once(proxy: &ProxyProgram) {
    let (_runtime, _seen) = Runtime::recording(&proxy.at("runtime.sock"));
    let (_agent, mut requests) = agent(&proxy.at("agent.sock"));
    let client = proxy.client().await;
    let call = tokio::spawn(async move { client.unary(STOP, &[], stop(30)).await });
    let mut hold = soon(requests.recv()).await.unwrap();
    hold.send(&holding(20_000, 5_000)).await;
    until_logged(proxy, &["holding"]).await;
    hold.send(&RELEASE).await;
    soon(call).await.unwrap();
}

#[tokio::test]
async fn the_start_and_both_ends_of_a_hold_are_one_line_each_with_names() {
    let proxy = ProxyProgram::start_after("export EBB_LOG=info").await;
    hold_once(&proxy).await;
    let runtime = proxy.at("runtime.sock").display().to_string();
    let listen = proxy.at("proxy.sock").display().to_string();
    let version = format!("version=\"{}\"", env!("CARGO_PKG_VERSION"));
    until_logged(&proxy, &["is serving", &version, &runtime, &listen]).await;
    let names = ["StopContainer c1", "pod=shop/web-1", "container=\"app\""];
    until_logged(
        &proxy,
        &[&names[..], &["hold ended", "reason=\"drained\""]].concat(),
    )
    .await;
    let holding = until_logged(&proxy, &[&names[..], &["holding", "longest="]].concat()).await;
    assert!(
        !holding.contains('\x1b'),
        "a file gets no colours: {holding}"
    );
    assert_eq!(proxy.log().lines().count(), 3, "{}", proxy.log());
}

#[tokio::test]
async fn each_line_is_an_object_if_the_format_is_json() {
    let script = "export EBB_LOG=debug EBB_LOG_FORMAT=json";
    let proxy = ProxyProgram::start_after(script).await;
    hold_once(&proxy).await;
    until_logged(&proxy, &["hold ended"]).await;
    let log = proxy.log();
    let lines: Vec<Value> = log
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let ended = lines.iter().find(|l| l["message"] == "hold ended").unwrap();
    assert_eq!(
        (&ended["pod"], &ended["level"]),
        (&"shop/web-1".into(), &"INFO".into())
    );
    assert!(ended["timestamp"].is_string(), "{ended}");
    // Other libraries' lines do not come with ebb's.
    for line in &lines {
        let target = line["target"].as_str().unwrap();
        assert!(target.starts_with("ebb"), "{line}");
    }
}

#[test]
fn a_bad_level_or_format_is_refused_in_one_line() {
    let run = |name: &str, value: &str| {
        let out = Command::new(env!("CARGO_BIN_EXE_ebb-cri-proxy"))
            .args(["--listen", "/nowhere/cri.sock"])
            .env(name, value)
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(2), "{out:?}");
        String::from_utf8(out.stderr).unwrap()
    };
    let text = run("EBB_LOG", "info,h2=loud");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(
        text.contains("EBB_LOG") && text.contains("\"loud\" is not a level"),
        "{text}"
    );
    assert!(run("EBB_LOG_FORMAT", "xml").contains("auto, text or json"));
}

#[test]
fn a_log_on_a_terminal_has_colours_unless_no_color_is_set() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use std::{fs::File, io::Read as _};

    for (no_color, coloured) in [("", true), ("1", false)] {
        let directory = tempfile::tempdir().unwrap();
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let name = ptsname(&terminal, Vec::new()).unwrap();
        let other = File::options()
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_ebb-cri-proxy"))
            .arg("--listen")
            .arg(directory.path().join("other.sock"))
            .env("NO_COLOR", no_color)
            .env_remove("EBB_LOG")
            .stderr(other)
            .spawn()
            .unwrap();
        let mut read = vec![0; 4096];
        let n = File::from(terminal).read(&mut read).unwrap();
        let text = String::from_utf8_lossy(&read[..n]).into_owned();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(text.contains("is serving"), "{text}");
        assert_eq!(text.contains('\x1b'), coloured, "{text}");
    }
}
