//! How often connections come: the gaps between openings, and which openings are not a client's.

use core::mem::size_of;

use crate::{TICK, TICK_SHIFT};

/// The usual gap between the openings of a workload: the mean of the pauses between connections over about the last
/// minute, weighted by their length: a pause of 10 s counts ten times as much as one of 1 s.
///
/// So for connections that come in bursts it is the pause between the bursts, and not the gap within one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Gap {
    /// The mean, in parts of a tick: 2^[`Self::FRACTION`] of them are a [`TICK`].
    pub mean: u32,
    /// Over how many ticks, but at most [`Self::WINDOW`]; 0 before the first gap.
    pub over: u32,
}
const _: () = assert!(size_of::<Gap>() == 8);

impl Gap {
    /// The weight of all earlier gaps is at most this: about a minute.
    pub const WINDOW: u32 = (60_000_000_000 / TICK) as u32;

    /// A short gap changes the mean by much less than a tick.
    const FRACTION: u32 = 10;

    /// Longer gaps count as this one: about 18 minutes.
    const LONGEST: u64 = 1 << 20;

    /// The mean with one gap more, of this many nanoseconds.
    #[inline(always)]
    pub const fn with(self, nanoseconds: u64) -> Self {
        let ticks = nanoseconds >> TICK_SHIFT;
        let gap = if ticks > Self::LONGEST {
            Self::LONGEST
        } else {
            ticks
        };
        let over = self.over as u64 + gap;
        // No product exceeds 2^50.
        let sum = self.mean as u64 * self.over as u64 + ((gap * gap) << Self::FRACTION);
        // Rounded: cut off, many short gaps would take a tick each.
        let Some(mean) = (sum + over / 2).checked_div(over) else {
            return self;
        };
        let window = Self::WINDOW as u64;
        Self {
            mean: mean as u32,
            over: if over > window { window } else { over } as u32,
        }
    }

    /// The usual gap in nanoseconds, of a workload that has been silent for `silence` and was counted for `observed`
    /// nanoseconds. The silence now is a gap, and so is the time before the first opening.
    pub const fn usual(self, silence: u64, observed: u64) -> u64 {
        let mut gap = self.with(silence);
        if gap.over < Self::WINDOW {
            let counted = (self.over as u64 * TICK).saturating_add(silence);
            gap = gap.with(observed.saturating_sub(counted));
        }
        (gap.mean as u64 * TICK) >> Self::FRACTION
    }
}

/// How many cgroups of the kubelet `track` knows.
pub const KUBELET_CGROUPS: usize = 4;

/// The kubelet's cgroups; unused places are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct KubeletCgroups {
    /// Their ids.
    pub each: [u64; KUBELET_CGROUPS],
}
const _: () = assert!(size_of::<KubeletCgroups>() == 8 * KUBELET_CGROUPS);

/// How many places there are for the probes that the kubelet has just dialled. The kubelet's port selects the place.
pub const PROBE_DIALS: usize = 1024;

/// A connection that the kubelet has dialled. Its own end opens before the pod's, so `track` knows the pod's end by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ProbeDial {
    /// The pod's address in the kernel's byte order; an IPv4 address is [`mapped`].
    pub address: [u64; 2],
    /// The kubelet's port; 0 if the place is free.
    pub from: u16,
    /// The pod's port.
    pub to: u16,
    /// Zero.
    pub zero: u32,
}
const _: () = assert!(size_of::<ProbeDial>() == 24);

/// An IPv4 address, given as the kernel stores it, as an IPv6 address.
#[inline(always)]
pub const fn mapped(v4: u32) -> [u64; 2] {
    let [a, b, c, d] = v4.to_ne_bytes();
    [0, u64::from_ne_bytes([0, 0, 0xff, 0xff, a, b, c, d])]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(gaps: impl IntoIterator<Item = u64>) -> Gap {
        let ms = gaps.into_iter().map(|ms| ms * 1_000_000);
        ms.fold(Gap::default(), Gap::with)
    }

    fn mean_ms(gap: Gap) -> u64 {
        ((u64::from(gap.mean) * TICK) >> Gap::FRACTION) / 1_000_000
    }

    #[test]
    fn regular_openings_have_their_period_as_gap_from_the_second_on() {
        for period in [10_u64, 1_000, 20_000] {
            for n in [1, 2, 50] {
                let mean = mean_ms(after(core::iter::repeat_n(period, n)));
                assert!(mean.abs_diff(period) <= 2, "{mean} and not {period}");
            }
        }
    }

    #[test]
    fn the_gap_of_bursts_is_the_pause_between_them() {
        let bursts = (0..10).flat_map(|_| core::iter::repeat_n(2, 100).chain([20_000]));
        assert!(mean_ms(after(bursts)) > 18_000);
    }

    #[test]
    fn many_short_gaps_do_not_wear_the_mean_down() {
        // Pages of 8 connections, one every 400 ms.
        let pages = (0..1000).flat_map(|_| core::iter::repeat_n(20, 7).chain([260]));
        let mean = mean_ms(after(pages));
        assert!((170..180).contains(&mean), "{mean}");
    }

    #[test]
    fn some_busy_minutes_outweigh_a_quiet_night() {
        let night = core::iter::repeat_n(60_000, 300);
        let minutes = core::iter::repeat_n(10, 8 * 60 * 100);
        assert!(mean_ms(after(night.clone())) > 59_000);
        assert!(mean_ms(after(night.chain(minutes))) < 100);
    }

    const SECOND: u64 = 1_000_000_000;

    fn usual_seconds(gap: Gap, silence: u64, observed: u64) -> u64 {
        (gap.usual(silence * SECOND, observed * SECOND) + SECOND / 2) / SECOND
    }

    #[test]
    fn the_silence_now_is_a_gap() {
        let busy = after([1000; 100]);
        assert_eq!(usual_seconds(busy, 1, 600), 1);
        assert!(usual_seconds(busy, 600, 700) > 500);
    }

    #[test]
    fn one_connection_just_now_does_not_make_a_pod_busy() {
        assert_eq!(usual_seconds(Gap::default(), 0, 300), 300);
        assert!(usual_seconds(after([1000]), 1, 302) > 290);
    }

    #[test]
    fn openings_within_one_tick_change_nothing_and_no_gap_overflows() {
        let gap = after([10, 10]);
        assert_eq!(gap.with(0), gap);
        assert_eq!(Gap::default().with(0), Gap::default());
        let long = after([u64::MAX / 1_000_000; 3]);
        assert_eq!(u64::from(long.mean) >> Gap::FRACTION, Gap::LONGEST);
        assert_eq!(long.over, Gap::WINDOW);
    }
}
