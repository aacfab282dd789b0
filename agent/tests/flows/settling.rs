//! What prolongs the settle phase of a drain, with the real tracker behind the real driver.

use std::{
    collections::BTreeMap,
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread::{self, sleep},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use ebb::{
    drain::{
        driver::{Drains, HoldOrder},
        policy::Policy,
        report::{ReleaseReason, Report},
    },
    ids::{PodName, PodUid, SandboxId},
    pods::{Pod, Scope},
};
use tokio::{sync::mpsc, time::timeout};

use crate::support::{
    kernel,
    link::Linked,
    namespace::scope_of_this_thread,
    proc_net, raw,
    sockets::{self, dial, listener_with},
};

trials![
    handshakes_that_are_never_done_do_not_prolong_settle,
    handshakes_that_are_done_prolong_settle_to_its_maximum,
];

/// Longer than what a flood leaves between two handshakes, and than a busy machine stalls.
const QUIET: Duration = Duration::from_secs(2);
const SETTLE_MAX: Duration = Duration::from_secs(6);
const LONGEST: Duration = Duration::from_secs(30);

/// Drains the pod in whose namespace the calling thread is.
fn settle(scope: Scope) -> Result<Arc<Report>> {
    let (tracker, events) = kernel::start()?;
    let (again, own) = (tracker.clone(), scope.clone());
    let pod = Pod {
        name: PodName {
            uid: PodUid::new("u"),
            namespace: "default".into(),
            name: "pod".into(),
        },
        sandbox: SandboxId::new("s"),
        scope,
        ips: vec![],
        annotations: BTreeMap::new(),
        containers: vec![],
    };
    let order = HoldOrder {
        pod: Arc::new(pod),
        policy: Policy {
            quiet: QUIET,
            settle_max: SETTLE_MAX,
            ..Policy::default()
        },
        warnings: vec![],
        grace: Some(LONGEST * 2),
        patience: None,
        deleted: None,
    };
    let report = kernel::wait(async {
        let (notices, _heard) = mpsc::unbounded_channel();
        let drains = Drains::spawn(Arc::new(tracker), events, None, notices);
        let hold = drains.hold(order).await;
        let report = timeout(LONGEST, hold.released()).await;
        report.context("it does not end")
    })?;
    kernel::exact(&again, Some(&own))?;
    Ok(report)
}

/// Drains a pod with a listener while `pester` is called again and again, on the host's network.
fn settle_while(
    mut pester: impl FnMut(&TcpListener) -> Result<()>,
) -> Result<(Linked, Arc<Report>)> {
    let pod = Linked::new()?;
    let any = (pod.v4(), 0).into();
    let listener = pod
        .namespace
        .run(|| listener_with(any, 256, libc::IPPROTO_TCP, |_| Ok(())))?;
    let report = thread::scope(|s| {
        let settling = s.spawn(|| pod.namespace.run(|| settle(scope_of_this_thread()?)));
        while !settling.is_finished() {
            pester(&listener)?;
            sleep(Duration::from_millis(5));
        }
        settling.join().unwrap_or_else(|_| bail!("panicked"))
    })?;
    Ok((pod, report))
}

fn handshakes_that_are_never_done_do_not_prolong_settle() -> Result<()> {
    let mut flood = Vec::new();
    let (pod, report) = settle_while(|listener| {
        let deaf = |s: &_| Ok(raw::deafen(s)?);
        flood.push(dial(listener.local_addr()?, libc::IPPROTO_TCP, deaf)?);
        // The older ones make room: their SYN was answered long ago.
        if flood.len() > 200 {
            flood.remove(0);
        }
        Ok(())
    })?;
    // The kernel tells of those that are under way as SYN_RECV; beside the listener.
    let rows = pod.namespace.run(proc_net::rows)?;
    ensure!(flood.len() > 100, "only {} handshakes", flood.len());
    ensure!(
        rows.iter().all(|row| matches!(row.state, 3 | 10)),
        "{rows:?}"
    );
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        u128::from(report.held_ms) < SETTLE_MAX.as_millis(),
        "{report:?}"
    );
    ensure!(report.arrived == Some(0), "{report:?}");
    ensure!(report.late_peers.is_empty(), "{report:?}");
    Ok(())
}

fn handshakes_that_are_done_prolong_settle_to_its_maximum() -> Result<()> {
    let mut arrived = 0;
    let (pod, report) = settle_while(|listener| {
        let client = TcpStream::connect(listener.local_addr()?)?;
        // A reset, which leaves no TIME_WAIT behind.
        sockets::reset(listener.accept()?.0)?;
        drop(client);
        arrived += 1;
        Ok(())
    })?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        u128::from(report.held_ms) >= SETTLE_MAX.as_millis(),
        "{report:?}"
    );
    let [late] = report.late_peers.as_slice() else {
        bail!("{report:?}")
    };
    ensure!(late.address == pod.host_v4(), "{report:?}");
    ensure!(Some(late.flows) == report.arrived, "{report:?}");
    // Some came before the drain had begun, and perhaps one after it.
    ensure!((100..=arrived).contains(&late.flows), "{report:?}");
    Ok(())
}
