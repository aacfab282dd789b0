//! `cri`: the latency that the proxy adds to a call. Calls alternate between containerd's socket and the proxy's.
//!
//! Calls are made in batches with percentiles per batch: a disturbance of the machine then affects both ways of one
//! batch.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ebb_testkit::{
    image,
    kubelet::{Kubelet, PodSpec, StartedPod},
};
use k8s_cri::v1::{self as cri, runtime_service_client::RuntimeServiceClient};
use tonic::transport::Channel;

use crate::{
    ebb::ProxyProcess,
    results::{AtMost, BenchResults, Goal},
    say, stats,
    testbed::Testbed,
};

/// Goals: the most that the proxy may add to the median, in microseconds, and multiply the 99th percentile by.
const ADDED_US: f64 = 150.0;
const TIMES_AT_P99: f64 = 1.3;

/// The keys of a call: direct p50, proxy p50, direct p99, proxy p99, difference of the medians, ratio of the p99s.
type Keys = [&'static str; 6];

const VERSION: Keys = [
    "cri.direct_p50_us",
    "cri.proxy_p50_us",
    "cri.direct_p99_us",
    "cri.proxy_p99_us",
    "cri.added_p50_us",
    "cri.p99_ratio",
];

const LIST: Keys = [
    "cri.list200_direct_p50_us",
    "cri.list200_proxy_p50_us",
    "cri.list200_direct_p99_us",
    "cri.list200_proxy_p99_us",
    "cri.list200_added_p50_us",
    "cri.list200_p99_ratio",
];

type Client = RuntimeServiceClient<Channel>;

pub(crate) fn measure(testbed: &Testbed, results: &mut BenchResults) -> Result<()> {
    let directory = testbed.node.directory("cri")?;
    // No agent listens there. The proxy asks the agent about stops only.
    let no_agent = directory.join("agent.sock");
    let proxy = ProxyProcess::start(&testbed.ebb, testbed.node.socket(), &no_agent, &directory)?;
    let through = testbed
        .runtime
        .block_on(async { testbed.node.kubelet_at(&proxy.socket) })?;
    let (direct, through) = (testbed.kubelet.runtime(), through.runtime());

    say("Version, alternating between containerd and the proxy");
    let version = async |mut client: Client| {
        let reply = client.version(cri::VersionRequest::default()).await?;
        anyhow::ensure!(
            !reply.into_inner().runtime_name.is_empty(),
            "an empty reply"
        );
        Ok(())
    };
    let times = testbed
        .runtime
        .block_on(in_turn(testbed, &direct, &through, version))?;
    add(results, "Version", VERSION, &times)?;

    let n = testbed.scale.containers;
    say(&format!(
        "ListContainers with {n} containers, in the same way"
    ));
    let pod = testbed.run(&PodSpec::new("many-containers"))?;
    testbed
        .runtime
        .block_on(create(&testbed.kubelet, &pod, n))?;
    let list = async |mut client: Client| {
        let reply = client
            .list_containers(cri::ListContainersRequest::default())
            .await?;
        let listed = reply.into_inner().containers.len();
        anyhow::ensure!(listed == n, "{listed} containers instead of {n}");
        Ok(())
    };
    let times = testbed
        .runtime
        .block_on(in_turn(testbed, &direct, &through, list))?;
    add(results, "ListContainers", LIST, &times)?;
    let what = "containers in the list, created but not started";
    results.add("cri.list200_containers", n as f64, "", what, Goal::None)?;
    let calls = testbed.scale.calls as f64;
    let what = "calls of each method per way and batch";
    results.add("cri.calls", calls, "", what, Goal::None)
}

/// The percentiles of each batch, in microseconds.
#[derive(Default)]
struct Batches {
    p50: Vec<f64>,
    p99: Vec<f64>,
}

impl Batches {
    fn add(&mut self, times: &[f64]) -> Result<()> {
        self.p50.push(stats::percentile(times, 0.5)?);
        self.p99.push(stats::percentile(times, 0.99)?);
        Ok(())
    }
}

/// Latencies of calls to containerd and through the proxy.
#[derive(Default)]
struct Times {
    direct: Batches,
    proxy: Batches,
}

async fn in_turn(
    testbed: &Testbed,
    direct: &Client,
    proxy: &Client,
    call: impl AsyncFn(Client) -> Result<()>,
) -> Result<Times> {
    let mut times = Times::default();
    // The first call opens the connection.
    call(direct.clone()).await?;
    call(proxy.clone()).await?;
    for _ in 0..testbed.scale.pairs {
        let (mut of_direct, mut of_proxy) = (Vec::new(), Vec::new());
        for i in 0..testbed.scale.calls {
            for is_direct in [i % 2 == 0, i % 2 == 1] {
                let (client, times) = if is_direct {
                    (direct, &mut of_direct)
                } else {
                    (proxy, &mut of_proxy)
                };
                let started = Instant::now();
                call(client.clone()).await?;
                times.push(micros(started.elapsed()));
            }
        }
        times.direct.add(&of_direct)?;
        times.proxy.add(&of_proxy)?;
    }
    Ok(times)
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

fn add(results: &mut BenchResults, call: &str, keys: Keys, times: &Times) -> Result<()> {
    let [direct50, proxy50, direct99, proxy99, added, ratio] = keys;
    let Times { direct, proxy } = times;
    let (d50, p50) = (stats::median(&direct.p50)?, stats::median(&proxy.p50)?);
    let (d99, p99) = (stats::median(&direct.p99)?, stats::median(&proxy.p99)?);
    let more = proxy.p50.iter().zip(&direct.p50).map(|(p, d)| p - d);
    let more = stats::median(&more.collect::<Vec<_>>())?;
    let times99 = stats::ratio(&proxy.p99, &direct.p99)?;
    for (key, value, unit, what, target) in [
        (direct50, d50, "µs", "direct, median", Goal::None),
        (
            proxy50,
            p50,
            "µs",
            "through the proxy, median",
            AtMost(d50 + ADDED_US),
        ),
        (direct99, d99, "µs", "direct, 99th percentile", Goal::None),
        (
            proxy99,
            p99,
            "µs",
            "through the proxy, 99th percentile",
            AtMost(d99 * TIMES_AT_P99),
        ),
        (added, more, "µs", "added at the median", AtMost(ADDED_US)),
        (
            ratio,
            times99,
            "",
            "proxy ÷ direct at p99",
            AtMost(TIMES_AT_P99),
        ),
    ] {
        results.add(key, value, unit, format!("{call} {what}"), target)?;
    }
    Ok(())
}

/// Creates `n` containers in a pod and starts none: ListContainers returns them as well.
async fn create(kubelet: &Kubelet, pod: &StartedPod, n: usize) -> Result<()> {
    let status = cri::PodSandboxStatusRequest {
        pod_sandbox_id: pod.sandbox_id.clone(),
        verbose: false,
    };
    let mut runtime = kubelet.runtime();
    let status = runtime
        .pod_sandbox_status(status)
        .await?
        .into_inner()
        .status;
    let metadata = status.and_then(|status| status.metadata);
    let sandbox = cri::PodSandboxConfig {
        metadata: Some(metadata.context("a sandbox without a name")?),
        ..Default::default()
    };
    for i in 0..n {
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata {
                name: format!("container-{i}"),
                attempt: 0,
            }),
            image: Some(cri::ImageSpec {
                image: image::FIXTURE.into(),
                ..Default::default()
            }),
            labels: labels(pod, i),
            annotations: annotations(),
            ..Default::default()
        };
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.sandbox_id.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox.clone()),
        };
        runtime.create_container(request).await?;
    }
    Ok(())
}

/// The labels that a kubelet sets, so that the list has a realistic size.
fn labels(pod: &StartedPod, i: usize) -> std::collections::HashMap<String, String> {
    [
        ("io.kubernetes.container.name", format!("container-{i}")),
        ("io.kubernetes.pod.name", pod.spec.name.clone()),
        ("io.kubernetes.pod.namespace", pod.spec.namespace.clone()),
        ("io.kubernetes.pod.uid", pod.spec.uid.clone()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

fn annotations() -> std::collections::HashMap<String, String> {
    [
        ("io.kubernetes.container.hash", "6e2cbd8a"),
        ("io.kubernetes.container.restartCount", "0"),
        (
            "io.kubernetes.container.terminationMessagePath",
            "/dev/termination-log",
        ),
        ("io.kubernetes.container.terminationMessagePolicy", "File"),
        ("io.kubernetes.pod.terminationGracePeriod", "30"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}
