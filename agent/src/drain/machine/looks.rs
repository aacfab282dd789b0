//! When to look again: soon, but never in a hot loop.

use std::time::Duration;

use crate::clock::BootTime;

/// The pause after a look that did not release doubles from the first to the second …
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// … and starts anew when nobody has looked for this long.
const PAUSE_FORGET: Duration = Duration::from_millis(500);
/// The pause after the first failed look; it doubles with each that follows.
const RETRY_MIN: Duration = Duration::from_millis(50);
/// With so many failed looks in a row, some 3 s, the pod is untracked.
pub(super) const RETRIES: u32 = 6;

/// When to look.
#[derive(Debug, Default)]
pub(super) struct Looks {
    /// One is under way.
    pub(super) outstanding: bool,
    /// There is a reason to look as soon as may be.
    pub(super) wanted: bool,
    /// The look before the deadline has been asked for.
    pub(super) final_asked: bool,
    /// When the last one came back.
    pub(super) ended: Option<BootTime>,
    /// How long to wait after it.
    pause: Duration,
    /// Failures in a row.
    failures: u32,
}

impl Looks {
    /// There has been none, and there is to be one.
    pub(super) fn wanted() -> Self {
        Self {
            wanted: true,
            ..Self::default()
        }
    }

    /// A look came back, with what was to be seen or without.
    pub(super) fn came_back(&mut self, now: BootTime, well: bool) {
        self.outstanding = false;
        self.failures = if well { 0 } else { self.failures + 1 };
        let long_ago = self
            .ended
            .is_none_or(|ended| now.since(ended) >= PAUSE_FORGET);
        self.pause = if !well {
            RETRY_MIN * 2_u32.saturating_pow(self.failures - 1)
        } else if long_ago {
            PAUSE_MIN
        } else {
            (self.pause * 2).min(PAUSE_MAX)
        };
        self.ended = Some(now);
    }

    /// The earliest moment of the next look, if there has been one.
    pub(super) fn not_before(&self) -> Option<BootTime> {
        Some(self.ended? + self.pause)
    }

    /// So many have failed in a row that there is no use in another.
    pub(super) fn given_up(&self) -> bool {
        self.failures >= RETRIES
    }
}
