//! The owner and direction of each connection, and that each is counted once.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use ebb::{kernel::Tracker, linux::netns::Netns};
use ebb_core::{
    drain_report::ReleaseReason,
    flow::{Direction, Exempt},
    ids::NetnsInode,
};
use ebb_protocol::views::FlowView;
use ebb_testkit::{
    kubelet::{ExecOutput, Kubelet, PodSpec, StartedContainer, StartedPod},
    proc_net,
};
use libtest_mimic::Trial;
use tokio::task::JoinHandle;

use crate::{
    agent::Agent,
    peer::{Peer, SilentServer},
    scene::{FIXTURE, NODE_V4, NODE_V6, SECOND, Scene, eventually, free_port, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "inbound_flows_of_both_families_are_those_in_proc_net_tcp",
            both_families,
        ),
        trial(
            "an_ipv4_client_of_a_dual_stack_listener_is_one_flow_with_ipv4_addresses",
            dual_stack,
        ),
        trial("dialled_flows_are_outbound_and_do_not_hold", outbound),
        trial(
            "flows_of_all_containers_belong_to_the_pod_and_those_inside_it_do_not_hold",
            two_containers,
        ),
        trial(
            "a_host_network_pod_has_only_the_flows_of_its_cgroups_and_is_held_for_them",
            host_network,
        ),
        trial(
            "flows_older_than_the_agent_are_inbound_are_counted_once_and_hold",
            older_than_agent,
        ),
        trial("an_agent_with_bpf_log_tracks_flows_like_any_other", bpf_log),
    ]
}

/// The programs log only losses. The trial proves that they load with their log on, and that the agent tracks flows
/// while it reads the log.
async fn bpf_log(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--bpf-log"]).await?;
    let pod = scene.serve("logged").await?;
    let _peer = Peer::served(pod.v4(8080)?).await?;
    let flows = agent.flows("logged").await?;
    ensure!(flows.iter().filter(|f| f.holds).count() == 1, "{flows:?}");
    agent.stop().await
}

type Endpoints = BTreeSet<(SocketAddr, SocketAddr)>;

fn endpoints<'a>(flows: impl IntoIterator<Item = &'a FlowView>) -> Endpoints {
    flows.into_iter().map(|f| (f.local, f.remote)).collect()
}

fn inbound(flows: &[FlowView]) -> impl Iterator<Item = &FlowView> {
    flows.iter().filter(|f| f.direction == Direction::Inbound)
}

/// Waits until ebb lists this many flows of the pod, inbound and outbound.
async fn until_flows(agent: &Agent, pod: &StartedPod, n: usize) -> Result<Vec<FlowView>> {
    let mut last = Vec::new();
    let found = eventually("that many flows", async || {
        last = agent.flows(&pod.spec.name).await?;
        Ok((last.len() == n).then(|| last.clone()))
    })
    .await;
    found.map_err(|e| e.context(format!("{n} flows expected, the last list was {last:#?}")))
}

/// Runs the fixture's client in a container, in the background.
pub(crate) fn dial(
    kubelet: &Kubelet,
    container: &StartedContainer,
    url: String,
) -> JoinHandle<Result<ExecOutput>> {
    let (kubelet, container) = (kubelet.clone(), container.clone());
    tokio::spawn(async move {
        kubelet
            .exec(&container, &[FIXTURE, "get", &url], Duration::ZERO)
            .await
    })
}

async fn both_families(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let pod = scene.serve("families").await?;
    let mut peers = Vec::new();
    for server in [pod.v4(8080)?, pod.v6(8080)?, pod.v4(8080)?, pod.v6(8080)?] {
        peers.push(Peer::served(server).await?);
    }
    // Accepted, without any data.
    peers.push(Peer::connect(pod.v4(8080)?).await?);
    let flows = until_flows(&agent, &pod, 5).await?;
    let pid = scene.kubelet()?.pid(pod.container("app")?).await?;
    ensure!(
        endpoints(&flows) == proc_net::established(pid, 8080)?,
        "{flows:#?}"
    );
    for flow in &flows {
        ensure!(
            flow.direction == Direction::Inbound && flow.holds,
            "{flow:?}"
        );
        ensure!(
            flow.age_ms.is_some() && flow.age_at_least_ms.is_none(),
            "{flow:?}"
        );
        ensure!(peers.iter().any(|p| p.address == flow.remote), "{flow:?}");
    }
    // A GET of "/" has 4 + 1 + 1 + 8 + 4 bytes, and its whole answer was sent.
    let served = flows.iter().find(|f| f.remote == peers[0].address);
    ensure!(
        served.is_some_and(|f| f.bytes_in == 18 && f.bytes_out > 3),
        "{served:?}"
    );
    peers.truncate(1);
    let flows = until_flows(&agent, &pod, 1).await?;
    ensure!(flows[0].remote == peers[0].address, "{flows:?}");
    Ok(())
}

async fn dual_stack(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let app =
        ebb_testkit::kubelet::ContainerSpec::fixture("app", &["serve", "--port", "8080", "--dual"]);
    let pod = scene.run(PodSpec::new("dual").container(app)).await?;
    let four = Peer::served(pod.v4(8080)?).await?;
    let six = Peer::served(pod.v6(8080)?).await?;
    let flows = until_flows(&agent, &pod, 2).await?;
    let expected = Endpoints::from([(pod.v4(8080)?, four.address), (pod.v6(8080)?, six.address)]);
    ensure!(endpoints(&flows) == expected, "{flows:#?}");
    let pid = scene.kubelet()?.pid(pod.container("app")?).await?;
    ensure!(proc_net::established(pid, 8080)? == expected);
    Ok(())
}

async fn outbound(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "200ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("dialler").await?;
    let silent = SilentServer::listen().await?;
    let app = pod.container("app")?;
    let kubelet = scene.kubelet()?;
    let port = silent.port;
    dial(&kubelet, app, format!("http://{NODE_V4}:{port}/"));
    dial(&kubelet, app, format!("http://[{NODE_V6}]:{port}/"));
    let flows = until_flows(&agent, &pod, 2).await?;
    for flow in &flows {
        ensure!(flow.direction == Direction::Outbound, "{flow:?}");
        ensure!(
            flow.exempt == Some(Exempt::Outbound) && !flow.holds,
            "{flow:?}"
        );
        ensure!(flow.remote.port() == port, "{flow:?}");
    }
    let families: BTreeSet<bool> = flows.iter().map(|f| f.remote.is_ipv4()).collect();
    ensure!(families.len() == 2, "{flows:#?}");
    let view = agent.pod("dialler").await?;
    ensure!(view.flows.is_some_and(|f| f.total() == 0), "{view:?}");
    ensure!(view.exempt == Some(2), "{view:?}");

    let stop = scene.kubelet_at(&proxy)?.stop(&pod, 30 * SECOND).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("dialler").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        report.held_ms < 5_000 && report.cut_total == Some(0),
        "{report:?}"
    );
    Ok(())
}

async fn two_containers(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--quiet", "200ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let spec = PodSpec::new("pair")
        .container(server("front", 8080))
        .container(server("back", 8081));
    let pod = scene.run(spec).await?;
    let front = Peer::served(pod.v4(8080)?).await?;
    let back = Peer::served(pod.v4(8081)?).await?;
    let kubelet = scene.kubelet()?;
    // Once by loopback, and once by the pod's own address.
    let own = pod.v4(8081)?;
    dial(
        &kubelet,
        pod.container("front")?,
        "http://127.0.0.1:8081/slow?ms=60000".into(),
    );
    dial(
        &kubelet,
        pod.container("front")?,
        format!("http://{own}/slow?ms=60000"),
    );
    let flows = until_flows(&agent, &pod, 6).await?;
    let holding = flows.iter().filter(|f| f.holds);
    let expected = Endpoints::from([
        (pod.v4(8080)?, front.address),
        (pod.v4(8081)?, back.address),
    ]);
    ensure!(endpoints(holding) == expected, "{flows:#?}");
    let within: Vec<_> = inbound(&flows).filter(|f| !f.holds).collect();
    ensure!(within.len() == 2, "{flows:#?}");
    ensure!(
        within.iter().all(|f| f.exempt == Some(Exempt::InPod)),
        "{flows:#?}"
    );
    let dialled = flows.iter().filter(|f| f.exempt == Some(Exempt::Outbound));
    ensure!(dialled.count() == 2, "{flows:#?}");
    for flow in &flows {
        let owner = match (flow.direction, flow.local.port()) {
            (Direction::Inbound, 8081) => "back",
            _ => "front",
        };
        ensure!(flow.container.as_deref() == Some(owner), "{flow:?}");
    }

    drop((front, back));
    let stop = scene.kubelet_at(&proxy)?.stop(&pod, 30 * SECOND).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("pair").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        report.held_ms < 5_000 && report.cut_total == Some(0),
        "{report:?}"
    );
    Ok(())
}

async fn host_network(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown", "--quiet", "200ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let port = free_port();
    let spec = PodSpec::new("on-host")
        .host_network()
        .container(server("app", port));
    let pod = scene.run(spec).await?;
    // Both ends of this connection are in the host's namespace too, and neither is the pod's.
    let foreign = SilentServer::listen().await?;
    let _foreign = Peer::connect(SocketAddr::new(pod.v4(0)?.ip(), foreign.port)).await?;
    let four = Peer::served(pod.v4(port)?).await?;
    let six = Peer::served(pod.v6(port)?).await?;
    let flows = until_flows(&agent, &pod, 2).await?;
    let expected = Endpoints::from([(pod.v4(port)?, four.address), (pod.v6(port)?, six.address)]);
    ensure!(endpoints(&flows) == expected, "{flows:#?}");
    ensure!(flows.iter().all(|f| f.holds), "{flows:#?}");
    // Outbound connections are recognised by cgroup as well.
    let app = pod.container("app")?;
    dial(
        &scene.kubelet()?,
        app,
        format!("http://127.0.0.1:{}/", foreign.port),
    );
    let flows = until_flows(&agent, &pod, 3).await?;
    ensure!(inbound(&flows).count() == 2, "{flows:#?}");

    let kubelet = scene.kubelet_at(&proxy)?;
    let stopping = tokio::spawn({
        let pod = pod.clone();
        async move { kubelet.stop(&pod, 30 * SECOND).await }
    });
    agent.until_draining("on-host").await?;
    drop(four);
    tokio::time::sleep(SECOND).await;
    ensure!(!stopping.is_finished(), "released with a flow open");
    drop(six);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("on-host").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        report.flows_at_start.is_some_and(|f| f.total() == 2),
        "{report:?}"
    );
    ensure!(
        report.ended == Some(2) && report.cut_total == Some(0),
        "{report:?}"
    );
    Ok(())
}

async fn older_than_agent(scene: Scene) -> Result<()> {
    const PEERS: usize = 200;
    let pod = scene.serve("elder").await?;
    let kubelet = scene.kubelet()?;
    let silent = SilentServer::listen().await?;
    let app = pod.container("app")?;
    dial(&kubelet, app, format!("http://{NODE_V4}:{}/", silent.port));
    let mut peers = Vec::new();
    for _ in 0..PEERS {
        peers.push(Peer::served(pod.v4(8080)?).await?);
    }
    let last = Peer::served(pod.v4(8080)?).await?;
    let pid = kubelet.pid(app).await?;
    eventually("the pod's own connection", async || {
        let dialled = std::fs::read_to_string(format!("/proc/{pid}/net/tcp"))?;
        let port = format!(":{:04X} 01 ", silent.port);
        Ok(dialled.contains(&port).then_some(()))
    })
    .await?;
    let netns = Netns::of_process(pid)?.inode();

    let agent = scene.agent(&["--hold-unknown", "--quiet", "200ms"]).await?;
    let proxy = scene.proxy(&agent).await?;
    // A second instance of the programs, to read their counters of this namespace alone.
    let (tracker, _events) = Tracker::start(ebb::kernel::TrackerOptions::default())?;
    let flows = agent.flows("elder").await?;
    ensure!(
        inbound(&flows).all(|f| f.age_ms.is_none() && f.age_at_least_ms.is_some()),
        "{flows:#?}"
    );
    ensure!(
        inbound(&flows).count() == PEERS + 1,
        "{} flows",
        flows.len()
    );
    ensure!(inbound(&flows).all(|f| f.holds));
    ensure!(flows.len() == PEERS + 2, "{} flows", flows.len());
    // A dump by this tracker corrects its counters.
    tracker
        .dump(&ebb_core::scope::Scope::Netns { inode: netns, pid })
        .await?;
    ensure!(
        counted(&tracker, netns) == PEERS as u64 + 1,
        "{:?}",
        tracker.counts()
    );
    // This metric covers the whole node, including other trials' flows.
    let at_first = agent.metric("ebb_flows").await?;
    ensure!(at_first > PEERS as i64, "{at_first}");

    // New flows beside the old ones.
    let new = Peer::served(pod.v4(8080)?).await?;
    let flows = agent.flows("elder").await?;
    let young: Vec<_> = inbound(&flows).filter(|f| f.age_ms.is_some()).collect();
    ensure!(
        young.len() == 1 && young[0].remote == new.address,
        "{young:?}"
    );
    ensure!(
        counted(&tracker, netns) == PEERS as u64 + 2,
        "{:?}",
        tracker.counts()
    );

    drop(peers);
    let flows = until_flows(&agent, &pod, 3).await?;
    ensure!(
        counted(&tracker, netns) == 2,
        "{flows:?} {:?}",
        tracker.counts()
    );
    let afterwards = agent.metric("ebb_flows").await?;
    ensure!(
        (0..at_first - PEERS as i64 / 2).contains(&afterwards),
        "{PEERS} flows closed: {at_first} before, {afterwards} after"
    );
    drop(new);
    ensure!(
        tracker.losses()?.iter().all(|n| *n == 0),
        "{:?}",
        tracker.losses()
    );

    let kubelet = scene.kubelet_at(&proxy)?;
    let stopping = tokio::spawn({
        let pod = pod.clone();
        async move { kubelet.stop(&pod, 30 * SECOND).await }
    });
    let report = agent.until_draining("elder").await?;
    ensure!(
        report.flows_at_start.is_some_and(|f| f.total() == 1),
        "{report:?}"
    );
    tokio::time::sleep(SECOND).await;
    ensure!(!stopping.is_finished(), "released with a flow open");
    drop(last);
    let stop = stopping.await?;
    ensure!(stop.error().is_none(), "{stop:?}");
    let report = agent.drain("elder").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    Ok(())
}

/// The open inbound flows of a namespace, from the programs' own counters.
fn counted(tracker: &Tracker, netns: NetnsInode) -> u64 {
    let counts = tracker.counts();
    let own = counts.iter().filter(|c| c.netns == netns);
    own.map(|c| c.open).sum()
}
