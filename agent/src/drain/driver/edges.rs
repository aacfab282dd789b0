//! What the kernel reports, brought to the drain that it is about.

use super::{Changed, DrainId, Drains, Kernel};
use crate::{
    drain::machine::Event,
    flow::TcpState,
    kernel::{Edge, KernelEvent},
    pods::{Pod, Scope},
};

impl<K: Kernel> Drains<K> {
    /// Takes in the events that are here.
    pub(super) fn take_in_edges(&mut self) {
        for _ in 0..self.events.len() {
            let event = self.events.try_recv().ok();
            self.kernel_event(event);
        }
    }

    /// Takes in an event; `None`: there will be no more.
    pub(super) fn kernel_event(&mut self, event: Option<KernelEvent>) {
        match event {
            Some(KernelEvent::Edge(edge)) => self.edge(&edge),
            Some(KernelEvent::Lost) => self.step_all(&Event::Lost),
            None => {
                let why = "the kernel's events have ended".to_owned();
                self.blind = Some(why.clone());
                self.changed = Changed::Drains;
                self.step_all(&Event::Untracked(why));
            }
        }
    }

    /// Has the edges of this pod brought to its drain.
    pub(super) fn index(&mut self, id: DrainId, pod: &Pod) {
        self.by_uid.insert(pod.name.uid.clone(), id);
        match &pod.scope {
            Scope::Netns { inode, .. } => {
                self.by_netns.insert(*inode, id);
            }
            Scope::HostNetwork(cgroups) => self.by_cgroup.extend(cgroups.iter().map(|c| (*c, id))),
            Scope::Untracked(_) => {}
        }
    }

    fn edge(&mut self, edge: &Edge) {
        let drain = self
            .by_netns
            .get(&edge.netns)
            .or_else(|| self.by_cgroup.get(&edge.cgroup));
        let Some((&id, active)) = drain.and_then(|id| Some((id, self.active.get_mut(id)?))) else {
            return;
        };
        if active.watch == Some(edge.watch) {
            active.received += 1;
        }
        if !edge.own {
            self.flow_changed(id, edge);
        }
        self.no_longer_owed(id);
    }

    fn flow_changed(&mut self, id: DrainId, edge: &Edge) {
        let Some(active) = self.active.get(&id) else {
            return;
        };
        if !active.machine.policy().holds_port(edge.local.port())
            || active.pod.has_to_itself(edge.remote.ip())
        {
            return;
        }
        let Edge {
            cookie,
            local,
            remote,
            at,
            ..
        } = *edge;
        match (edge.from, edge.to) {
            (_, TcpState::FinWait2 | TcpState::TimeWait | TcpState::Close) => {
                self.step(id, Event::FlowClosed { cookie, at });
            }
            // A fast-open child may be answered and closed by either end before its handshake is done, and is a
            // flow still for as long as the answer is under way.
            (
                TcpState::SynRecv,
                TcpState::Established
                | TcpState::CloseWait
                | TcpState::FinWait1
                | TcpState::Closing
                | TcpState::LastAck,
            ) => {
                self.step(
                    id,
                    Event::FlowOpened {
                        cookie,
                        local,
                        remote,
                        at,
                    },
                );
            }
            _ => {}
        }
    }
}
