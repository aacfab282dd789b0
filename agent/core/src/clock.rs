//! The clock of all decisions: `CLOCK_BOOTTIME`. It counts during suspend, never jumps and is the same for all
//! processes of one boot. The BPF programs stamp their events with it, too (`bpf_ktime_get_boot_ns`).

use std::{
    ops::Add,
    time::{Duration, SystemTime},
};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A moment on the boot-time clock, in nanoseconds since boot.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct BootTime(u64);

impl BootTime {
    /// The current time, from the kernel.
    pub fn now() -> Self {
        let t = clock_gettime(ClockId::Boottime);
        // The kernel returns no negative seconds, and less than 10^9 nanoseconds.
        Self(t.tv_sec.unsigned_abs() * 1_000_000_000 + t.tv_nsec.unsigned_abs())
    }

    /// A moment `nanos` nanoseconds after boot.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since boot.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Time from `earlier` until this moment; zero if `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// The moment `d` before this one, but not before the boot.
    pub const fn before(self, d: Duration) -> Self {
        let nanos = d.as_nanos();
        if nanos > self.0 as u128 {
            return Self(0);
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "not larger than the moment's own nanoseconds"
        )]
        Self(self.0 - nanos as u64)
    }

    /// The moment of a wall-clock time, by the current difference between the two clocks.
    pub fn from_system_time(t: SystemTime) -> Self {
        let now = Self::now();
        match SystemTime::now().duration_since(t) {
            Ok(ago) => now.before(ago),
            Err(ahead) => now + ahead.duration(),
        }
    }

    /// This moment as wall-clock time, by the current difference between the two clocks.
    fn to_system_time(self) -> SystemTime {
        let now = Self::now();
        let wall = SystemTime::now();
        if self >= now {
            wall + self.since(now)
        } else {
            wall - now.since(self)
        }
    }

    /// This moment as wall-clock time, as in reports (RFC 3339, UTC).
    pub fn rfc3339(self) -> String {
        humantime::format_rfc3339_millis(self.to_system_time()).to_string()
    }
}

/// A duration in whole milliseconds, as in reports.
pub fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

impl Add<Duration> for BootTime {
    type Output = Self;

    /// Saturates at the end of the clock, some 584 years after boot.
    fn add(self, d: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)),
        )
    }
}
