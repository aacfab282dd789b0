//! The counters against the kernel's tables, and what is lost on the way to them.

use std::{
    collections::VecDeque,
    fs,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

use anyhow::{Context as _, Result, ensure};
use ebb::{
    flow::{Direction, FlowState::Active},
    ids::{CgroupId, NetnsInode},
};
use ebb_common::{LISTENER_PLACES, LOST_LISTENER, LOST_STORAGE, LOST_WORKLOAD};

use crate::{
    seeding::turn,
    support::{
        kernel,
        namespace::{Namespace, sysctl},
        puppet::Puppet,
        raw,
        sockets::{self, pair},
        world::World,
    },
};

trials![
    a_wrong_count_is_found_counted_and_mended,
    a_wrong_count_is_mended_while_connections_open_and_close,
    a_counter_of_nothing_is_set_right,
    connections_that_come_and_go_are_no_drift,
    a_record_that_finds_no_memory_is_one_loss_and_the_flow_is_inbound,
    workloads_that_find_no_place_are_counted_as_losses_and_later_in_full,
    listeners_that_find_no_place_leave_old_flows_inbound,
    however_much_was_audited_before_what_a_pod_dialled_stays_outbound,
];

/// In a namespace and with a tracker of its own, which may be wrong.
fn alone(f: impl FnOnce(&World) -> Result<()> + Send) -> Result<()> {
    Namespace::new()?.run(|| f(&World::here(kernel::start()?.0)?))
}

fn loss(world: &World, kind: u32) -> Result<u64> {
    Ok(world.tracker.losses()?[kind as usize])
}

fn own_cgroup(world: &World) -> Result<CgroupId> {
    Ok(world.counts().first().context("no counters")?.cgroup)
}

fn a_wrong_count_is_found_counted_and_mended() -> Result<()> {
    alone(|w| {
        let listener = w.listen(16)?;
        let pairs = [pair(&listener)?, pair(&listener)?];
        w.has(&[(Active, 2)], 2)?;
        w.has_no_drift()?;
        let cgroup = own_cgroup(w)?;
        for (wrong, all) in [(3, 3), (-2, 5)] {
            w.tracker.miscount(cgroup, w.netns, wrong)?;
            let counted: i64 = w.counts().iter().map(|c| c.inbound).sum();
            ensure!(counted == 2 + wrong, "{counted}");
            let found = w.audit()?;
            ensure!(found.drift == wrong.unsigned_abs(), "{found:?}");
            ensure!(found.workloads == 1 && found.moving == 0, "{found:?}");
            ensure!(found.flows == 2, "{found:?}");
            ensure!(
                found.drifted.len() == 1 && found.drifted[0].inbound == -wrong,
                "{found:?}"
            );
            ensure!(w.tracker.drift() == all, "{} in all", w.tracker.drift());
            w.has(&[(Active, 2)], 2)?;
            w.has_no_drift()?;
        }
        drop(pairs);
        w.has(&[], 0)
    })
}

fn a_counter_of_nothing_is_set_right() -> Result<()> {
    alone(|w| {
        let _inhabitant = Puppet::start()?;
        w.tracker.miscount(CgroupId(4711), w.netns, 1)?;
        let found = kernel::wait(w.tracker.audit(None))?;
        let drifted = found.drifted.iter().find(|d| d.netns == w.netns);
        ensure!(drifted.is_some_and(|d| d.inbound == -1), "{found:?}");
        ensure!(w.counts().iter().all(|c| c.inbound == 0));
        Ok(())
    })
}

/// Opens and closes connections until told to stop, more slowly than they are counted.
fn churn(listener: &std::net::TcpListener, stop: &AtomicBool) -> Result<usize> {
    let mut pairs = VecDeque::new();
    while !stop.load(Ordering::Relaxed) {
        pairs.push_back(pair(listener)?);
        if pairs.len() > 20
            && let Some((server, client)) = pairs.pop_front()
        {
            sockets::reset(client)?;
            drop(server);
        }
    }
    Ok(pairs.len())
}

fn a_wrong_count_is_mended_while_connections_open_and_close() -> Result<()> {
    alone(|w| {
        let listener = w.listen(16)?;
        let _pair = pair(&listener)?;
        w.has(&[(Active, 1)], 1)?;
        w.tracker.miscount(own_cgroup(w)?, w.netns, 7)?;
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            let churning = s.spawn(|| churn(&listener, &stop));
            for _ in 0..3 {
                let found = w.audit()?;
                // Whether it ever stood still is up to the machine; believing a moving one would be wrong.
                ensure!(
                    found.drift == 7 || (found.drift == 0 && w.tracker.drift() <= 7),
                    "{found:?}"
                );
            }
            stop.store(true, Ordering::Relaxed);
            churning.join().unwrap()
        })?;
        w.audit()?;
        ensure!(w.tracker.drift() == 7, "{} in all", w.tracker.drift());
        w.has(&[(Active, 1)], 1)?;
        w.has_no_drift()
    })
}

fn connections_that_come_and_go_are_no_drift() -> Result<()> {
    alone(|w| {
        let listener = w.listen(16)?;
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            let churning = s.spawn(|| churn(&listener, &stop));
            for _ in 0..5 {
                let found = w.audit()?;
                ensure!(found.drift == 0 && found.uncounted == 0, "{found:?}");
            }
            stop.store(true, Ordering::Relaxed);
            churning.join().unwrap()
        })?;
        w.has(&[], 0)?;
        w.has_no_drift()
    })
}

fn a_record_that_finds_no_memory_is_one_loss_and_the_flow_is_inbound() -> Result<()> {
    // Those trials have trackers of their own that must lose nothing.
    let _turn = turn();
    // The shared tracker has to be there, or be made later, for it to lose it, too.
    kernel::shared();
    kernel::STARVED.fetch_add(1, Ordering::Relaxed);
    alone(|w| {
        let listener = w.listen(16)?;
        let limit = "/proc/sys/net/core/optmem_max";
        let before = fs::read_to_string(limit).context("the limit of socket storage")?;
        sysctl("core/optmem_max", "0")?;
        let both = pair(&listener)?;
        sysctl("core/optmem_max", before.trim())?;
        let losses = loss(w, LOST_STORAGE)?;
        ensure!(losses == 1, "{losses} losses of 1");
        let mut flows = w.snapshot()?.flows;
        flows.retain(|f| f.direction == Direction::Inbound);
        ensure!(flows.len() == 1 && flows[0].age.is_none(), "{flows:?}");
        // There is memory again: an audit makes good.
        let found = w.audit()?;
        ensure!(found.drift == 1 && found.uncounted == 0, "{found:?}");
        w.has(&[(Active, 1)], 1)?;
        ensure!(loss(w, LOST_STORAGE)? == 1);
        drop(both);
        w.has(&[], 0)?;
        w.has_no_drift()
    })
}

/// As many as `maps::WORKLOADS` has room for.
const PLACES: u64 = 16_384;

fn workloads_that_find_no_place_are_counted_as_losses_and_later_in_full() -> Result<()> {
    alone(|w| {
        let listener = w.listen(16)?;
        // Nobody's, so they can be forgotten.
        w.tracker.fill(NetnsInode(1), PLACES)?;
        let both = pair(&listener)?;
        // Other trials' flows are lost meanwhile, too.
        let losses = loss(w, LOST_WORKLOAD)?;
        ensure!(losses >= 1, "{losses} losses of 1");
        let flows = w.snapshot()?.flows;
        ensure!(
            flows
                .iter()
                .filter(|f| f.direction == Direction::Inbound)
                .count()
                == 1,
            "{flows:?}"
        );
        let found = w.audit()?;
        ensure!(found.drift == 0 && found.uncounted == 1, "{found:?}");
        w.tracker.prune();
        ensure!(w.tracker.prune() as u64 >= PLACES - 100);
        let found = w.audit()?;
        ensure!(found.drift == 1 && found.uncounted == 0, "{found:?}");
        w.has(&[(Active, 1)], 1)?;
        drop(both);
        w.has(&[], 0)?;
        w.has_no_drift()
    })
}

fn listeners_that_find_no_place_leave_old_flows_inbound() -> Result<()> {
    let _turn = turn();
    Namespace::new()?.run(|| {
        let _inhabitant = Puppet::start()?;
        sysctl("ipv4/ip_local_port_range", "1024 65535")?;
        let (say, open) = mpsc::channel();
        let (close, wait) = mpsc::channel::<()>();
        thread::scope(|s| {
            // Dropped where this fails, so that the other thread ends.
            let close = close;
            s.spawn(move || {
                let kept = many_listeners();
                let _ = say.send(kept.as_ref().map(drop).map_err(|e| format!("{e:#}")));
                let _ = wait.recv();
                drop(kept);
            });
            open.recv()?.map_err(anyhow::Error::msg)?;
            let world = World::here(kernel::start()?.0)?;
            let lost = loss(&world, LOST_LISTENER)?;
            ensure!(lost > 0, "there was room for all");
            let flows = world.snapshot()?.flows;
            ensure!(
                flows.len() == 2 && flows.iter().all(|f| f.direction == Direction::Inbound),
                "{flows:?}"
            );
            world.has_no_drift()?;
            // Nor do later audits know all listeners: they must not make up a record for what is dialled now.
            let both = pair(&sockets::listener(4)?)?;
            let local = both.1.local_addr()?;
            world.has_no_drift()?;
            let flows = world.snapshot()?.flows;
            let dialled = flows.iter().find(|f| f.local == local);
            ensure!(
                dialled.is_some_and(|f| f.direction == Direction::Outbound),
                "{flows:?}"
            );
            ensure!(loss(&world, LOST_LISTENER)? == lost, "an audit lost more");
            close.send(())?;
            Ok(())
        })
    })
}

fn however_much_was_audited_before_what_a_pod_dialled_stays_outbound() -> Result<()> {
    alone(|w| {
        let listener = w.listen(16)?;
        let both = pair(&listener)?;
        w.has(&[(Active, 1)], 1)?;
        w.tracker.crowd_audits()?;
        let _inhabitant = Puppet::start()?;
        for scope in [None, Some(&w.scope)] {
            let found = kernel::wait(w.tracker.audit(scope))?;
            ensure!(found.drift == 0, "{found:?}");
            w.has(&[(Active, 1)], 1)?;
        }
        drop(both);
        w.has(&[], 0)
    })
}

type Pair = (std::net::TcpStream, std::net::TcpStream);

/// More listeners than there are places, and a connection between two ephemeral ports. A process may commonly
/// open 20,000 files or less.
fn many_listeners() -> Result<(Vec<std::net::TcpListener>, Pair)> {
    raw::own_descriptors()?;
    let listeners = (0..LISTENER_PLACES + 200).map(|_| sockets::listener(4));
    let listeners = listeners.collect::<Result<Vec<_>>>()?;
    let both = pair(&listeners[0])?;
    Ok((listeners, both))
}
