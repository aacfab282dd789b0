//! A trial's namespace, and what must be read in it.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    net::{SocketAddr, TcpListener},
    panic::Location,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use ebb::{
    flow::{Direction, Flow, FlowState, Sample, Snapshot},
    ids::{CgroupId, NetnsInode},
    kernel::{Audit, Tracker, WorkloadCount},
    pods::Scope,
};

use super::{
    cgroup::Cgroup,
    kernel,
    namespace::{Namespace, scope_of_this_thread},
    proc_net::{self, Row},
    sockets, ss, steps,
};

/// Long enough for a SYN that was dropped to be sent again, twice.
pub(crate) const PATIENCE: Duration = Duration::from_secs(8);
/// What needs no timer and no answer is there by then, also on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(200);
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
    /// The cgroup whose all inbound flows have to be.
    owner: Cell<Option<CgroupId>>,
}

/// Runs a trial in a namespace and a cgroup of its own, with the shared tracker.
pub(crate) fn world(f: impl FnOnce(&World) -> Result<()> + Send) -> Result<()> {
    let tracker = kernel::shared();
    // Removed when its thread is gone.
    let mut cgroup = None;
    Namespace::new()?.run(|| {
        let own = cgroup.insert(Cgroup::of_this_thread()?).id()?;
        let world = World::here(tracker)?;
        world.owned_by(own);
        f(&world)?;
        world.has_no_drift()
    })
}

/// What was read. Flows by state; the rest of what there may be is told apart only by the counters.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reading {
    counted: i64,
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
            owner: None.into(),
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

    /// From now on all inbound flows have to be this cgroup's.
    pub(crate) fn owned_by(&self, cgroup: CgroupId) {
        self.owner.set(Some(cgroup));
    }

    /// From now on SYN_RECV on a server's port is a fast-open child, not a request.
    pub(crate) fn fast_open(&self) {
        self.fast_open.set(true);
    }

    /// Sets the time after which quiet is idle. Without, what is open is active.
    pub(crate) fn idle_after(&self, after: Duration) {
        self.idle_after.set(after);
    }

    /// Demands that an audit of this namespace finds nothing wrong.
    pub(crate) fn has_no_drift(&self) -> Result<()> {
        let found = self.audit()?;
        ensure!(
            found.drift == 0 && found.moving == 0 && found.uncounted == 0,
            "{found:?}"
        );
        Ok(())
    }

    /// Compares the counters of this namespace with the kernel's tables.
    pub(crate) fn audit(&self) -> Result<Audit> {
        Ok(kernel::wait(self.tracker.audit(Some(&self.scope)))?)
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
        let samples = &look.samples;
        Ok(Snapshot::new(
            look.taken_at,
            samples,
            after,
            |_| true,
            |_| false,
        ))
    }

    /// The kernel's own table: inbound and outbound flows.
    pub(crate) fn kernel_rows(&self) -> Result<(Vec<Row>, Vec<Row>)> {
        Ok(self.told_apart(proc_net::rows()?))
    }

    fn told_apart(&self, rows: Vec<Row>) -> (Vec<Row>, Vec<Row>) {
        let ports = self.server_ports.borrow();
        rows.into_iter()
            .filter(|row| self.is_flow(row))
            .partition(|row| ports.contains(&row.local.port()))
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
        if let Some(owner) = self.owner.get() {
            let others = counts.iter().find(|c| c.inbound != 0 && c.cgroup != owner);
            ensure!(others.is_none(), "not {owner:?}'s: {others:?}");
            let inbound = |f: &&Flow| f.direction == Direction::Inbound;
            let flows = snapshot.flows.iter().filter(inbound);
            let other = flows.clone().find(|f| f.cgroup != Some(owner));
            ensure!(other.is_none(), "not {owner:?}'s: {other:?}");
        }
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
            counted: counts.iter().map(|c| c.inbound).sum(),
            looked: (states, dialled),
            kernel: (inbound.len().try_into()?, outbound.len().try_into()?),
        })
    }

    /// Demands that counters, look, kernel and `ss` agree on these inbound flows, by state, and all but the counters on
    /// so many outbound ones. Loopback does its work in softirqs, so they may take a moment; they have to end there.
    #[track_caller]
    pub(crate) fn has(&self, states: &[(FlowState, u32)], outbound: u32) -> Result<()> {
        steps::step(Location::caller());
        self.has_within(PATIENCE, states, outbound)
    }

    /// Likewise, and there is nothing to wait for but softirqs: no timer, no second segment.
    #[track_caller]
    pub(crate) fn has_at_once(&self, states: &[(FlowState, u32)], outbound: u32) -> Result<()> {
        steps::step(Location::caller());
        self.has_within(AT_ONCE, states, outbound)
    }

    fn has_within(
        &self,
        patience: Duration,
        states: &[(FlowState, u32)],
        outbound: u32,
    ) -> Result<()> {
        let inbound: u32 = states.iter().map(|(_, n)| n).sum();
        let wanted = Reading {
            counted: inbound.into(),
            looked: (
                states.iter().filter(|(_, n)| *n > 0).copied().collect(),
                outbound,
            ),
            kernel: (inbound, outbound),
        };
        let until = Instant::now() + patience;
        loop {
            // The machine may be slow, but the last reading has to have begun after this moment.
            let late = Instant::now() > until;
            let read = self.read()?;
            ensure!(read.counted >= 0, "below zero: {read:?}");
            if read == wanted && self.ss_agrees()? {
                return Ok(());
            }
            if late {
                bail!(
                    "wanted {wanted:?} after {patience:?}, have {read:?}\nlook: {:#?}\nkernel: {:#?}\nss: {:#?}",
                    self.snapshot()?.flows,
                    proc_net::rows()?,
                    ss::rows()?
                );
            }
            sleep(Duration::from_millis(3));
        }
    }

    /// Whether `ss` shows the same flows as `/proc`.
    fn ss_agrees(&self) -> Result<bool> {
        let (inbound, outbound) = self.told_apart(ss::rows()?);
        let (wanted_in, wanted_out) = self.kernel_rows()?;
        Ok(states_by_proc(&inbound) == states_by_proc(&wanted_in)
            && (inbound.len(), outbound.len()) == (wanted_in.len(), wanted_out.len()))
    }

    /// Demands so many inbound flows in a look, and so many inbound sockets in counters and kernel.
    pub(crate) fn is(&self, looked: usize, counted: u32, within: Duration) -> Result<()> {
        let until = Instant::now() + within;
        loop {
            let flows = self.snapshot()?.flows;
            let inbound = flows.iter().filter(|f| f.direction == Direction::Inbound);
            let counts: i64 = self.counts().iter().map(|c| c.inbound).sum();
            let read = (inbound.count(), counts, self.kernel_rows()?.0.len());
            if read == (looked, counted.into(), counted.try_into()?) {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("wanted {looked} of {counted}, have {read:?}: {flows:#?}");
            }
            sleep(Duration::from_millis(10));
        }
    }

    /// Demands it now and for a while.
    #[track_caller]
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
            ensure!(read.counted == i64::from(inbound), "did not stay: {read:?}");
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
            if read.counted == i64::from(inbound) && looked == (inbound.into(), outbound) {
                return Ok(read.kernel);
            }
            if Instant::now() > until {
                bail!(
                    "counters, look and kernel differ: {read:?}, counted {:?}",
                    self.counts()
                );
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
