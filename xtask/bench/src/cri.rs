//! `cri`: what the proxy adds to a call, direct and through it in turn.
//!
//! Calls are made in batches, and each batch has percentiles of its own: the machine is another one from moment to
//! moment, and what it does in a moment is in both percentiles of one batch.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ebb_node::{
    image,
    kubelet::{Kubelet, Pod, PodSpec},
};
use k8s_cri::v1::{self as cri, runtime_service_client::RuntimeServiceClient};
use tonic::transport::Channel;

use crate::{
    ebb::Proxy,
    figures::{AtMost, Figures, Target},
    lab::Lab,
    say, stats,
};

/// What may be added to the median, in microseconds, and the 99th percentile multiplied by.
const ADDED_US: f64 = 150.0;
const TIMES_AT_P99: f64 = 1.3;

/// The figures of a call: direct p50, proxy p50, direct p99, proxy p99, what is added, how many times.
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

pub(crate) fn measure(lab: &Lab, figures: &mut Figures) -> Result<()> {
    let directory = lab.node.directory("cri")?;
    // Nobody listens there: calls that are not stops ask nobody.
    let no_agent = directory.join("agent.sock");
    let proxy = Proxy::start(&lab.ebb, lab.node.socket(), &no_agent, &directory)?;
    let through = lab
        .runtime
        .block_on(async { lab.node.kubelet_at(&proxy.socket) })?;
    let (direct, through) = (lab.kubelet.runtime(), through.runtime());

    say("Version, straight at containerd and through the proxy in turn");
    let version = async |mut client: Client| {
        let reply = client.version(cri::VersionRequest::default()).await?;
        anyhow::ensure!(
            !reply.into_inner().runtime_name.is_empty(),
            "an empty reply"
        );
        Ok(())
    };
    let times = lab
        .runtime
        .block_on(in_turn(lab, &direct, &through, version))?;
    add(figures, "Version", VERSION, &times)?;

    let n = lab.extent.containers;
    say(&format!("ListContainers with {n} containers, likewise"));
    let pod = lab.run(&PodSpec::new("crowded"))?;
    lab.runtime.block_on(create(&lab.kubelet, &pod, n))?;
    let list = async |mut client: Client| {
        let reply = client
            .list_containers(cri::ListContainersRequest::default())
            .await?;
        let listed = reply.into_inner().containers.len();
        anyhow::ensure!(listed == n, "{listed} containers instead of {n}");
        Ok(())
    };
    let times = lab
        .runtime
        .block_on(in_turn(lab, &direct, &through, list))?;
    add(figures, "ListContainers", LIST, &times)?;
    let what = "containers listed, created and not started";
    figures.add("cri.list200_containers", n as f64, "", what, Target::None)?;
    let calls = lab.extent.calls as f64;
    let what = "calls of each kind each way in each batch";
    figures.add("cri.calls", calls, "", what, Target::None)
}

/// The percentiles of each batch in microseconds, one way.
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

/// Calls straight and through the proxy.
#[derive(Default)]
struct Times {
    direct: Batches,
    proxy: Batches,
}

async fn in_turn(
    lab: &Lab,
    direct: &Client,
    proxy: &Client,
    call: impl AsyncFn(Client) -> Result<()>,
) -> Result<Times> {
    let mut times = Times::default();
    // Connections are made by the first call.
    call(direct.clone()).await?;
    call(proxy.clone()).await?;
    for _ in 0..lab.extent.pairs {
        let (mut of_direct, mut of_proxy) = (Vec::new(), Vec::new());
        for i in 0..lab.extent.calls {
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

fn add(figures: &mut Figures, call: &str, keys: Keys, times: &Times) -> Result<()> {
    let [direct50, proxy50, direct99, proxy99, added, ratio] = keys;
    let Times { direct, proxy } = times;
    let (d50, p50) = (stats::median(&direct.p50)?, stats::median(&proxy.p50)?);
    let (d99, p99) = (stats::median(&direct.p99)?, stats::median(&proxy.p99)?);
    let more = proxy.p50.iter().zip(&direct.p50).map(|(p, d)| p - d);
    let more = stats::median(&more.collect::<Vec<_>>())?;
    let times99 = stats::ratio(&proxy.p99, &direct.p99)?;
    for (key, value, unit, what, target) in [
        (direct50, d50, "µs", "straight, median", Target::None),
        (
            proxy50,
            p50,
            "µs",
            "through the proxy, median",
            AtMost(d50 + ADDED_US),
        ),
        (
            direct99,
            d99,
            "µs",
            "straight, 99th percentile",
            Target::None,
        ),
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
            "proxy ÷ straight at p99",
            AtMost(TIMES_AT_P99),
        ),
    ] {
        figures.add(key, value, unit, format!("{call} {what}"), target)?;
    }
    Ok(())
}

/// Creates `n` containers in a pod, and starts none: a list shows them all the same.
async fn create(kubelet: &Kubelet, pod: &Pod, n: usize) -> Result<()> {
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

/// What a kubelet puts on every container, so that a list is as long as it would be.
fn labels(pod: &Pod, i: usize) -> std::collections::HashMap<String, String> {
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
