//! When to look again: soon, but never in a hot loop.

use std::time::Duration;

use crate::clock::BootTime;

/// The pause after a walk that did not release doubles from the first to the second …
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// … and starts anew when nobody has walked for this long.
const PAUSE_FORGET: Duration = Duration::from_millis(500);
/// The pause after the first failed look; it doubles with each that follows.
const RETRY_MIN: Duration = Duration::from_millis(50);
/// With so many failed looks in a row, which takes some 1.5 s if they fail at once, the pod is untracked.
pub(super) const RETRIES: u32 = 6;

/// So many lookups in a row may be outdated before a walk is made instead.
const OUTDATED: u32 = 4;

/// When to look.
#[derive(Debug, Default)]
pub(super) struct Looks {
    /// One is under way.
    pub(super) outstanding: bool,
    /// There is a reason to walk as soon as may be.
    pub(super) wanted: bool,
    /// The look before the deadline has been asked for.
    pub(super) final_asked: bool,
    /// When the last one came back, of whichever kind.
    pub(super) ended: Option<BootTime>,
    /// When the last walk came back, if what it showed can be built upon.
    pub(super) base: Option<BootTime>,
    /// The moment by which edges were lost: no walk that was begun before can be built upon.
    lost: Option<BootTime>,
    /// When the last walk came back.
    walked: Option<BootTime>,
    /// How long to wait after it.
    pause: Duration,
    /// Failures in a row.
    failures: u32,
    /// Outdated lookups in a row.
    outdated: u32,
    /// How many came back, of each kind.
    pub(super) walks: u32,
    pub(super) lookups: u32,
}

impl Looks {
    /// There has been none, and there is to be one.
    pub(super) fn wanted() -> Self {
        Self {
            wanted: true,
            ..Self::default()
        }
    }

    /// A walk came back, with what was to be seen at `taken_at` or without.
    pub(super) fn walked(&mut self, now: BootTime, taken_at: Option<BootTime>) {
        self.outstanding = false;
        let well = taken_at.is_some();
        self.failures = if well { 0 } else { self.failures + 1 };
        let long_ago = self
            .walked
            .is_none_or(|walked| now.since(walked) >= PAUSE_FORGET);
        self.pause = if !well {
            RETRY_MIN * 2_u32.saturating_pow(self.failures - 1)
        } else if long_ago {
            PAUSE_MIN
        } else {
            (self.pause * 2).min(PAUSE_MAX)
        };
        self.walked = Some(now);
        self.ended = Some(now);
        let whole = taken_at.is_some_and(|taken| self.lost.is_none_or(|lost| lost <= taken));
        self.base = whole.then_some(now);
        self.outdated = 0;
        self.walks += 1;
    }

    /// Lookups came back that say something.
    pub(super) fn looked_up(&mut self, now: BootTime) {
        self.outstanding = false;
        self.ended = Some(now);
        self.outdated = 0;
        self.lookups += 1;
    }

    /// Lookups came back that were worth nothing. They may be repeated at once, but not for ever.
    pub(super) fn outdated(&mut self, now: BootTime) {
        self.outdated += 1;
        if self.outdated >= OUTDATED {
            self.unclear(now);
        }
        self.outstanding = false;
    }

    /// Lookups came back that can't tell. Only a walk can.
    pub(super) fn unclear(&mut self, now: BootTime) {
        self.outstanding = false;
        self.ended = Some(now);
        self.base = None;
        self.wanted = true;
    }

    /// Edges were lost: there is nothing to build upon until a walk that is begun from now on.
    pub(super) fn lost(&mut self, now: BootTime) {
        self.lost = Some(now);
        self.base = None;
        self.wanted = true;
    }

    /// The earliest moment of the next walk, if there has been one.
    pub(super) fn not_before(&self) -> Option<BootTime> {
        Some(self.walked? + self.pause)
    }

    /// The earliest moment of the next lookups. They wait for no walk, but never spin.
    pub(super) fn lookups_not_before(&self) -> Option<BootTime> {
        let ended = self.ended?;
        Some(if self.walked == self.ended || self.outdated > 0 {
            ended
        } else {
            ended + PAUSE_MIN
        })
    }

    /// So many have failed in a row that there is no use in another.
    pub(super) fn given_up(&self) -> bool {
        self.failures >= RETRIES
    }
}
