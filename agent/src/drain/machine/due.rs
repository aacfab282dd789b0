//! When to look next, and how.

use super::{FEW, IDLE_FLOOR, Machine, RESYNC, closing::PACE};
use crate::{
    clock::BootTime,
    drain::report::{LookKind, Phase},
};

impl Machine {
    /// When to look next, and how; `None` while a look is under way, and when there is no use in one.
    pub(super) fn look_due(&self) -> Option<Due> {
        if self.looks.outstanding || self.untracked.is_some() {
            return None;
        }
        let last = (!self.looks.final_asked).then(|| walk_at(self.final_look()));
        let next = if self.phase == Phase::Drain {
            Some(self.next_in_drain())
        } else {
            self.looks.wanted.then(|| walk_at(self.walks_not_before()))
        };
        // Of two at the same moment the walk, which shows more.
        [last, next].into_iter().flatten().min_by_key(|due| due.at)
    }

    fn next_in_drain(&self) -> Due {
        let soon = walk_at(self.walks_not_before());
        let blocked_until = self.flows.blocked_until();
        let ended = self.looks.ended.unwrap_or(self.started);
        match blocked_until {
            _ if self.looks.wanted || self.flows.is_one_missed() => soon,
            None if self.can_look_up() => Due {
                at: self.looks.lookups_not_before().unwrap_or(self.started),
                kind: LookKind::Lookup,
            },
            None => soon,
            Some(_) if self.closing.more() => walk_at(ended + PACE),
            // To close them, each flow counts as it becomes idle; to be drained, all of them must be.
            Some(until) if self.closes_idle() => {
                let until = self.flows.next_idle().unwrap_or(until);
                walk_at(until.max(ended + PACE).min(ended + RESYNC))
            }
            Some(until) => {
                let at = until.max(ended + IDLE_FLOOR);
                let resync = self.looks.base.unwrap_or(ended) + RESYNC;
                if at < resync && self.can_look_up() {
                    Due {
                        at,
                        kind: LookKind::Lookup,
                    }
                } else {
                    walk_at(at.min(resync))
                }
            }
        }
    }

    fn can_look_up(&self) -> bool {
        self.looks.base.is_some() && self.flows.to_look_up(FEW).is_some()
    }

    fn walks_not_before(&self) -> BootTime {
        self.looks.not_before().unwrap_or(self.started)
    }
}

/// A look to come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Due {
    pub(super) at: BootTime,
    pub(super) kind: LookKind,
}

const fn walk_at(at: BootTime) -> Due {
    Due {
        at,
        kind: LookKind::Walk,
    }
}
