//! Finds the drain of each event of the kernel.

use ebb_core::machine::Event;

use super::{Changed, Drains, Kernel};
use crate::kernel::{KernelEvent, SocketChange, SocketEvent};

impl<K: Kernel> Drains<K> {
    /// Takes in the events that have arrived.
    pub(super) fn take_in_events(&mut self) {
        for _ in 0..self.events.len() {
            let event = self.events.try_recv().ok();
            self.kernel_event(event);
        }
    }

    /// Takes in an event; `None`: there will be no more.
    pub(super) fn kernel_event(&mut self, event: Option<KernelEvent>) {
        match event {
            Some(KernelEvent::Socket(event)) => self.socket_event(&event),
            Some(KernelEvent::Lost) => self.step_all(&Event::Lost),
            None => {
                let why = "the kernel's events have ended".to_owned();
                self.blind = Some(why.clone());
                self.changed = Changed::Drains;
                self.step_all(&Event::Untracked(why));
            }
        }
    }

    fn socket_event(&mut self, event: &SocketEvent) {
        let Some(id) = self.active.of_event(event) else {
            return;
        };
        let Some(active) = self.active.get_mut(id) else {
            return;
        };
        if active.watch == Some(event.watch) {
            active.received += 1;
        }
        if !event.exempt
            && active.machine.policy().holds_port(event.local.port())
            && !active.pod.is_own_ip(event.remote.ip())
        {
            let SocketEvent {
                cookie,
                local,
                remote,
                at,
                ..
            } = *event;
            let event = match event.change {
                SocketChange::Closed => Event::FlowClosed { cookie, at },
                SocketChange::Opened => Event::FlowOpened {
                    cookie,
                    local,
                    remote,
                    at,
                },
            };
            self.step(id, event);
        }
        self.events_arrived(id);
    }
}
