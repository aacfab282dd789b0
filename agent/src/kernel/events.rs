//! State changes of watched workloads, out of the ring buffer.

use std::{net::SocketAddr, sync::Arc};

use aya::maps::{Array, MapData, RingBuf};
use ebb_common::LOST_EVENT;
use tokio::{io::unix::AsyncFdReadyGuard, sync::mpsc};

use super::{Edge, KernelEvent, bytes::Bytes, pod_listener::OwnPorts, poll, sock_diag::ip};
use crate::{
    clock::BootTime,
    flow::TcpState,
    ids::{CgroupId, NetnsInode, SocketCookie, WatchId},
};

/// Forwards events until the receiver is gone. Woken by the kernel, and only while something is watched.
///
/// # Errors
///
/// The ring buffer can't be waited for; the caller treats it as lost tracking.
pub(super) async fn forward(
    ring: RingBuf<MapData>,
    lost: Arc<Array<MapData, u64>>,
    own: Arc<OwnPorts>,
    to: mpsc::Sender<KernelEvent>,
) -> std::io::Result<()> {
    let mut ring = poll::readable(ring)?;
    let mut lost_before = 0;
    loop {
        let mut guard: AsyncFdReadyGuard<'_, _> = tokio::select! {
            guard = ring.readable() => guard?,
            () = to.closed() => return Ok(()),
        };
        guard.clear_ready();
        drop(guard);
        while let Some(edge) = ring.get_mut().next().map(|item| decode(Bytes(&item))) {
            // The kernel wrote it: bytes that are no event would be a bug, and are treated as a loss.
            let event = edge.map_or(KernelEvent::Lost, |edge| {
                KernelEvent::Edge(Edge {
                    own: own.has(edge.netns, edge.local, edge.remote),
                    ..edge
                })
            });
            if to.send(event).await.is_err() {
                return Ok(());
            }
        }
        // A full ring has events in it, so whoever lost one also gets here.
        let lost_now = lost.get(&LOST_EVENT, 0).unwrap_or(u64::MAX);
        if lost_now != lost_before {
            lost_before = lost_now;
            if to.send(KernelEvent::Lost).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// `ebb_common::FlowEvent`.
fn decode(mut e: Bytes<'_>) -> Option<Edge> {
    let at = BootTime::from_nanos(e.u64()?);
    let cookie = SocketCookie(e.u64()?);
    let cgroup = CgroupId(e.u64()?);
    let netns = NetnsInode(e.u32()?);
    let watch = WatchId(u16::try_from(e.u32()?).ok()?);
    let (local, remote) = (e.array()?, e.array()?);
    let (local_port, remote_port) = (e.u16()?, e.u16()?);
    let family = u8::try_from(e.u16()?).ok()?;
    Some(Edge {
        cgroup,
        netns,
        watch,
        cookie,
        local: SocketAddr::new(ip(family, local), local_port),
        remote: SocketAddr::new(ip(family, remote), remote_port),
        from: TcpState::try_from(e.u8()?).ok()?,
        to: TcpState::try_from(e.u8()?).ok()?,
        at,
        own: false,
    })
}
