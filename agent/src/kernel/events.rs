//! Reads the events of watched workloads from the ring buffer.

use std::{
    net::SocketAddr,
    sync::{Arc, Weak},
};

use ebb_core::{
    clock::BootTime,
    ids::{CgroupId, NetnsInode, SocketCookie, WatchId},
};
use tokio::{io::unix::AsyncFdReadyGuard, sync::mpsc};

use ebb_common::LOST_EVENT;

use super::{
    KernelEvent, SocketChange, SocketEvent, cursor::Cursor, programs::EventSource, sock_diag::ip,
    tracker::TrackerState,
};
use crate::linux::async_fd;

/// How many events are read from the ring buffer at a time. One run of `inspect` checks which of them are probes.
const BATCH: usize = 64;

/// Forwards events until the receiver is dropped. Sleeps until the kernel wakes it, which happens only while a
/// workload is watched.
///
/// # Errors
///
/// The ring buffer can't be polled: no more events will arrive.
pub(super) async fn forward(
    source: EventSource,
    state: Weak<TrackerState>,
    to: mpsc::Sender<KernelEvent>,
) -> std::io::Result<()> {
    let mut ring = async_fd::readable(source.ring)?;
    let mut lost_before = 0;
    loop {
        let mut guard: AsyncFdReadyGuard<'_, _> = tokio::select! {
            guard = ring.readable() => guard?,
            () = to.closed() => return Ok(()),
        };
        guard.clear_ready();
        drop(guard);
        loop {
            let mut batch = Vec::new();
            while batch.len() < BATCH
                && let Some(item) = ring.get_mut().next()
            {
                // Bytes that are not an event would be a bug; they count as a lost event.
                batch.push(decode(Cursor(&item)));
            }
            if batch.is_empty() {
                break;
            }
            let Some(state) = state.upgrade() else {
                return Ok(());
            };
            mark_exempt(&state, &mut batch).await;
            for event in batch {
                let event = event.map_or(KernelEvent::Lost, KernelEvent::Socket);
                if to.send(event).await.is_err() {
                    return Ok(());
                }
            }
        }
        // An event is only lost while the ring buffer is full, so this code runs after each loss.
        let lost_now = source.losses.get(&LOST_EVENT, 0).unwrap_or(u64::MAX);
        if lost_now != lost_before {
            lost_before = lost_now;
            if to.send(KernelEvent::Lost).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// Marks connections to ebb's own listeners, and those that the kubelet dialled. The latter can only be recognised
/// while they are open.
async fn mark_exempt(state: &Arc<TrackerState>, batch: &mut [Option<SocketEvent>]) {
    for event in batch.iter_mut().flatten() {
        event.exempt = state.own_ports.has(event.netns, event.local, event.remote);
    }
    let may_be_probe = |event: &SocketEvent| event.change == SocketChange::Opened && !event.exempt;
    let opened: Vec<_> = batch
        .iter()
        .flatten()
        .filter(|event| may_be_probe(event))
        .map(|event| (event.local, event.remote))
        .collect();
    if opened.is_empty() {
        return;
    }
    let on_thread = Arc::clone(state);
    let probes = state
        .host_thread
        .run(move || on_thread.probes(&opened))
        .await;
    match probes.flatten() {
        Ok(probes) => {
            let opened = batch
                .iter_mut()
                .flatten()
                .filter(|event| may_be_probe(event));
            for (event, probe) in opened.zip(probes) {
                event.exempt = probe;
            }
        }
        // They count as flows.
        Err(e) => tracing::debug!("can't tell which connections are probes: {e}"),
    }
}

/// Decodes `ebb_common::FlowEvent`.
fn decode(mut e: Cursor<'_>) -> Option<SocketEvent> {
    let at = BootTime::from_nanos(e.u64()?);
    let cookie = SocketCookie(e.u64()?);
    let cgroup = CgroupId(e.u64()?);
    let netns = NetnsInode(e.u32()?);
    let watch = WatchId(e.u32()?);
    let (local, remote) = (e.array()?, e.array()?);
    let (local_port, remote_port) = (e.u16()?, e.u16()?);
    let family = u8::try_from(e.u16()?).ok()?;
    Some(SocketEvent {
        cgroup,
        netns,
        watch,
        cookie,
        local: SocketAddr::new(ip(family, local), local_port),
        remote: SocketAddr::new(ip(family, remote), remote_port),
        change: if e.u16()? == 0 {
            SocketChange::Closed
        } else {
            SocketChange::Opened
        },
        at,
        exempt: false,
    })
}
