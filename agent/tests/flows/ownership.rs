//! The owner of a connection: nested cgroups, processes that come later, nodes without cgroup v2.

use std::{net::TcpStream, sync::Arc, time::Duration};

use anyhow::{Result, ensure};
use ebb::{
    drains::driver::Drains,
    kernel::{Tracker, WorkloadCount},
    pods::cgroup::container_cgroups,
};
use ebb_core::{
    clock::BootTime,
    drain_report::{ReleaseReason, ReleasedBy},
    flow::{Direction, FlowState::Active, Snapshot, TcpState},
    ids::{CgroupId, ContainerId},
    scope::Scope,
};
use ebb_testkit::{cgroup::Cgroup, namespace::Namespace};
use tokio::sync::mpsc;

use crate::{
    lookups::{order, until_dumped},
    starting::turn,
    support::{
        cgroup::id_of,
        kernel,
        worker::Worker,
        world::{World, world},
    },
};

ebb_testkit::trials![
    a_host_network_container_owns_the_flows_of_its_nested_cgroups_but_not_of_its_siblings,
    cgroups_that_a_host_network_container_makes_during_its_drain_hold_that_drain,
    a_pod_owns_the_flows_of_cgroups_below_its_containers,
    a_pod_owns_the_flows_of_a_process_that_enters_it_later,
    where_all_sockets_have_the_root_cgroup_pods_are_told_apart_by_namespace,
    counters_are_removed_after_their_cgroup_and_not_while_it_exists,
];

/// The sandbox's mount of cgroup v2.
const ROOT: &str = "/sys/fs/cgroup";

/// The counters with an open connection. Others may be of an earlier namespace with the same number.
fn in_use(world: &World) -> Vec<WorkloadCount> {
    let mut counts = world.counts();
    counts.retain(|c| c.opened != c.closed);
    counts
}

fn flows(world: &World, scope: &Scope) -> Result<(usize, usize)> {
    let dump = kernel::wait(world.tracker.dump(scope))?;
    let hour = std::time::Duration::from_secs(3600);
    let snapshot = Snapshot::new(dump.taken_at, &dump.samples, hour, |_| true, |_| false);
    let of = |direction| move |f: &&ebb_core::flow::Flow| f.direction == direction;
    let inbound = snapshot.flows.iter().filter(of(Direction::Inbound)).count();
    Ok((inbound, snapshot.flows.len() - inbound))
}

fn a_host_network_container_owns_the_flows_of_its_nested_cgroups_but_not_of_its_siblings()
-> Result<()> {
    // This thread is on the host network.
    let world = World::here(kernel::shared())?;
    let id = ContainerId::new("c0ffee");
    let container = Cgroup::new("hostpod-c0ffee")?;
    let nested = Cgroup::new("hostpod-c0ffee/init.scope")?;
    let deep = Cgroup::new("hostpod-c0ffee/system.slice")?;
    let sibling = Cgroup::new("hostpod-other")?;
    let (mut init, mut unit) = (Worker::start_in(&nested)?, Worker::start_in(&deep)?);
    let mut other = Worker::start_in(&sibling)?;
    let mut clients = Vec::new();
    for server in [&mut init, &mut unit, &mut other] {
        clients.push(TcpStream::connect(server.listen()?)?);
        server.command("accept")?;
    }
    let path = nested.path().strip_prefix(ROOT)?.display();
    let cgroups = container_cgroups(ROOT.as_ref(), &id, Some(&format!("0::/{path}\n")), None)?;
    ensure!(
        cgroups.len() == 3 && cgroups.contains(&id_of(&container)?),
        "{cgroups:?}"
    );
    let scope = Scope::HostNetwork(cgroups.clone());
    ensure!(
        flows(&world, &scope)? == (2, 0),
        "{:?}",
        flows(&world, &scope)
    );
    let counted = world.tracker.counts();
    let counted = counted.iter().filter(|c| cgroups.contains(&c.cgroup));
    ensure!(counted.map(|c| c.opened - c.closed).sum::<u64>() == 2);
    Ok(())
}

fn cgroups_that_a_host_network_container_makes_during_its_drain_hold_that_drain() -> Result<()> {
    let _turn = turn();
    let (tracker, events) = kernel::start()?;
    let container = Cgroup::new("latepod-c0ffee")?;
    let scope = Scope::HostNetwork(vec![id_of(&container)?]);
    let mut first = Worker::start_in(&container)?;
    let client = TcpStream::connect(first.listen()?)?;
    first.command("accept")?;
    let (notices, _) = mpsc::unbounded_channel();
    let kernel = Arc::new(tracker.clone());
    let drains = kernel::wait(async { Drains::spawn(kernel, events, None, notices) });
    let hold = kernel::wait(drains.hold(order(0, &scope)));
    until_dumped(&drains)?;

    // The drain gets no report of this cgroup.
    let nested = Cgroup::new("latepod-c0ffee/late.service")?;
    let sibling = Cgroup::new("latepod-other")?;
    let (mut late, mut other) = (Worker::start_in(&nested)?, Worker::start_in(&sibling)?);
    let late_client = TcpStream::connect(late.listen()?)?;
    late.command("accept")?;
    let _others_client = TcpStream::connect(other.listen()?)?;
    other.command("accept")?;
    first.command("close")?;
    drop(client);
    let released = async {
        let hold = hold.released();
        tokio::time::timeout(Duration::from_secs(1), hold)
            .await
            .ok()
    };
    let early = kernel::wait(released);
    ensure!(
        early.is_none(),
        "released with the late connection open: {early:?}"
    );
    let dump = kernel::wait(tracker.dump(&scope))?;
    let seen: Vec<_> = dump
        .samples
        .iter()
        .filter(|s| s.state != TcpState::Listen)
        .collect();
    ensure!(
        seen.iter().any(|s| s.cgroup == id_of(&nested).ok())
            && seen.iter().all(|s| s.cgroup != id_of(&sibling).ok()),
        "{seen:?}"
    );

    late.command("close")?;
    drop(late_client);
    let report = kernel::wait(hold.released());
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.released_by == Some(ReleasedBy::Dump), "{report:?}");
    ensure!(
        (report.arrived, report.ended) == (Some(1), Some(2)),
        "{report:?}"
    );
    first.kill()?;
    late.kill()
}

fn a_pod_owns_the_flows_of_cgroups_below_its_containers() -> Result<()> {
    world(|w| {
        let _container = Cgroup::new("podded")?;
        let nested = Cgroup::new("podded/unit.service")?;
        w.owned_by(id_of(&nested)?);
        let mut server = Worker::start_in(&nested)?;
        let at = server.listen()?;
        w.serving_at(at);
        let client = TcpStream::connect(at)?;
        server.command("accept")?;
        w.has(&[(Active, 1)], 1)?;
        let counted = w.counts();
        let of_nested = counted.iter().find(|c| c.opened - c.closed == 1);
        ensure!(
            of_nested.map(|c| c.cgroup) == Some(id_of(&nested)?),
            "{counted:?}"
        );
        drop(client);
        server.kill()?;
        w.has(&[], 0)
    })
}

fn a_pod_owns_the_flows_of_a_process_that_enters_it_later() -> Result<()> {
    world(|w| {
        let container = Cgroup::new("entered")?;
        let mut server = Worker::start_in(&container)?;
        let at = server.listen()?;
        w.serving_at(at);
        // Like `kubectl exec`: started in the pod's namespace, moved into its cgroup, and only then it dials and listens.
        let mut client = Worker::start()?;
        client.move_to(&container)?;
        client.command(&format!("connect {at}"))?;
        server.command("accept")?;
        w.owned_by(id_of(&container)?);
        w.has(&[(Active, 1)], 1)?;
        // It also accepts, like a debugging server.
        let late = client.listen()?;
        w.serving_at(late);
        server.command(&format!("connect {late}"))?;
        client.command("accept")?;
        w.has(&[(Active, 2)], 2)?;
        let counted = in_use(w);
        ensure!(
            counted.len() == 1
                && counted[0].cgroup == id_of(&container)?
                && counted[0].opened - counted[0].closed == 2,
            "{counted:?}"
        );
        let dump = w.dump()?;
        let accepted = dump
            .iter()
            .find(|s| s.local == late && s.state != TcpState::Listen);
        ensure!(
            accepted.is_some_and(|s| s.cgroup == id_of(&container).ok()),
            "{dump:?}"
        );
        client.kill()?;
        server.kill()?;
        w.has(&[], 0)
    })
}

fn where_all_sockets_have_the_root_cgroup_pods_are_told_apart_by_namespace() -> Result<()> {
    let tracker = kernel::shared();
    let pods = [Namespace::new()?, Namespace::new()?];
    let mut kept = Vec::new();
    for (n, pod) in pods.iter().enumerate() {
        let both = pod.run(|| {
            let (mut server, mut client) = (Worker::start()?, Worker::start()?);
            for process in [&mut server, &mut client] {
                process.command(&format!("move {ROOT}"))?;
            }
            let at = server.listen()?;
            for _ in 0..=n {
                client.command(&format!("connect {at}"))?;
                server.command("accept")?;
            }
            Ok((at, server, client))
        })?;
        kept.push(both);
    }
    for (n, (pod, (at, _, _))) in (1..).zip(pods.iter().zip(&kept)) {
        pod.run(|| {
            let world = World::here(tracker.clone())?;
            world.serving_at(*at);
            world.has(&[(Active, n)], n)?;
            let counted = in_use(&world);
            ensure!(
                counted.len() == 1 && counted[0].cgroup == CgroupId(1),
                "{counted:?}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

fn counters_are_removed_after_their_cgroup_and_not_while_it_exists() -> Result<()> {
    let _turn = turn();
    let (tracker, _) = kernel::start()?;
    let [running, ended] = [Cgroup::new("running")?, Cgroup::new("ended")?];
    let ids = [id_of(&running)?, id_of(&ended)?];
    let counted = |tracker: &Tracker| {
        let counts = tracker.counts();
        ids.map(|id| counts.iter().any(|c| c.cgroup == id))
    };
    let serve = |cgroup: &Cgroup| {
        let mut server = Worker::start_in(cgroup)?;
        let client = TcpStream::connect(server.listen()?)?;
        server.command("accept")?;
        anyhow::Ok((server, client))
    };
    let (_server, _client) = serve(&running)?;
    let (server, client) = serve(&ended)?;
    drop(client);
    server.kill()?;
    let now = BootTime::now();
    let hour = Duration::from_secs(3600);
    tracker.remove_gone_workloads(now)?;
    tracker.remove_gone_workloads(now + hour)?;
    ensure!(counted(&tracker) == [true, true], "removed too early");
    drop(ended);
    // A restarted container's cgroup is new, but its pod goes on.
    tracker.remove_gone_workloads(now + hour * 2)?;
    ensure!(counted(&tracker) == [true, true], "removed at once");
    tracker.remove_gone_workloads(now + hour * 3)?;
    ensure!(counted(&tracker) == [true, false], "not removed");
    Ok(())
}
