//! Whose connection it is: nested cgroups, processes that come later, nodes without cgroup v2.

use std::{fs, net::TcpStream, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use ebb::{
    drain::{
        driver::Drains,
        report::{LookKind, ReleaseReason},
    },
    flow::{Direction, FlowState::Active, Snapshot, TcpState},
    ids::{CgroupId, ContainerId},
    kernel::{Options, WorkloadCount},
    pods::{Scope, cgroup::container_cgroups},
};

use tokio::sync::mpsc;

use crate::{
    lookups::{order, until_looked_at},
    seeding::turn,
    support::{
        cgroup::Cgroup,
        kernel,
        namespace::Namespace,
        puppet::Puppet,
        world::{World, world},
    },
};

trials![
    a_host_network_containers_nested_cgroups_are_its_own_and_its_siblings_are_not,
    cgroups_that_a_host_network_container_makes_later_are_its_own_and_hold_its_drain,
    a_pod_has_the_flows_of_cgroups_below_its_containers,
    a_process_that_enters_the_pod_later_is_the_pods,
    where_all_sockets_carry_the_root_cgroup_the_namespace_tells_pods_apart,
    counters_of_cgroups_that_are_gone_are_forgotten_while_their_namespace_lives,
];

/// Everybody's: the sandbox's mount of cgroup v2.
const ROOT: &str = "/sys/fs/cgroup";

/// The counters that count something: a namespace's number may have been another's before.
fn in_use(world: &World) -> Vec<WorkloadCount> {
    let mut counts = world.counts();
    counts.retain(|c| c.inbound != 0);
    counts
}

fn flows(world: &World, scope: &Scope) -> Result<(usize, usize)> {
    let look = kernel::wait(world.tracker.look(scope))?;
    let hour = std::time::Duration::from_secs(3600);
    let snapshot = Snapshot::new(look.taken_at, &look.samples, hour, |_| true, |_| false);
    let of = |direction| move |f: &&ebb::flow::Flow| f.direction == direction;
    let inbound = snapshot.flows.iter().filter(of(Direction::Inbound)).count();
    Ok((inbound, snapshot.flows.len() - inbound))
}

fn a_host_network_containers_nested_cgroups_are_its_own_and_its_siblings_are_not() -> Result<()> {
    // This thread is on the host network.
    let world = World::here(kernel::shared())?;
    let id = ContainerId::new("c0ffee");
    let container = Cgroup::new("hostpod-c0ffee")?;
    let nested = Cgroup::new("hostpod-c0ffee/init.scope")?;
    let deep = Cgroup::new("hostpod-c0ffee/system.slice")?;
    let sibling = Cgroup::new("hostpod-other")?;
    let (mut init, mut unit) = (Puppet::start_in(&nested)?, Puppet::start_in(&deep)?);
    let mut other = Puppet::start_in(&sibling)?;
    let mut clients = Vec::new();
    for server in [&mut init, &mut unit, &mut other] {
        clients.push(TcpStream::connect(server.listen()?)?);
        server.tell("accept")?;
    }
    let path = nested.path().strip_prefix(ROOT)?.display();
    let cgroups = container_cgroups(ROOT.as_ref(), &id, Some(&format!("0::/{path}\n")), None)?;
    ensure!(
        cgroups.len() == 3 && cgroups.contains(&container.id()?),
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
    ensure!(counted.map(|c| c.inbound).sum::<i64>() == 2);
    let found = kernel::wait(world.tracker.audit(Some(&scope)))?;
    ensure!(
        (found.drift, found.workloads, found.flows) == (0, 2, 2),
        "{found:?}"
    );
    Ok(())
}

fn cgroups_that_a_host_network_container_makes_later_are_its_own_and_hold_its_drain() -> Result<()>
{
    let _turn = turn();
    let (tracker, events) = kernel::start()?;
    let container = Cgroup::new("latepod-c0ffee")?;
    let scope = Scope::HostNetwork(vec![container.id()?]);
    let mut first = Puppet::start_in(&container)?;
    let client = TcpStream::connect(first.listen()?)?;
    first.tell("accept")?;
    let (notices, _) = mpsc::unbounded_channel();
    let (again, kernel) = (tracker.clone(), Arc::new(tracker));
    let drains = kernel::wait(async { Drains::spawn(kernel, events, None, notices) });
    let hold = kernel::wait(drains.hold(order(0, &scope)));
    until_looked_at(&drains)?;

    // The drain knows nothing of this one, and nobody tells it.
    let nested = Cgroup::new("latepod-c0ffee/late.service")?;
    let sibling = Cgroup::new("latepod-other")?;
    let (mut late, mut other) = (Puppet::start_in(&nested)?, Puppet::start_in(&sibling)?);
    let late_client = TcpStream::connect(late.listen()?)?;
    late.tell("accept")?;
    let _others_client = TcpStream::connect(other.listen()?)?;
    other.tell("accept")?;
    first.tell("close")?;
    drop(client);
    let released = async {
        let hold = hold.released();
        tokio::time::timeout(Duration::from_secs(1), hold)
            .await
            .ok()
    };
    let early = kernel::wait(released);
    ensure!(early.is_none(), "the late one is cut: {early:?}");
    let look = kernel::wait(again.look(&scope))?;
    let seen: Vec<_> = look
        .samples
        .iter()
        .filter(|s| s.state != TcpState::Listen)
        .collect();
    ensure!(
        seen.iter().any(|s| s.cgroup == nested.id().ok())
            && seen.iter().all(|s| s.cgroup != sibling.id().ok()),
        "{seen:?}"
    );

    late.tell("close")?;
    drop(late_client);
    let report = kernel::wait(hold.released());
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(report.released_by == Some(LookKind::Walk), "{report:?}");
    ensure!(
        (report.arrived, report.ended) == (Some(1), Some(2)),
        "{report:?}"
    );
    first.kill()?;
    late.kill()
}

fn a_pod_has_the_flows_of_cgroups_below_its_containers() -> Result<()> {
    world(|w| {
        let _container = Cgroup::new("podded")?;
        let nested = Cgroup::new("podded/unit.service")?;
        w.owned_by(nested.id()?);
        let mut server = Puppet::start_in(&nested)?;
        let at = server.listen()?;
        w.serving_at(at);
        let client = TcpStream::connect(at)?;
        server.tell("accept")?;
        w.has(&[(Active, 1)], 1)?;
        let counted = w.counts();
        let of_nested = counted.iter().find(|c| c.inbound == 1);
        ensure!(
            of_nested.map(|c| c.cgroup) == Some(nested.id()?),
            "{counted:?}"
        );
        drop(client);
        server.kill()?;
        w.has(&[], 0)
    })
}

fn a_process_that_enters_the_pod_later_is_the_pods() -> Result<()> {
    world(|w| {
        let container = Cgroup::new("entered")?;
        let mut server = Puppet::start_in(&container)?;
        let at = server.listen()?;
        w.serving_at(at);
        // As `kubectl exec`: made in the pod's namespace, moved into its cgroup, and only then dialling and listening.
        let mut client = Puppet::start()?;
        client.move_to(&container)?;
        client.tell(&format!("connect {at}"))?;
        server.tell("accept")?;
        w.owned_by(container.id()?);
        w.has(&[(Active, 1)], 1)?;
        // And what it accepts itself, as a debugging server would.
        let late = client.listen()?;
        w.serving_at(late);
        server.tell(&format!("connect {late}"))?;
        client.tell("accept")?;
        w.has(&[(Active, 2)], 2)?;
        let counted = in_use(w);
        ensure!(
            counted.len() == 1 && counted[0].cgroup == container.id()? && counted[0].inbound == 2,
            "{counted:?}"
        );
        let look = w.look()?;
        let accepted = look
            .iter()
            .find(|s| s.local == late && s.state != TcpState::Listen);
        ensure!(
            accepted.is_some_and(|s| s.cgroup == container.id().ok()),
            "{look:?}"
        );
        client.kill()?;
        server.kill()?;
        w.has(&[], 0)
    })
}

fn where_all_sockets_carry_the_root_cgroup_the_namespace_tells_pods_apart() -> Result<()> {
    let tracker = kernel::shared();
    let pods = [Namespace::new()?, Namespace::new()?];
    let mut kept = Vec::new();
    for (n, pod) in pods.iter().enumerate() {
        let both = pod.run(|| {
            let (mut server, mut client) = (Puppet::start()?, Puppet::start()?);
            for process in [&mut server, &mut client] {
                process.tell(&format!("move {ROOT}"))?;
            }
            let at = server.listen()?;
            for _ in 0..=n {
                client.tell(&format!("connect {at}"))?;
                server.tell("accept")?;
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
            world.has_no_drift()
        })?;
    }
    Ok(())
}

fn counters_of_cgroups_that_are_gone_are_forgotten_while_their_namespace_lives() -> Result<()> {
    Namespace::new()?.run(|| {
        let options = Options {
            cgroup_root: Some(ROOT.into()),
            ..Options::default()
        };
        let world = World::here(kernel::start_with(options)?.0)?;
        let mut inhabitant = Puppet::start()?;
        let restarted = Cgroup::new("restarted")?;
        let mut before = Puppet::start_in(&restarted)?;
        let accept = |server: &mut Puppet, client: &mut Puppet| -> Result<()> {
            let at = server.listen()?;
            client.tell(&format!("connect {at}"))?;
            server.tell("accept")?;
            Ok(())
        };
        accept(&mut before, &mut inhabitant)?;
        accept(&mut inhabitant, &mut before)?;
        let gone = restarted.id()?;
        let has = |cgroup| world.counts().iter().any(|c| c.cgroup == cgroup);
        ensure!(has(gone));
        before.kill()?;
        inhabitant.tell("close")?;
        inhabitant.tell("close")?;
        world.has(&[], 0)?;
        world.tracker.prune();
        world.tracker.prune();
        ensure!(has(gone), "forgotten while its cgroup was there");
        let path = restarted.path().to_owned();
        drop(restarted);
        ensure!(!fs::exists(&path)?, "the cgroup is still there");
        world.tracker.prune();
        ensure!(has(gone), "forgotten at first sight");
        world.tracker.prune();
        ensure!(!has(gone), "not forgotten");
        let own = world.counts();
        let own = own.first().context("the living one was forgotten, too")?;
        ensure!(own.inbound == 0 && own.inbound_total == 1, "{own:?}");
        Ok(())
    })
}
