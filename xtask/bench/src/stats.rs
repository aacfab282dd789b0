//! Percentiles, medians, ratios and their intervals.

use anyhow::{Result, bail};

/// The percentile `p` (0 to 1) by the nearest-rank method.
///
/// # Errors
/// If there are no values.
pub(crate) fn percentile(values: &[f64], p: f64) -> Result<f64> {
    if values.is_empty() {
        bail!("nothing was measured");
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (p * sorted.len() as f64).ceil() as usize;
    Ok(sorted[rank.clamp(1, sorted.len()) - 1])
}

/// The median. Of an even number of values, the mean of the two in the middle.
///
/// # Errors
/// If there are no values.
pub(crate) fn median(values: &[f64]) -> Result<f64> {
    let low = percentile(values, 0.5)?;
    if values.len() % 2 == 1 {
        return Ok(low);
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    Ok((low + sorted[sorted.len() / 2]) / 2.0)
}

/// A median with its confidence interval.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interval {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// The least probability that an [`Interval`] contains the true median.
const CONFIDENCE: f64 = 0.95;

/// The median with its confidence interval by the sign test, which holds for any distribution: the true median is below
/// the k-th smallest of n values as often as fewer than k of n coin tosses are heads. With fewer than six values no
/// interval reaches the confidence, and the range of all values is returned.
///
/// # Errors
/// If there are no values.
pub(crate) fn interval(values: &[f64]) -> Result<Interval> {
    let median = median(values)?;
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    let mut tosses = 0.5_f64.powi(n as i32);
    let mut outside = 2.0 * tosses;
    let mut cut = 0;
    // Cut one more value off at each end while the confidence is kept.
    while cut + 1 < n.div_ceil(2) {
        tosses *= (n - cut) as f64 / (cut + 1) as f64;
        outside += 2.0 * tosses;
        if outside > 1.0 - CONFIDENCE {
            break;
        }
        cut += 1;
    }
    Ok(Interval {
        median,
        low: sorted[cut],
        high: sorted[n - 1 - cut],
    })
}

/// The [`ratio`] with its interval.
///
/// # Errors
/// As [`ratio`].
pub(crate) fn ratio_interval(of: &[f64], to: &[f64]) -> Result<Interval> {
    interval(&ratios(of, to)?)
}

/// A random order that is the same in each run (splitmix64).
#[derive(Default)]
pub(crate) struct Shuffle(u64);

impl Shuffle {
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for n in (2..=items.len()).rev() {
            let other = (self.next() % n as u64) as usize;
            items.swap(n - 1, other);
        }
    }

    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

/// The median of `of ÷ to` over pairs. Both values of a pair are measured one after the other, so that a disturbance of
/// the machine affects both.
///
/// # Errors
/// If there are no pairs, or a baseline is zero.
pub(crate) fn ratio(of: &[f64], to: &[f64]) -> Result<f64> {
    median(&ratios(of, to)?)
}

fn ratios(of: &[f64], to: &[f64]) -> Result<Vec<f64>> {
    if of.len() != to.len() || to.contains(&0.0) {
        bail!("not pairs, or a baseline of zero: {of:?} and {to:?}");
    }
    Ok(of.iter().zip(to).map(|(of, to)| of / to).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 0.5).unwrap(), 50.0);
        assert_eq!(percentile(&values, 0.99).unwrap(), 99.0);
        assert_eq!(percentile(&values, 1.0).unwrap(), 100.0);
        assert_eq!(percentile(&values, 0.0).unwrap(), 1.0);
        assert_eq!(percentile(&[7.0], 0.99).unwrap(), 7.0);
    }

    #[test]
    fn the_median_of_an_even_number_of_values_is_the_mean_of_the_middle_two() {
        assert_eq!(median(&[4.0, 1.0, 3.0]).unwrap(), 3.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]).unwrap(), 2.5);
    }

    #[test]
    fn an_outlier_pair_does_not_move_a_ratio() {
        let off = [100.0, 50.0, 100.0, 80.0, 90.0];
        let on = [99.0, 49.5, 10.0, 79.2, 89.1];
        assert!((ratio(&on, &off).unwrap() - 0.99).abs() < 1e-9);
    }

    #[test]
    fn an_interval_is_the_narrowest_that_keeps_the_confidence() {
        let ends = |n: i32| {
            let values: Vec<f64> = (1..=n).rev().map(f64::from).collect();
            let i = interval(&values).unwrap();
            (i.low, i.median, i.high)
        };
        // As tables of the sign test have it: 2 × P(X ≤ cut − 1) ≤ 5 %.
        assert_eq!(ends(11), (2.0, 6.0, 10.0));
        assert_eq!(ends(33), (11.0, 17.0, 23.0));
        assert_eq!(ends(6), (1.0, 3.5, 6.0));
        assert_eq!(ends(3), (1.0, 2.0, 3.0));
        assert_eq!(ends(1), (1.0, 1.0, 1.0));
    }

    #[test]
    fn a_shuffle_keeps_all_items_and_moves_each_to_every_place() {
        let mut shuffle = Shuffle::default();
        let mut seen = [[false; 3]; 3];
        for _ in 0..50 {
            let mut order = [0, 1, 2];
            shuffle.shuffle(&mut order);
            for (place, which) in order.iter().enumerate() {
                seen[place][*which] = true;
            }
            order.sort_unstable();
            assert_eq!(order, [0, 1, 2]);
        }
        assert_eq!(seen, [[true; 3]; 3]);
    }

    #[test]
    fn nothing_measured_is_an_error_and_never_a_zero() {
        assert!(median(&[]).is_err());
        assert!(percentile(&[], 0.5).is_err());
        assert!(ratio(&[1.0], &[]).is_err());
        assert!(ratio(&[1.0], &[0.0]).is_err());
    }
}
