//! Metrics and logs of a node whose pods drain: read by `promtool` and by a real Prometheus, and line by line.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};
use ebb_testkit::{http, kubelet::PodSpec, parts::Parts};
use libtest_mimic::Trial;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::{Child, Command},
};

use crate::{
    agent::{Agent, Proxy, agent},
    peer::Peer,
    scene::{SECOND, Scene, eventually, free_port, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("promtool_accepts_the_metrics_of_agent_and_proxy", formats),
        trial("a_prometheus_scrapes_them_and_runs_every_query", prometheus),
        trial("each_phase_of_a_drain_is_one_line_with_names", phases),
        trial("a_bad_log_level_is_refused_in_one_line", bad_level),
    ]
}

/// A pod of the Deployment `web`.
const POD: &str = "web-5d9c-abcde";

const OPEN_METRICS: &str = "application/openmetrics-text;version=1.0.0";

/// Lets a pod of a Deployment drain through the proxy, with one connection that ends after the settle phase.
async fn drain_once(scene: &Scene, agent: &Agent, proxy: &Proxy) -> Result<()> {
    let spec = PodSpec::new(POD)
        .label("pod-template-hash", "5d9c")
        .container(server("app", 8080));
    let pod = scene.run(spec).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let kubelet = scene.kubelet_at(proxy)?;
    let stopping = tokio::spawn(async move { kubelet.stop(&pod, 30 * SECOND).await });
    eventually("the drain phase begins", async || {
        let drains = agent.drains(POD).await?;
        Ok(drains.iter().any(|r| r.settled_ms.is_some()).then_some(()))
    })
    .await?;
    let draining = sample(agent, "ebb_draining_flows{state=\"").await?;
    ensure!(draining.len() == 7, "{draining:?}");
    ensure!(draining.iter().sum::<f64>() >= 1.0, "{draining:?}");
    ensure!(sample(agent, "ebb_proxy_held_calls").await? == [1.0]);
    drop(peer);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    Ok(())
}

/// An agent and a proxy, and a pod that has drained.
async fn ebb(scene: &Scene) -> Result<(Agent, Proxy)> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "500ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    drain_once(scene, &agent, &proxy).await?;
    Ok((agent, proxy))
}

/// The values of the series that begin so.
async fn sample(agent: &Agent, begins: &str) -> Result<Vec<f64>> {
    let (_, text) = scrape(agent, "").await?;
    let series = text.lines().filter(|line| line.starts_with(begins));
    let values = series.map(|line| Ok(line.rsplit(' ').next().unwrap_or_default().parse()?));
    values.collect()
}

/// The content type and the body of `/metrics`, with this Accept header, or none.
async fn scrape(agent: &Agent, accept: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, agent.port)).await?;
    let accept = match accept {
        "" => String::new(),
        accept => format!("Accept: {accept}\r\n"),
    };
    let request =
        format!("GET /metrics HTTP/1.1\r\nHost: ebb\r\n{accept}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await?;
    let (head, body) = reply.split_once("\r\n\r\n").context("no head")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    let mut lines = head.lines();
    let kind = lines.find_map(|line| line.strip_prefix("content-type: "));
    Ok((kind.context("no content type")?.to_owned(), body.to_owned()))
}

async fn formats(scene: Scene) -> Result<()> {
    let (agent, _proxy) = ebb(&scene).await?;
    let (kind, text) = scrape(&agent, "").await?;
    ensure!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    let mut promtool = Command::new(Parts::directory().join("usr/bin/promtool"))
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = promtool.stdin.take().context("no standard input")?;
    stdin.write_all(text.as_bytes()).await?;
    drop(stdin);
    let out = promtool.wait_with_output().await?;
    ensure!(out.status.success() && out.stderr.is_empty(), "{out:?}");
    let (kind, open_metrics) = scrape(&agent, OPEN_METRICS).await?;
    ensure!(kind.starts_with("application/openmetrics-text"), "{kind}");
    ensure!(open_metrics.ends_with("\n# EOF\n"));
    let names = |text: &str| -> Vec<String> {
        let series = text.lines().filter(|line| !line.starts_with('#'));
        let names = series.map(|line| line.rsplit_once(' ').map_or(line, |(name, _)| name));
        let mut names: Vec<_> = names.map(str::to_owned).collect();
        names.sort();
        names
    };
    // Other trials' pods come and go.
    let own = |text: &str| -> Vec<String> {
        let of_others = |name: &String| name.contains("namespace=") && !name.contains("\"web\"");
        names(text).into_iter().filter(|n| !of_others(n)).collect()
    };
    // A call that has just ended may be counted between two scrapes.
    eventually("both formats have the same series", async || {
        let (_, text) = scrape(&agent, "").await?;
        let (_, open_metrics) = scrape(&agent, OPEN_METRICS).await?;
        Ok((own(&text) == own(&open_metrics)).then_some(()))
    })
    .await?;
    for (series, value) in [
        (
            "ebb_proxy_calls_total{method=\"StopContainer\",outcome=\"ok\"}",
            1.0,
        ),
        ("ebb_proxy_holds_total{reason=\"drained\"}", 1.0),
        ("ebb_proxy_up", 1.0),
        ("ebb_runtime_up", 1.0),
        (
            "ebb_drains_total{namespace=\"default\",workload=\"web\",reason=\"drained\"}",
            1.0,
        ),
        (
            "ebb_flows_cut_total{namespace=\"default\",workload=\"web\"}",
            0.0,
        ),
        ("ebb_drain_settle_seconds_count", 1.0),
        ("ebb_drain_release_lag_seconds_count", 1.0),
        ("ebb_drain_hold_seconds_bucket{le=\"+Inf\"}", 1.0),
    ] {
        let values = sample(&agent, &format!("{series} ")).await?;
        ensure!(values == [value], "{series}: {values:?}");
    }
    let fds = sample(&agent, "process_open_fds ").await?;
    let counted = fs::read_dir(format!("/proc/{}/fd", agent.pid()?))?.count() as f64;
    ensure!((fds[0] - counted).abs() < 10.0, "{fds:?}, {counted}");
    Ok(())
}

/// A running Prometheus. Dropping it kills it.
struct Prometheus {
    _child: Child,
    address: SocketAddr,
}

impl Prometheus {
    /// Starts one that scrapes the agent every second, as the PodMonitor says, with the rules of `deploy`.
    async fn start(directory: &Path, agent: &Agent) -> Result<Self> {
        let deployed = |file| {
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../deploy/components/monitoring")
                .join(file)
        };
        let rules: Value = serde_saphyr::from_str(&fs::read_to_string(deployed("rules.yaml"))?)?;
        fs::write(directory.join("rules.yaml"), rules["spec"].to_string())?;
        let target = format!("127.0.0.1:{}", agent.port);
        let config = json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{
                "job_name": "ebb-system/ebb",
                "honor_labels": true,
                "static_configs": [{"targets": [target], "labels": {"node": "node-1", "namespace": "ebb-system"}}],
            }],
        });
        fs::write(directory.join("prometheus.yaml"), config.to_string())?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let child = Command::new(Parts::directory().join("usr/bin/prometheus"))
            .arg(format!(
                "--config.file={}",
                directory.join("prometheus.yaml").display()
            ))
            .arg(format!(
                "--storage.tsdb.path={}",
                directory.join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .current_dir(directory)
            .stdout(Stdio::null())
            .stderr(fs::File::create(directory.join("prometheus.log"))?)
            .kill_on_drop(true)
            .spawn()
            .context("starting Prometheus: run `cargo xtask setup`")?;
        Ok(Self {
            _child: child,
            address,
        })
    }

    async fn get(&self, path: &str) -> Result<Value> {
        let reply = http::get(self.address, path).await?;
        let reply: Value = serde_json::from_slice(&reply.body)?;
        ensure!(reply["status"] == "success", "{path}: {reply}");
        Ok(reply["data"].clone())
    }

    /// The series of a query, as `(labels, value)`.
    async fn query(&self, query: &str) -> Result<Vec<(Value, f64)>> {
        let query = serde_urlencoded::to_string([("query", query)])?;
        let data = self.get(&format!("/api/v1/query?{query}")).await?;
        let series = data["result"].as_array().context("no result")?.iter();
        let series = series.map(|s| {
            let value = s["value"][1].as_str().context("no value")?;
            Ok((s["metric"].clone(), value.parse()?))
        });
        series.collect()
    }
}

async fn prometheus(scene: Scene) -> Result<()> {
    let _other = scene.serve("other").await?;
    let (agent, _proxy) = ebb(&scene).await?;
    let directory = scene.directory("prometheus")?;
    let prometheus = Prometheus::start(&directory, &agent).await?;
    eventually("Prometheus has scraped the agent", async || {
        let up = prometheus.query("up").await.unwrap_or_default();
        Ok(up.first().is_some_and(|(_, up)| *up == 1.0).then_some(()))
    })
    .await?;
    let drains = prometheus
        .query("ebb_drains_total{workload=\"web\"}")
        .await?;
    let labels = json!({
        "__name__": "ebb_drains_total", "instance": format!("127.0.0.1:{}", agent.port), "job": "ebb-system/ebb",
        "namespace": "default", "node": "node-1", "reason": "drained", "workload": "web",
    });
    ensure!(drains == [(labels, 1.0)], "{drains:?}");
    let p50 = "histogram_quantile(0.5, ebb_drain_settle_seconds_bucket)";
    let settle = prometheus.query(p50).await?;
    // 0.5 s is the bound of a bucket.
    ensure!(
        settle.len() == 1 && (0.1..4.0).contains(&settle[0].1),
        "{settle:?}"
    );
    let deployed = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../deploy/components/monitoring/dashboard.yaml"
    );
    let map: Value = serde_saphyr::from_str(&fs::read_to_string(deployed)?)?;
    let dashboard: Value =
        serde_json::from_str(map["data"]["ebb.json"].as_str().context("no text")?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let mut empty = Vec::new();
    // A rate takes two scrapes.
    tokio::time::sleep(3 * SECOND).await;
    for panel in panels {
        for target in panel["targets"].as_array().context("no targets")? {
            let query = target["expr"].as_str().context("no query")?;
            let query = query
                .replace("$__rate_interval", "1m")
                .replace("$__range", "1m");
            let query = query.replace("$node", ".*").replace("$namespace", ".*");
            if prometheus.query(&query).await?.is_empty() {
                empty.push(query);
            }
        }
    }
    // Nothing was cut, forwarded unheld or failed, and there is no kubelet's process.
    let expected = |q: &String| q.ends_with("> 0") || q.contains("ebb_kubelet_uses_proxy");
    ensure!(empty.iter().all(expected), "{empty:?}");
    let rules = prometheus.get("/api/v1/rules").await?;
    let rules = rules["groups"][0]["rules"].as_array().context("no rules")?;
    ensure!(rules.len() >= 7, "{rules:?}");
    for rule in rules {
        ensure!(
            rule["health"] == "ok" && rule["state"] == "inactive",
            "{rule}"
        );
    }
    Ok(())
}

async fn phases(scene: Scene) -> Result<()> {
    let (agent, _proxy) = ebb(&scene).await?;
    let of = |log: &str| -> Vec<String> {
        let lines = log.lines().filter(|line| line.contains(POD));
        lines.map(str::to_owned).collect()
    };
    let name = format!("pod=default/{POD}");
    let lines = eventually("the drain has ended", async || {
        let lines = of(&fs::read_to_string(agent.log())?);
        Ok((lines.len() >= 3).then_some(lines))
    })
    .await?;
    for (line, phase) in lines
        .iter()
        .zip(["DrainStarted: ", "Settled: after ", "Drained: in "])
    {
        ensure!(line.contains(phase) && line.contains(&name), "{lines:#?}");
    }
    let proxy = fs::read_to_string(agent.run.with_extension("proxy.log"))?;
    let lines = of(&proxy);
    let [holding, ended] = &lines[..] else {
        anyhow::bail!("{lines:#?}");
    };
    ensure!(
        holding.contains("holding") && holding.contains("container=\"app\""),
        "{holding}"
    );
    ensure!(
        ended.contains("hold ended") && ended.contains("reason=\"drained\""),
        "{ended}"
    );
    ensure!(lines.iter().all(|line| line.contains(&name)), "{lines:#?}");
    // The start names version, addresses and policy.
    let log = fs::read_to_string(agent.log())?;
    let start = log
        .lines()
        .find(|line| line.contains("tracking TCP connections"));
    let start = start.context("no line about the start")?;
    let address = format!("0.0.0.0:{}", agent.port);
    for part in [
        env!("CARGO_PKG_VERSION"),
        &address,
        "policy=drain on, until zero, quiet 500ms,",
        "containerd",
    ] {
        ensure!(start.contains(part), "no {part} in {start}");
    }
    Ok(())
}

async fn bad_level(scene: Scene) -> Result<()> {
    let run = scene.directory("ebb")?;
    let refused = async |name: &str, value: &str| -> Result<String> {
        let mut command = agent(scene.node.socket(), &run);
        let out = command.env(name, value).output().await?;
        ensure!(out.status.code() == Some(2), "{out:?}");
        Ok(String::from_utf8(out.stderr)?)
    };
    let text = refused("EBB_LOG", "verbose").await?;
    ensure!(
        text.lines().count() == 1 && text.contains("\"verbose\" is not a level"),
        "{text}"
    );
    let text = refused("EBB_LOG_FORMAT", "xml").await?;
    ensure!(text.contains("auto, text or json"), "{text}");
    // Debug and JSON: every line is an object, and of ebb.
    let flags = ["--log-format", "json"];
    let mut command = agent(scene.node.socket(), &run);
    let log = run.with_extension("json.log");
    let mut child = command
        .args(flags)
        .args(["--http", &format!("127.0.0.1:{}", free_port())])
        .env("EBB_LOG", "debug")
        .stderr(fs::File::create(&log)?)
        .kill_on_drop(true)
        .spawn()?;
    let log = eventually("the agent has started", async || {
        let text = fs::read_to_string(&log)?;
        Ok(text.contains("tracking TCP connections").then_some(text))
    })
    .await?;
    child.kill().await?;
    for line in log.lines() {
        let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        let target = line["target"].as_str().context("no target")?;
        let is_debug = line["level"] == "DEBUG" || line["level"] == "TRACE";
        ensure!(target.starts_with("ebb") || !is_debug, "{line}");
    }
    Ok(())
}
