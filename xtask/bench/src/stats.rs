//! The statistics of figures.

use anyhow::{Result, bail};

/// The value below which the share `p` (0 to 1) of all values lies, by the nearest rank.
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

/// The middle value; of an even number of values the mean of the two in the middle.
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

/// The median of `of ÷ to` over pairs that were measured one after the other: what else happens on the machine
/// happens to both.
///
/// # Errors
/// If there are no pairs, or a baseline is zero.
pub(crate) fn ratio(of: &[f64], to: &[f64]) -> Result<f64> {
    if of.len() != to.len() || to.contains(&0.0) {
        bail!("these are no pairs: {of:?} and {to:?}");
    }
    let ratios: Vec<f64> = of.iter().zip(to).map(|(of, to)| of / to).collect();
    median(&ratios)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 0.5).unwrap(), 50.0);
        assert_eq!(percentile(&values, 0.99).unwrap(), 99.0);
        assert_eq!(percentile(&values, 1.0).unwrap(), 100.0);
        assert_eq!(percentile(&values, 0.0).unwrap(), 1.0);
        assert_eq!(percentile(&[7.0], 0.99).unwrap(), 7.0);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_two_in_the_middle() {
        assert_eq!(median(&[4.0, 1.0, 3.0]).unwrap(), 3.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]).unwrap(), 2.5);
    }

    #[test]
    fn one_bad_pair_does_not_move_a_ratio() {
        let off = [100.0, 50.0, 100.0, 80.0, 90.0];
        let on = [99.0, 49.5, 10.0, 79.2, 89.1];
        assert!((ratio(&on, &off).unwrap() - 0.99).abs() < 1e-9);
    }

    #[test]
    fn nothing_measured_is_an_error_and_never_a_zero() {
        assert!(median(&[]).is_err());
        assert!(percentile(&[], 0.5).is_err());
        assert!(ratio(&[1.0], &[]).is_err());
        assert!(ratio(&[1.0], &[0.0]).is_err());
    }
}
