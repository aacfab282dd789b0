//! How often clients connect to a pod, from the counters of the BPF programs.

use std::{fs, io, time::Duration};

use ebb_common::LOST_COUNT;
use ebb_core::{arrivals::Arrivals, clock::BootTime, scope::Scope};

use super::tracker::TrackerState;

impl TrackerState {
    /// How often clients connect to a pod. `None` if that is not known: on the host's network, without the kubelet's
    /// cgroup (its probes would count as clients), or if counts were lost. Blocking.
    ///
    /// # Errors
    ///
    /// The counters can't be read, or the pod's process is gone.
    pub(super) fn arrivals(&self, scope: &Scope) -> io::Result<Option<Arrivals>> {
        let Scope::Netns { inode, pid } = *scope else {
            return Ok(None);
        };
        let lost = self.programs.losses().map_err(io::Error::other)?;
        let lost = lost.get(LOST_COUNT as usize).copied();
        if lost != Some(0) || !self.knows_kubelet() {
            return Ok(None);
        }
        let since = self.started.max(process_start(pid)?);
        // A workload without counters had no client: the agent removes only counters that would say so (`gone_workloads`),
        // and if the programs can't add some, counts are lost.
        let workloads = self.programs.all_counters(|key| key.netns == inode.0)?;
        // Last, so that no opening is later.
        let jiffies = self.programs.inspector.jiffies()?;
        let observed = BootTime::now().since(since);
        let called = workloads.iter().map(|(_, w)| w);
        let called = called.filter(|w| w.last_opened != 0);
        let gaps = called.map(|w| {
            let silence = jiffies.saturating_sub(w.last_opened);
            let silence = silence.saturating_mul(nanoseconds(self.programs.inspector.jiffy()));
            Duration::from_nanos(w.gap.usual(silence, nanoseconds(observed)))
        });
        Ok(Some(Arrivals {
            observed,
            // The pod is silent only while all of its containers are. The silence is counted in jiffies, which may be longer
            // than the time since a start just now.
            gap: gaps.min().map(|gap| gap.min(observed)),
        }))
    }
}

fn nanoseconds(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

/// Clock ticks per second in `/proc`, on every architecture that ebb supports (include/asm-generic/param.h).
const USER_HZ: u64 = 100;

/// When a process started.
fn process_start(pid: u32) -> io::Result<BootTime> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    start_ticks(&stat)
        .map(|ticks| BootTime::from_nanos(ticks.saturating_mul(1_000_000_000 / USER_HZ)))
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

/// `starttime` of a process, in clock ticks since the boot: the 20th field after the name, which may have spaces and
/// parentheses (`proc_pid_stat(5)`).
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_of_a_process_follows_its_name_whatever_that_contains() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 1 2 3";
        assert_eq!(start_ticks(stat), Some(4242));
        let now = BootTime::now();
        let own = process_start(std::process::id()).unwrap();
        assert!(own <= now && now.since(own) < Duration::from_secs(3600));
    }
}
