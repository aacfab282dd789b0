//! `cri.held500_rss_mib`: the memory of a proxy that holds many calls.
//!
//! The proxy is the real one, and each call is a StopContainer that it has taken in and asked about. The agent is
//! played: 500 pods with connections would take minutes to make, and the proxy knows the agent only by its words.
//! The containers do not exist, for the same reason; the calls are cancelled before the runtime hears of them.

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
    ebb::Proxy,
    figures::{AtMost, Figures, Target},
    lab::Lab,
    say,
};

const GRACE: Duration = Duration::from_secs(600);
const HOLDING: &str =
    "{\"type\":\"holding\",\"pod\":\"a-pod\",\"deadline_ms\":500000,\"reserve_ms\":5000}\n";

pub(crate) fn measure(lab: &Lab, figures: &mut Figures) -> Result<()> {
    let n = lab.extent.held;
    say(&format!("{n} calls held at once"));
    let directory = lab.node.directory("held")?;
    let socket = directory.join("agent.sock");
    let (idle, held) = lab.runtime.block_on(async {
        let holds = Arc::new(AtomicUsize::new(0));
        let listener = UnixListener::bind(&socket)?;
        let agent = tokio::spawn(play(listener, Arc::clone(&holds)));
        let proxy = Proxy::start(&lab.ebb, lab.node.socket(), &socket, &directory)?;
        let kubelet = lab.node.kubelet_at(&proxy.socket)?;
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
            "a call was let go"
        );
        // It serves others meanwhile.
        ensure!(kubelet.is_ready().await?, "the runtime is not ready");
        let held = proxy.resident()?;
        calls.shutdown().await;
        agent.abort();
        anyhow::Ok((idle, held))
    })?;
    let mib = |bytes: f64| bytes / (1024.0 * 1024.0);
    let what = "resident memory of the proxy before";
    figures.add("cri.idle_rss_mib", mib(idle), "MiB", what, Target::None)?;
    let what = "resident memory of the proxy while it holds that many calls";
    figures.add("cri.held500_rss_mib", mib(held), "MiB", what, AtMost(30.0))?;
    let what = "StopContainer calls held at once (the agent is played)";
    figures.add("cri.held500_calls", n as f64, "", what, Target::None)
}

/// An agent that has every call held, for as long as its caller stays. `holds` is how many are.
async fn play(listener: UnixListener, holds: Arc<AtomicUsize>) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        let holds = Arc::clone(&holds);
        tokio::spawn(async move {
            if let Ok(mut stream) = hold(stream).await {
                holds.fetch_add(1, Ordering::Relaxed);
                let _ = stream.read(&mut [0]).await;
                holds.fetch_sub(1, Ordering::Relaxed);
            }
        });
    }
}

/// Reads the request, whose body fits in one packet, and says that the call is held.
async fn hold(mut stream: UnixStream) -> Result<UnixStream> {
    let mut request = Vec::new();
    while !request.ends_with(b"}") {
        ensure!(stream.read_buf(&mut request).await? > 0, "no request");
    }
    ensure!(request.starts_with(b"POST /v1/holds "), "another request");
    let reply = format!(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{HOLDING}\r\n",
        HOLDING.len()
    );
    stream.write_all(reply.as_bytes()).await?;
    Ok(stream)
}
