//! A trial's namespace, and what must be read in it.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    net::{SocketAddr, TcpListener},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use ebb::{
    flow::{Direction, FlowState, Sample, Snapshot},
    ids::NetnsInode,
    kernel::{Tracker, WorkloadCount},
    pods::Scope,
};

use super::{
    kernel,
    namespace::{Namespace, scope_of_this_thread},
    proc_net::{self, Row},
    sockets,
};

/// Long enough for a SYN that was dropped to be sent again, twice.
const PATIENCE: Duration = Duration::from_secs(8);
/// So long that what is open is active, whatever the machine is busy with.
const NEVER: Duration = Duration::from_secs(3600);

/// The calling thread's network namespace.
pub(crate) struct World {
    pub(crate) tracker: Tracker,
    pub(crate) scope: Scope,
    pub(crate) netns: NetnsInode,
    total_before: u64,
    idle_after: Cell<Duration>,
    fast_open: Cell<bool>,
    server_ports: RefCell<BTreeSet<u16>>,
}

/// Runs a trial in a namespace of its own, with the shared tracker.
pub(crate) fn world(f: impl FnOnce(&World) -> Result<()> + Send) -> Result<()> {
    let tracker = kernel::shared();
    Namespace::new()?.run(|| f(&World::here(tracker)?))
}

/// What was read. Flows by state; the rest of what there may be is told apart only by the counters.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reading {
    counted: (i64, i64),
    looked: (BTreeMap<FlowState, u32>, u32),
    kernel: (u32, u32),
}

impl World {
    /// The calling thread's namespace, seen by `tracker`.
    pub(crate) fn here(tracker: Tracker) -> Result<Self> {
        let scope = scope_of_this_thread()?;
        let Scope::Netns { inode, .. } = scope else {
            bail!("a thread has a namespace");
        };
        let world = Self {
            tracker,
            scope,
            netns: inode,
            total_before: 0,
            idle_after: NEVER.into(),
            fast_open: false.into(),
            server_ports: RefCell::default(),
        };
        Ok(Self {
            total_before: world.total(),
            ..world
        })
    }

    /// A listener whose flows are inbound.
    pub(crate) fn listen(&self, backlog: i32) -> Result<TcpListener> {
        self.serving(sockets::listener(backlog)?)
    }

    /// Says that what is open on the port of `listener` is inbound.
    pub(crate) fn serving(&self, listener: TcpListener) -> Result<TcpListener> {
        self.serving_at(listener.local_addr()?);
        Ok(listener)
    }

    /// Likewise, for a listener in another process.
    pub(crate) fn serving_at(&self, at: SocketAddr) {
        self.server_ports.borrow_mut().insert(at.port());
    }

    /// From now on nothing is inbound because of its port.
    pub(crate) fn serving_no_more(&self) {
        self.server_ports.borrow_mut().clear();
    }

    /// From now on SYN_RECV on a server's port is a fast-open child, not a request.
    pub(crate) fn fast_open(&self) {
        self.fast_open.set(true);
    }

    /// Sets the time after which quiet is idle. Without, what is open is active.
    pub(crate) fn idle_after(&self, after: Duration) {
        self.idle_after.set(after);
    }

    /// The counters of this namespace, by cgroup.
    pub(crate) fn counts(&self) -> Vec<WorkloadCount> {
        let mut counts = self.tracker.counts();
        counts.retain(|c| c.netns == self.netns);
        counts
    }

    fn total(&self) -> u64 {
        self.counts().iter().map(|c| c.inbound_total).sum()
    }

    /// Inbound flows since the trial began.
    pub(crate) fn ever(&self) -> u64 {
        self.total() - self.total_before
    }

    /// The sockets of this namespace.
    pub(crate) fn look(&self) -> Result<Vec<Sample>> {
        Ok(kernel::wait(self.tracker.look(&self.scope))?.samples)
    }

    /// The flows of this namespace.
    pub(crate) fn snapshot(&self) -> Result<Snapshot> {
        let look = kernel::wait(self.tracker.look(&self.scope))?;
        let after = self.idle_after.get();
        Ok(Snapshot::new(look.taken_at, &look.samples, after, |_| true))
    }

    /// The kernel's own table: inbound and outbound flows.
    pub(crate) fn kernel_rows(&self) -> Result<(Vec<Row>, Vec<Row>)> {
        let ports = self.server_ports.borrow();
        Ok(proc_net::rows()?
            .into_iter()
            .filter(|row| self.is_flow(row))
            .partition(|row| ports.contains(&row.local.port())))
    }

    fn is_flow(&self, row: &Row) -> bool {
        match row.state {
            1 | 4 | 8 | 9 | 11 => true,
            3 => self.fast_open.get() && self.server_ports.borrow().contains(&row.local.port()),
            _ => false,
        }
    }

    fn read(&self) -> Result<Reading> {
        let (inbound, outbound) = self.kernel_rows()?;
        let counts = self.counts();
        let snapshot = self.snapshot()?;
        let mut states = BTreeMap::new();
        let mut dialled = 0;
        for flow in &snapshot.flows {
            match flow.direction {
                Direction::Inbound => *states.entry(flow.state).or_default() += 1,
                Direction::Outbound => dialled += 1,
            }
        }
        if states_of(&snapshot) != states_by_proc(&inbound) {
            // Two looks at different moments; who asks again gets equal ones.
            states.insert(FlowState::Active, u32::MAX);
        }
        Ok(Reading {
            counted: (
                counts.iter().map(|c| c.inbound).sum(),
                counts.iter().map(|c| c.outbound).sum(),
            ),
            looked: (states, dialled),
            kernel: (inbound.len().try_into()?, outbound.len().try_into()?),
        })
    }

    /// Demands that counters, look and kernel agree on these inbound flows, by state, and on so many
    /// outbound ones. Loopback does its work in softirqs, so they may take a moment; they have to end there.
    pub(crate) fn has(&self, states: &[(FlowState, u32)], outbound: u32) -> Result<()> {
        let inbound: u32 = states.iter().map(|(_, n)| n).sum();
        let wanted = Reading {
            counted: (inbound.into(), outbound.into()),
            looked: (
                states.iter().filter(|(_, n)| *n > 0).copied().collect(),
                outbound,
            ),
            kernel: (inbound, outbound),
        };
        let until = Instant::now() + PATIENCE;
        loop {
            let read = self.read()?;
            ensure!(
                read.counted.0 >= 0 && read.counted.1 >= 0,
                "below zero: {read:?}"
            );
            if read == wanted {
                return Ok(());
            }
            if Instant::now() > until {
                bail!(
                    "wanted {wanted:?}, have {read:?}\nlook: {:#?}\nkernel: {:#?}",
                    self.snapshot()?.flows,
                    proc_net::rows()?
                );
            }
            sleep(Duration::from_millis(3));
        }
    }

    /// Demands it now and for a while.
    pub(crate) fn keeps(
        &self,
        states: &[(FlowState, u32)],
        outbound: u32,
        lasting: Duration,
    ) -> Result<()> {
        self.has(states, outbound)?;
        let inbound: u32 = states.iter().map(|(_, n)| n).sum();
        let until = Instant::now() + lasting;
        while Instant::now() < until {
            let read = self.read()?;
            ensure!(
                read.counted == (inbound.into(), outbound.into()),
                "did not stay: {read:?}"
            );
            sleep(Duration::from_millis(20));
        }
        self.has(states, outbound)
    }

    /// Demands that counters, look and kernel agree, whatever on; returns inbound and outbound.
    pub(crate) fn agrees(&self) -> Result<(u32, u32)> {
        let until = Instant::now() + PATIENCE;
        loop {
            let read = self.read()?;
            let looked = (
                read.looked.0.values().map(|n| u64::from(*n)).sum::<u64>(),
                read.looked.1,
            );
            let (inbound, outbound) = read.kernel;
            if read.counted == (inbound.into(), outbound.into())
                && looked == (inbound.into(), outbound)
            {
                return Ok(read.kernel);
            }
            if Instant::now() > until {
                bail!("counters, look and kernel differ: {read:?}");
            }
            sleep(Duration::from_millis(10));
        }
    }
}

/// What ebb and `/proc` can both tell of inbound flows: which one, and whether it waits to be accepted, is
/// being flushed, or neither.
fn states_of(snapshot: &Snapshot) -> BTreeSet<(SocketAddr, SocketAddr, u8)> {
    snapshot
        .flows
        .iter()
        .filter(|f| f.direction == Direction::Inbound)
        .map(|f| {
            let kind = match f.state {
                FlowState::Backlog => 0,
                FlowState::Flushing => 1,
                _ => 2,
            };
            (f.local, f.remote, kind)
        })
        .collect()
}

fn states_by_proc(rows: &[Row]) -> BTreeSet<(SocketAddr, SocketAddr, u8)> {
    rows.iter()
        .map(|row| {
            let kind = match (row.state, row.inode) {
                (1 | 3 | 8, 0) => 0,
                (4 | 9 | 11, _) => 1,
                _ => 2,
            };
            (row.local, row.remote, kind)
        })
        .collect()
}
