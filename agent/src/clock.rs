//! The one clock ebb decides by: `CLOCK_BOOTTIME`, which goes on during suspend, never jumps, is the
//! same for all processes of one boot, and is what the BPF programs stamp their events with
//! (`bpf_ktime_get_boot_ns`).

use std::{
    fs, io,
    ops::Add,
    time::{Duration, SystemTime},
};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Identifies this boot of the kernel (`random(4)`): what is of another one, times included, says nothing.
///
/// # Errors
///
/// The kernel does not tell.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// A moment on the boot-time clock, in nanoseconds since boot.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct BootTime(u64);

impl BootTime {
    /// Now, from the kernel.
    pub fn now() -> Self {
        let t = clock_gettime(ClockId::Boottime);
        // The kernel returns neither negative seconds nor 10^9 nanoseconds and more.
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

    /// The moment so long before this one; the boot, if that was later.
    pub const fn before(self, d: Duration) -> Self {
        let nanos = d.as_nanos();
        if nanos > self.0 as u128 {
            return Self(0);
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "it is no more than the moment's own"
        )]
        Self(self.0 - nanos as u64)
    }

    /// This moment as wall-clock time, by today's difference between the two clocks.
    pub fn to_system_time(self) -> SystemTime {
        let now = Self::now();
        let wall = SystemTime::now();
        if self >= now {
            wall + self.since(now)
        } else {
            wall - now.since(self)
        }
    }
}

/// A duration in whole milliseconds, as reports give it.
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
