//! The schedule: when the next dump or lookup is due.

use super::{
    MAX_LOOKUPS, RESYNC,
    closing::{Closing, ROUND_INTERVAL},
    flows::OpenFlows,
    idleness::MIN_IDLE_INTERVAL,
    requests::Requests,
};
use crate::{
    clock::BootTime,
    drain_report::{DumpReason, Phase},
};

/// What the schedule depends on.
pub(super) struct Schedule<'a> {
    pub(super) phase: Phase,
    pub(super) started: BootTime,
    /// When the last dump before the deadline is made.
    pub(super) final_dump: BootTime,
    pub(super) requests: &'a Requests,
    pub(super) flows: &'a OpenFlows,
    /// The rounds of closing idle flows, if the policy closes them.
    pub(super) closing: Option<&'a Closing>,
}

/// A dump or lookup to come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Due {
    pub(super) at: BootTime,
    /// Why it is a dump; `None`: lookups suffice.
    pub(super) dump: Option<DumpReason>,
}

impl Schedule<'_> {
    /// The next dump or lookup; `None` while one is outstanding, and if none is of use.
    pub(super) fn next(&self) -> Option<Due> {
        if self.requests.outstanding {
            return None;
        }
        let last =
            (!self.requests.final_asked).then(|| dump_at(self.final_dump, DumpReason::Deadline));
        let next = if self.phase == Phase::Drain {
            Some(self.next_in_drain())
        } else {
            let wanted = self.requests.wanted;
            wanted.map(|why| dump_at(self.dumps_not_before(), why))
        };
        // If both are due at the same moment, the dump, which shows more.
        [last, next].into_iter().flatten().min_by_key(|due| due.at)
    }

    fn next_in_drain(&self) -> Due {
        let soon = |why| dump_at(self.dumps_not_before(), why);
        if let Some(why) = self.requests.wanted {
            return soon(why);
        }
        if self.flows.is_one_missed() {
            return soon(DumpReason::Disagreement);
        }
        let ended = self.requests.ended.unwrap_or(self.started);
        match (self.flows.blocked_until(), self.closing) {
            (None, _) if self.can_look_up() => Due {
                at: self.requests.lookups_not_before().unwrap_or(self.started),
                dump: None,
            },
            (None, _) => soon(self.why_no_lookups()),
            (Some(_), Some(closing)) if closing.more() => {
                dump_at(ended + ROUND_INTERVAL, DumpReason::Idle)
            }
            // ebb closes each flow when it becomes idle. The drain ends only when all of them are idle.
            (Some(until), Some(_)) => {
                let idle = self
                    .flows
                    .next_idle()
                    .unwrap_or(until)
                    .max(ended + ROUND_INTERVAL);
                first(
                    dump_at(idle, DumpReason::Idle),
                    dump_at(ended + RESYNC, DumpReason::Resync),
                )
            }
            (Some(until), None) => {
                let at = until.max(ended + MIN_IDLE_INTERVAL);
                let resync = self.requests.base.unwrap_or(ended) + RESYNC;
                let dump = (!self.can_look_up()).then_some(DumpReason::Idle);
                first(Due { at, dump }, dump_at(resync, DumpReason::Resync))
            }
        }
    }

    fn can_look_up(&self) -> bool {
        self.requests.base.is_some() && self.flows.to_look_up(MAX_LOOKUPS).is_some()
    }

    fn why_no_lookups(&self) -> DumpReason {
        if self.requests.base.is_some() {
            DumpReason::ManyFlows
        } else if self.requests.dumps_only {
            DumpReason::Outbound
        } else {
            DumpReason::Retry
        }
    }

    fn dumps_not_before(&self) -> BootTime {
        self.requests.not_before().unwrap_or(self.started)
    }
}

const fn dump_at(at: BootTime, why: DumpReason) -> Due {
    Due {
        at,
        dump: Some(why),
    }
}

/// The earlier one; if both are due at the same moment, the second.
fn first(a: Due, b: Due) -> Due {
    if a.at < b.at { a } else { b }
}
