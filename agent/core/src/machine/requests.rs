//! The requests for dumps and lookups: which is outstanding, which is wanted, and when the next may be made. Soon, but
//! never in a hot loop.

use std::{collections::BTreeMap, time::Duration};

use super::RESYNC;
use crate::{clock::BootTime, drain_report::DumpReason};

/// The shortest and the longest pause after a dump that did not release. Each further dump doubles the pause.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// After this long without a dump, the pause is [`PAUSE_MIN`] again.
const PAUSE_FORGET: Duration = Duration::from_millis(500);
/// The pause after the first failed dump; it doubles with each of the next few.
const RETRY_MIN: Duration = Duration::from_millis(50);
/// After so many failed dumps in a row, which takes some 1.5 s if they fail at once, the pod is untracked, unless flows
/// are known.
pub(super) const MAX_FAILED_DUMPS: u32 = 6;

/// So many lookups in a row may be outdated before a dump is made instead.
const MAX_OUTDATED: u32 = 4;

/// The dumps and lookups of one drain.
#[derive(Debug, Default)]
pub(super) struct Requests {
    /// One is under way.
    pub(super) outstanding: bool,
    /// Why a dump is wanted as soon as possible, if one is.
    pub(super) wanted: Option<DumpReason>,
    /// The dump before the deadline has been requested.
    pub(super) final_asked: bool,
    /// When the last dump or lookup came back.
    pub(super) ended: Option<BootTime>,
    /// When the last dump came back, if lookups can build on it.
    pub(super) base: Option<BootTime>,
    /// Flows may hold that no event announces, so that lookups show too little.
    pub(super) dumps_only: bool,
    /// When events were lost: lookups can't build on a dump that began before.
    lost: Option<BootTime>,
    /// When the last dump came back.
    dumped: Option<BootTime>,
    /// How long to wait after the last dump.
    pause: Duration,
    /// Failed dumps in a row.
    failures: u32,
    /// Outdated lookups in a row.
    outdated: u32,
    /// Dumps that came back, failed ones included.
    pub(super) dumps_ended: u32,
    /// Rounds of lookups that came back with an answer.
    pub(super) lookups: u32,
    /// Dumps that were requested, by reason.
    pub(super) reasons: BTreeMap<DumpReason, u32>,
}

impl Requests {
    /// No request was made, and a dump is wanted.
    pub(super) fn wanted(dumps_only: bool) -> Self {
        Self {
            wanted: Some(DumpReason::First),
            dumps_only,
            ..Self::default()
        }
    }

    /// A dump came back. `taken_at`: when it was made; `None`: it failed.
    pub(super) fn dumped(&mut self, now: BootTime, taken_at: Option<BootTime>) {
        self.outstanding = false;
        let well = taken_at.is_some();
        self.failures = if well { 0 } else { self.failures + 1 };
        let long_ago = self
            .dumped
            .is_none_or(|dumped| now.since(dumped) >= PAUSE_FORGET);
        self.pause = if !well {
            (RETRY_MIN * 2_u32.saturating_pow(self.failures.min(MAX_FAILED_DUMPS) - 1)).min(RESYNC)
        } else if long_ago {
            PAUSE_MIN
        } else {
            (self.pause * 2).min(PAUSE_MAX)
        };
        self.dumped = Some(now);
        self.ended = Some(now);
        let whole = taken_at.is_some_and(|taken| self.lost.is_none_or(|lost| lost <= taken));
        self.base = (whole && !self.dumps_only).then_some(now);
        self.outdated = 0;
        self.dumps_ended += 1;
    }

    /// Lookups came back with an answer.
    pub(super) fn looked_up(&mut self, now: BootTime) {
        self.outstanding = false;
        self.ended = Some(now);
        self.outdated = 0;
        self.lookups += 1;
    }

    /// Lookups came back that were outdated. They are repeated at once, a few times; then a dump is made.
    pub(super) fn outdated(&mut self, now: BootTime) {
        self.outdated += 1;
        if self.outdated >= MAX_OUTDATED {
            self.unclear(DumpReason::EventsLate, now);
        }
        self.outstanding = false;
    }

    /// Lookups came back without an answer: a dump is needed.
    pub(super) fn unclear(&mut self, why: DumpReason, now: BootTime) {
        self.outstanding = false;
        self.ended = Some(now);
        self.base = None;
        self.want(why);
    }

    /// A dump is wanted as soon as possible. The first reason is kept.
    pub(super) fn want(&mut self, why: DumpReason) {
        self.wanted.get_or_insert(why);
    }

    /// Events were lost: lookups are worth nothing until a dump that begins from now on.
    pub(super) fn lost(&mut self, now: BootTime) {
        self.lost = Some(now);
        self.base = None;
        self.want(DumpReason::EventsLost);
    }

    /// There will be no more events: only dumps show what is open.
    pub(super) fn without_events(&mut self) {
        self.dumps_only = true;
        self.base = None;
        self.want(DumpReason::EventsLost);
    }

    /// The earliest moment of the next dump; `None`: there was none yet.
    pub(super) fn not_before(&self) -> Option<BootTime> {
        Some(self.dumped? + self.pause)
    }

    /// The earliest moment of the next lookups. They wait for no dump, but never spin.
    pub(super) fn lookups_not_before(&self) -> Option<BootTime> {
        let ended = self.ended?;
        Some(if self.dumped == self.ended || self.outdated > 0 {
            ended
        } else {
            ended + PAUSE_MIN
        })
    }

    /// Whether so many dumps have failed in a row that another is pointless.
    pub(super) fn given_up(&self) -> bool {
        self.failures >= MAX_FAILED_DUMPS
    }
}
