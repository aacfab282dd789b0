//! Callers of the wait endpoints can't keep others from waiting.

use std::net::{SocketAddr, TcpStream};

use anyhow::{Result, ensure};
use ebb_testkit::http;
use libtest_mimic::Trial;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::time::{Instant, sleep};

use crate::{
    peer::Peer,
    scene::{ExclusiveScene, NODE_V4, SECOND, SOON, eventually, run, trial_alone},
    track::dial,
    wait_port::{annotated, until_listening},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial_alone(
            "a_thousand_unfinished_requests_do_not_delay_other_callers",
            slowloris,
        ),
        trial_alone("a_pod_may_have_sixteen_waits_at_a_time", too_many),
    ]
}

async fn slowloris(scene: ExclusiveScene) -> Result<()> {
    const CALLERS: usize = 1000;
    // The callers' sockets belong to this process.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            ..limit
        },
    )?;
    let agent = scene.agent_in("ebb", &["--quiet", "300ms"]).await?;
    let bad = run(&scene.node, annotated("slowloris")).await?;
    let good = run(&scene.node, annotated("prompt")).await?;
    let (own, other) = (until_listening(&bad).await?, until_listening(&good).await?);
    let kubelet = scene.node.kubelet()?;
    let within = ebb::linux::netns::Netns::of_process(kubelet.pid(&bad.containers[0]).await?)?;
    let node = SocketAddr::new(NODE_V4.parse()?, agent.port);
    let mut kept = Vec::new();
    for at in [node, own] {
        let callers = tokio::task::block_in_place(|| {
            within.run(|| (0..CALLERS / 2).map(|_| half_a_request(at)).collect())
        });
        let callers: Vec<_> = callers?;
        kept.extend(callers);
    }
    // The other pod's wait, its wait port and the node's own endpoints are still served.
    let begun = Instant::now();
    let out = dial(
        &kubelet,
        &good.containers[0],
        format!("http://{node}/v1/wait?until=settled"),
    )
    .await??;
    ensure!(out.status == 0, "{out:?}");
    let reply = http::get(other, "/ebb/wait").await?;
    ensure!(reply.status == 200, "{reply:?}");
    for path in ["/healthz", "/readyz", "/metrics"] {
        let reply = agent.get(path).await?;
        ensure!(reply.status == 200, "{path}: {reply:?}");
    }
    // The kubelet is still served on the busy pod's own port, too.
    let reply = http::get(own, "/ebb/wait").await?;
    ensure!(reply.status == 200, "{reply:?}");
    ensure!(begun.elapsed() < SOON, "after {:?}", begun.elapsed());
    let open = std::fs::read_dir(format!("/proc/{}/fd", agent.pid()?))?.count();
    ensure!(open < CALLERS / 2, "the agent has {open} files open");
    drop(kept);
    agent.stop().await
}

fn half_a_request(at: SocketAddr) -> std::io::Result<TcpStream> {
    use std::io::Write as _;
    let mut stream = TcpStream::connect(at)?;
    // The agent may have closed the connection already.
    let _ = stream.write_all(b"GET /v1/wait HTTP/1.1\r\nHost: ");
    Ok(stream)
}

async fn too_many(scene: ExclusiveScene) -> Result<()> {
    let agent = scene.agent_in("ebb", &["--quiet", "300ms"]).await?;
    let pod = run(&scene.node, annotated("greedy")).await?;
    let address = until_listening(&pod).await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let mut waits = Vec::new();
    for n in 1..=16 {
        waits.push(tokio::spawn(http::get(address, "/ebb/wait")));
        eventually("one more waits", async || {
            let drains = agent.drains("greedy").await?;
            Ok(drains.first().is_some_and(|d| d.holds == n).then_some(()))
        })
        .await?;
    }
    let reply = http::get(address, "/ebb/wait").await?;
    ensure!(reply.status == 429, "{reply:?}");
    // Waits on the node port and on the pod's port count together.
    let node = format!("http://{NODE_V4}:{}/v1/wait", agent.port);
    let out = dial(&scene.node.kubelet()?, &pod.containers[0], node).await??;
    let said = String::from_utf8_lossy(&out.stdout);
    ensure!(
        said.contains("16 requests wait for default/greedy already"),
        "{out:?}"
    );
    sleep(SECOND).await;
    ensure!(waits.iter().all(|w| !w.is_finished()), "a wait was ended");
    drop(peer);
    for wait in waits {
        let reply = wait.await??;
        ensure!(reply.status == 200, "{reply:?}");
    }
    agent.stop().await
}
