//! Pods that are deleted while clients connect in different ways, settled by the rule and by a fixed 3 s.
//!
//! The clients of a pod connect until they have learned that it is no endpoint any more, 0.1 to 30 s later: all at
//! once, or one after another. A connection that comes when the pod is no longer settling is lost. The pod holds no
//! connection for long, so it ends with its settle phase.

use std::fmt;

use ebb_common::Gap;

use super::*;

const START: BootTime = BootTime::from_nanos(10_000_000_000_000_000);
const RUNS: u32 = 400;

/// xorshift64*, so that each run of the test is the same.
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// The next gap of connections that come at random, with this mean.
    fn gap(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }
}

/// How clients connect. Times are in seconds.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    Never,
    /// At random, this many per hour.
    Random(u32),
    /// Regularly, this many per hour.
    Regular(u32),
    /// Pages of 8 connections, this many per hour.
    Pages(u32),
    /// 100 connections within a second, this many times per hour.
    Bursts(u32),
}

impl Pattern {
    /// The gaps between connections.
    fn gaps(self, random: &mut Random) -> Box<dyn Iterator<Item = f64> + '_> {
        let each = |per_hour: u32| 3600.0 / f64::from(per_hour);
        match self {
            Self::Never => Box::new(std::iter::empty()),
            Self::Random(n) => Box::new(std::iter::repeat_with(move || random.gap(each(n)))),
            Self::Regular(n) => Box::new(std::iter::repeat(each(n))),
            Self::Pages(n) => Box::new(grouped(random, 8, 0.02, each(n))),
            Self::Bursts(n) => Box::new(grouped(random, 100, 0.01, each(n))),
        }
    }

    /// What most gaps are shorter than.
    fn longest_gap(self) -> f64 {
        match self {
            Self::Never => 0.0,
            Self::Random(n) | Self::Regular(n) | Self::Pages(n) | Self::Bursts(n) => {
                3600.0 / f64::from(n)
            }
        }
    }
}

/// Groups of so many connections with a gap within them, that come at random.
fn grouped(
    random: &mut Random,
    size: u32,
    within: f64,
    mean: f64,
) -> impl Iterator<Item = f64> + '_ {
    let gap = move |n: u32| {
        if n == 0 { random.gap(mean) } else { within }
    };
    (0..size).cycle().map(gap)
}

fn duration(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.max(0.0))
}

fn nanoseconds(seconds: f64) -> u64 {
    u64::try_from(duration(seconds).as_nanos()).unwrap()
}

/// The kernel's counts when the pod is deleted, and when clients would connect in the minute after that.
fn history(pattern: Pattern, random: &mut Random) -> (Arrivals, Vec<f64>) {
    let observed = (20.0 * pattern.longest_gap()).max(180.0);
    // The deletion comes at any moment.
    let deleted = observed + random.unit() * pattern.longest_gap();
    let (mut at, mut last, mut gap, mut later) = (0.0, None, Gap::default(), Vec::new());
    for step in pattern.gaps(random) {
        at += step;
        if at > deleted + 60.0 {
            break;
        } else if at > deleted {
            later.push(at - deleted);
        } else {
            if let Some(last) = last {
                gap = gap.with(nanoseconds(at - last));
            }
            last = Some(at);
        }
    }
    let usual = |last| gap.usual(nanoseconds(deleted - last), nanoseconds(deleted));
    let arrivals = Arrivals {
        observed: duration(deleted),
        gap: last.map(|last| Duration::from_nanos(usual(last))),
    };
    (arrivals, later)
}

/// How many connections were lost, and how long the pod settled in seconds.
fn settled(mut settle: Settle, connections: &[f64]) -> (u32, f64) {
    let mut lost = 0;
    for at in connections.iter().map(|at| START + duration(*at)) {
        if at < settle.end() {
            settle.arrival(at, false);
        } else {
            lost += 1;
        }
    }
    (lost, settle.end().since(START).as_secs_f64())
}

/// The sums of the runs of one pattern.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    connections: u32,
    lost: u32,
    waited: f64,
}

impl Sums {
    fn add(&mut self, connections: usize, (lost, waited): (u32, f64)) {
        self.connections += u32::try_from(connections).unwrap();
        self.lost += lost;
        self.waited += waited;
    }
}

impl fmt::Display for Sums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mean = self.waited / f64::from(RUNS);
        let lost = f64::from(self.lost) / f64::from(RUNS);
        write!(f, "{lost:6.2} lost, {mean:5.1} s")
    }
}

/// The rule and 3 s, on the same runs.
fn simulate(pattern: Pattern) -> [Sums; 2] {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut sums = [Sums::default(); 2];
    for run in 0..RUNS {
        let (arrivals, later) = history(pattern, &mut random);
        // 0.1 to 30 s, each order of magnitude as often.
        let gone = 0.1 * 300_f64.powf(random.unit());
        let one_by_one = run % 2 == 1;
        let later: Vec<f64> = later
            .into_iter()
            .filter(|at| *at < gone && (!one_by_one || random.unit() > *at / gone))
            .collect();
        let new = || Settle::new(&Policy::default(), START, START);
        let mut learned = new();
        learned.learn(arrivals);
        sums[0].add(later.len(), settled(learned, &later));
        sums[1].add(later.len(), settled(new(), &later));
    }
    sums
}

/// Prints what docs/decisions/settle.md shows, with `--nocapture`.
#[test]
fn by_the_usual_gap_fewer_connections_are_lost_and_pods_wait_less_than_with_3_s() {
    use Pattern::{Bursts, Never, Pages, Random, Regular};
    const A_SECOND: u32 = 3600;
    const A_MINUTE: u32 = 60;
    let often = [
        Random(100 * A_SECOND),
        Regular(100 * A_SECOND),
        Random(20 * A_SECOND),
        Random(10 * A_SECOND),
        Pages(4 * A_SECOND),
    ];
    let at_times = [Random(A_SECOND), Bursts(6 * A_MINUTE), Random(3 * A_MINUTE)];
    let rarely = [Random(1), Never];
    let mut total = [Sums::default(); 2];
    let mut of = |pattern| {
        let [rule, fixed] = simulate(pattern);
        println!("{pattern:?}: {rule}; with 3 s {fixed}");
        for (total, sums) in total.iter_mut().zip([rule, fixed]) {
            total.lost += sums.lost;
            total.waited += sums.waited;
        }
        (rule, fixed)
    };
    for pattern in often.into_iter().chain(rarely) {
        let (rule, fixed) = of(pattern);
        assert!(rule.waited < fixed.waited, "{pattern:?}: {rule}; {fixed}");
        // Those that come after settle_max are lost in any case.
        let more = f64::from(rule.lost) - f64::from(fixed.lost);
        assert!(
            more <= 0.01 * f64::from(rule.connections),
            "{pattern:?}: {rule}; {fixed}"
        );
    }
    for pattern in at_times {
        let (rule, fixed) = of(pattern);
        assert!(
            f64::from(rule.lost) < 0.85 * f64::from(fixed.lost),
            "{pattern:?}: {rule}; {fixed}"
        );
        assert!(
            rule.waited < 2.2 * fixed.waited,
            "{pattern:?}: {rule}; {fixed}"
        );
    }
    let [rule, fixed] = total;
    println!("all: {rule}; with 3 s {fixed}");
    assert!(rule.lost < fixed.lost, "{rule}; {fixed}");
    assert!(rule.waited < fixed.waited, "{rule}; {fixed}");
}
