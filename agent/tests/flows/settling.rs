//! What prolongs the settle phase of a drain, with the real tracker and the real driver.

use std::{
    collections::BTreeMap,
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread::{self, sleep},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use ebb::{
    drains::driver::{Drains, HoldOrder},
    pods::Pod,
};
use ebb_core::{
    drain_report::{ReleaseReason, Report},
    ids::{PodName, PodUid, SandboxId},
    policy::Policy,
    scope::Scope,
};
use ebb_testkit::proc_net;
use tokio::{sync::mpsc, time::timeout};

use crate::support::{
    kernel,
    link::Linked,
    raw,
    sockets::{self, dial, listener_with},
    world::scope_of_this_thread,
};

ebb_testkit::trials![
    unfinished_handshakes_do_not_prolong_settle,
    finished_handshakes_prolong_settle_to_its_maximum,
];

/// Longer than a flood's pause between two handshakes, and than a busy machine stalls.
const QUIET: Duration = Duration::from_secs(2);
const SETTLE_MAX: Duration = Duration::from_secs(6);
const TIMEOUT: Duration = Duration::from_secs(30);

/// Drains the pod of the calling thread's namespace.
fn settle(scope: Scope) -> Result<Arc<Report>> {
    let (tracker, events) = kernel::start()?;
    let kernel = Arc::new(tracker.clone());
    let pod = Pod {
        name: PodName {
            uid: PodUid::new("u"),
            namespace: "default".into(),
            name: "pod".into(),
        },
        sandbox: SandboxId::new("s"),
        scope,
        ips: vec![],
        workload: None,
        labels: BTreeMap::new(),
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
        grace: Some(TIMEOUT * 2),
        rpc_timeout: None,
        deletion: None,
        is_stop: true,
        is_not_deleted: false,
        is_unanswered: false,
        traceparent: None,
        is_listed: true,
    };
    let report = kernel::wait(async {
        let (notices, _receiver) = mpsc::unbounded_channel();
        let drains = Drains::spawn(kernel, events, None, notices);
        let hold = drains.hold(order).await;
        let report = timeout(TIMEOUT, hold.released()).await;
        report.context("still held")
    })?;
    kernel::lost_nothing(&tracker)?;
    Ok(report)
}

/// Drains a pod with a listener, and calls `connect` on the host's network until the drain ends.
fn settle_while(
    mut connect: impl FnMut(&TcpListener) -> Result<()>,
) -> Result<(Linked, Arc<Report>)> {
    let pod = Linked::new()?;
    let any = (pod.v4(), 0).into();
    let listener = pod
        .namespace
        .run(|| listener_with(any, 256, libc::IPPROTO_TCP, |_| Ok(())))?;
    let report = thread::scope(|s| {
        let settling = s.spawn(|| pod.namespace.run(|| settle(scope_of_this_thread()?)));
        while !settling.is_finished() {
            connect(&listener)?;
            sleep(Duration::from_millis(5));
        }
        settling.join().unwrap_or_else(|_| bail!("panicked"))
    })?;
    Ok((pod, report))
}

fn unfinished_handshakes_do_not_prolong_settle() -> Result<()> {
    let mut flood = Vec::new();
    let (pod, report) = settle_while(|listener| {
        let blocked = |s: &_| Ok(raw::block_receive(s)?);
        flood.push(dial(listener.local_addr()?, libc::IPPROTO_TCP, blocked)?);
        // The server answered the older ones' SYNs long ago.
        if flood.len() > 200 {
            flood.remove(0);
        }
        Ok(())
    })?;
    // Beside the listener, the kernel lists the unfinished handshakes as SYN_RECV.
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

fn finished_handshakes_prolong_settle_to_its_maximum() -> Result<()> {
    let mut arrived = 0;
    let (pod, report) = settle_while(|listener| {
        let client = TcpStream::connect(listener.local_addr()?)?;
        // A reset leaves no TIME_WAIT socket behind.
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
    // Some came before the drain began, and perhaps one after its end.
    ensure!((100..=arrived).contains(&late.flows), "{report:?}");
    Ok(())
}
