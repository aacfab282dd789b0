//! Ties: connections of which the kernel's times do not tell who spoke last, and the second walk that finds out.

use std::{collections::HashMap, io, time::Duration};

use ebb_common::BareAck;
use rustix::time::{ClockId, clock_gettime};

use super::{Netns, bytes::Bytes, inner::Inner, programs::walk_in_parts};
use crate::{
    flow::sample::{CERTAIN, Sample},
    ids::SocketCookie,
    lock::lock,
};

/// The connections whose peer's last word was a bare acknowledgement.
pub(super) type BareAcks = HashMap<SocketCookie, Found>;

/// What the second walk found of one.
pub(super) struct Found {
    /// When data was last acknowledged.
    delivered_at: Duration,
    /// When anything was last sent or received, as it was when the walk came by.
    touched_at: Duration,
    /// The walk came by no earlier.
    seen_after: Duration,
}

impl Inner {
    /// Walks the namespace for them, at little less than the cost of a dump.
    pub(super) fn bare_acks(&self, netns: &Netns) -> io::Result<BareAcks> {
        let link = lock(&self.programs)
            .iterator("bare_ack")
            .map_err(io::Error::other)?;
        let mut bare_acks = BareAcks::new();
        let mut seen_after = monotonic();
        walk_in_parts(link, netns, |part| {
            let (found, _) = part.as_chunks::<{ size_of::<BareAck>() }>();
            let found = found.iter().filter_map(|f| bare_ack(Bytes(f), seen_after));
            bare_acks.extend(found);
            // The kernel walks on when it is asked for the next part.
            seen_after = monotonic();
        })?;
        Ok(bare_acks)
    }
}

/// Notes in a sample that the peer's last word was a bare acknowledgement, if that is certain. The dump that it is
/// from began at `began`, came by no later than `seen_by`, and had ended at `ended`.
pub(super) fn break_tie(
    sample: &mut Sample,
    bare_acks: &BareAcks,
    began: Duration,
    seen_by: Duration,
    ended: Duration,
) {
    if let Some(found) = bare_acks.get(&sample.cookie)
        && are_of_one_moment(sample, found, began, seen_by)
    {
        sample.set_bare_ack(ended.saturating_sub(found.delivered_at));
    }
}

/// Whether nothing moved between the visits of both walks, whichever came first. Else what the second found is
/// not what the dump describes: the answer to a probe, say, may have arrived in between. Such a tie stays undecided.
fn are_of_one_moment(sample: &Sample, found: &Found, began: Duration, seen_by: Duration) -> bool {
    // Where the second walk came by first, the dump's own times tell of what happened after: `snd_wl1`, `rcv_nxt` and
    // what is acknowledged change with data, which sets `lrcvtime`, or in `tcp_ack`, which sets `rcv_tstamp`
    // (net/ipv4/tcp_input.c).
    let between = seen_by.saturating_sub(found.seen_after);
    let quiet_for = sample.since_received.min(sample.since_ack);
    found.touched_at < began && (between.is_zero() || quiet_for > between + CERTAIN)
}

fn bare_ack(mut found: Bytes<'_>, seen_after: Duration) -> Option<(SocketCookie, Found)> {
    Some((
        SocketCookie(found.u64()?),
        Found {
            delivered_at: Duration::from_micros(found.u64()?),
            touched_at: Duration::from_micros(found.u64()?),
            seen_after,
        },
    ))
}

/// The clock by which the kernel's TCP stamps what it sends and receives (`tcp_clock_us`).
pub(super) fn monotonic() -> Duration {
    clock_gettime(ClockId::Monotonic)
        .try_into()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::sample::testing::sample;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// A dump from 1000 ms to 1200 ms that came by at 1100 ms; quiet since 400 ms, and since the acknowledgement.
    fn is_broken(touched_at: u64, seen_after: u64, since_ack: u64) -> bool {
        let mut sample = Sample {
            since_sent: ms(700),
            since_received: ms(700),
            since_ack: ms(since_ack),
            ..sample()
        };
        let found = Found {
            delivered_at: ms(400),
            touched_at: ms(touched_at),
            seen_after: ms(seen_after),
        };
        let bare_acks = BareAcks::from([(sample.cookie, found)]);
        break_tie(&mut sample, &bare_acks, ms(1000), ms(1100), ms(1200));
        sample.bare_ack
    }

    #[test]
    fn a_tie_is_broken_by_what_the_second_walk_found_of_the_same_moment() {
        assert!(is_broken(400, 1150, 700), "it came by later");
        assert!(is_broken(400, 1050, 700), "it came by first");
        assert!(is_broken(999, 1150, 101), "moved before either began");
    }

    #[test]
    fn what_moved_between_the_walks_breaks_no_tie() {
        assert!(!is_broken(1000, 1150, 700), "after the dump began");
        assert!(!is_broken(1100, 1150, 0), "between the dump and it");
        assert!(!is_broken(400, 1050, 30), "between it and the dump");
        assert!(!is_broken(400, 1050, 69), "that can't be excluded");
    }

    #[test]
    fn what_was_not_found_is_no_bare_acknowledgement() {
        let mut sample = sample();
        break_tie(&mut sample, &BareAcks::new(), ms(1), ms(1), ms(1));
        assert!(!sample.bare_ack);
    }
}
