//! `cri.held500_rss_mib`: the memory of a proxy that holds many calls.
//!
//! The proxy is the real one, and each call is a StopContainer that it holds. The agent is a stand-in, because 500 pods
//! with connections would take minutes to make and the proxy needs only the agent's replies. For the same reason the
//! containers do not exist: the bench cancels the calls before the proxy forwards them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use k8s_cri::v1 as cri;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    task::JoinSet,
    time::sleep,
};
use tonic::Request;

use crate::{
    ebb::ProxyProcess,
    results::{AtMost, BenchResults, Goal},
    say,
    testbed::Testbed,
};

const GRACE: Duration = Duration::from_secs(600);
const HOLDING: &str = "{\"type\":\"holding\",\"pod\":\"a-pod\",\"deadline\":18446744073709551615,\"reserve_ms\":5000}\n";

pub(crate) fn measure(testbed: &Testbed, results: &mut BenchResults) -> Result<()> {
    let n = testbed.scale.held;
    say(&format!("{n} calls held at once"));
    let directory = testbed.node.directory("held")?;
    let socket = directory.join("agent.sock");
    let (idle, held) = testbed.runtime.block_on(async {
        let holds = Arc::new(AtomicUsize::new(0));
        let listener = UnixListener::bind(&socket)?;
        let agent = tokio::spawn(serve_holds(listener, Arc::clone(&holds)));
        let proxy = ProxyProcess::start(&testbed.ebb, testbed.node.socket(), &socket, &directory)?;
        let kubelet = testbed.node.kubelet_at(&proxy.socket)?;
        kubelet.is_ready().await?;
        let idle = proxy.resident()?;
        let mut calls = JoinSet::new();
        for i in 0..n {
            let mut runtime = kubelet.runtime();
            let mut request = Request::new(cri::StopContainerRequest {
                container_id: format!("{i:064x}"),
                timeout: i64::try_from(GRACE.as_secs())?,
            });
            request.set_timeout(GRACE + Duration::from_secs(120));
            calls.spawn(async move { runtime.stop_container(request).await });
        }
        let started = Instant::now();
        while holds.load(Ordering::Relaxed) < n {
            ensure!(
                started.elapsed() < Duration::from_secs(30),
                "not all calls are held"
            );
            sleep(Duration::from_millis(20)).await;
        }
        sleep(Duration::from_secs(1)).await;
        ensure!(
            calls.try_join_next().is_none() && holds.load(Ordering::Relaxed) == n,
            "a call was forwarded"
        );
        // The proxy serves other calls meanwhile.
        ensure!(kubelet.is_ready().await?, "the runtime is not ready");
        let held = proxy.resident()?;
        calls.shutdown().await;
        agent.abort();
        anyhow::Ok((idle, held))
    })?;
    let mib = |bytes: f64| bytes / (1024.0 * 1024.0);
    let what = "resident memory of the proxy without held calls";
    results.add("cri.idle_rss_mib", mib(idle), "MiB", what, Goal::None)?;
    let what = "resident memory of the proxy while it holds that many calls";
    results.add("cri.held500_rss_mib", mib(held), "MiB", what, AtMost(30.0))?;
    let what = "StopContainer calls held at once (the agent is a stand-in)";
    results.add("cri.held500_calls", n as f64, "", what, Goal::None)
}

/// An agent that holds every call until its caller disconnects. `holds` counts them.
async fn serve_holds(listener: UnixListener, holds: Arc<AtomicUsize>) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        let holds = Arc::clone(&holds);
        tokio::spawn(async move {
            if let Ok(mut stream) = grant_hold(stream).await {
                holds.fetch_add(1, Ordering::Relaxed);
                let _ = stream.read(&mut [0]).await;
                holds.fetch_sub(1, Ordering::Relaxed);
            }
        });
    }
}

/// Reads the request, whose body fits in one read, and replies `holding`.
async fn grant_hold(mut stream: UnixStream) -> Result<UnixStream> {
    let mut request = Vec::new();
    while !request.ends_with(b"}") {
        ensure!(stream.read_buf(&mut request).await? > 0, "no request");
    }
    ensure!(
        request.starts_with(b"POST /v1/holds "),
        "an unexpected request"
    );
    let reply = format!(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{HOLDING}\r\n",
        HOLDING.len()
    );
    stream.write_all(reply.as_bytes()).await?;
    Ok(stream)
}
