//! The namespace of a trial, and the readings that must agree on it.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{SocketAddr, TcpListener},
    os::unix::fs::MetadataExt as _,
    panic::Location,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use ebb::kernel::{Tracker, WorkloadCount};
use ebb_core::{
    flow::{Direction, Flow, FlowState, Sample, Snapshot},
    ids::{CgroupId, NetnsInode},
    scope::Scope,
};
use ebb_testkit::{
    namespace::Namespace,
    proc_net::{self, Row},
    trial::{scaled, step},
};
use rustix::thread::gettid;

use super::{cgroup, kernel, sockets, ss};

/// Long enough for two retransmissions of a SYN.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(8);
/// The limit, even on a busy machine, for what needs no timer and no segment.
const AT_ONCE: Duration = Duration::from_millis(200);
/// So long that an open connection stays active, even on a busy machine.
const NEVER: Duration = Duration::from_secs(3600);

/// The calling thread's network namespace.
pub(crate) struct World {
    pub(crate) tracker: Tracker,
    pub(crate) scope: Scope,
    pub(crate) netns: NetnsInode,
    /// How many flows the counters had as opened when the trial began.
    opened_before: u64,
    /// How many state changes the kernel had left out then.
    missed_before: u64,
    /// The tracker has not counted the flows, because they are older.
    older: Cell<bool>,
    idle_after: Cell<Duration>,
    fast_open: Cell<bool>,
    server_ports: RefCell<BTreeSet<u16>>,
    /// The cgroup that must own all inbound flows.
    owner: Cell<Option<CgroupId>>,
}

/// The calling thread's namespace as a scope: `/proc` has an entry for each thread.
pub(crate) fn scope_of_this_thread() -> Result<Scope> {
    Ok(Scope::Netns {
        inode: NetnsInode(fs::metadata("/proc/thread-self/ns/net")?.ino().try_into()?),
        pid: gettid().as_raw_nonzero().get().try_into()?,
    })
}

/// Runs a trial in a namespace and a cgroup of its own, with the shared tracker.
pub(crate) fn world(f: impl FnOnce(&World) -> Result<()> + Send) -> Result<()> {
    let tracker = kernel::shared();
    // Removed after its thread has ended.
    let mut own_cgroup = None;
    Namespace::new()?.run(|| {
        let own = cgroup::id_of(own_cgroup.insert(cgroup::of_this_thread()?))?;
        let world = World::here(tracker)?;
        world.owned_by(own);
        f(&world)?;
        world.agrees().map(drop)
    })
}

/// The numbers of flows by each reading.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reading {
    /// Inbound.
    counted: i64,
    /// Inbound by state, and outbound.
    dumped: (BTreeMap<FlowState, u32>, u32),
    /// Inbound and outbound.
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
            opened_before: 0,
            missed_before: 0,
            older: false.into(),
            idle_after: NEVER.into(),
            fast_open: false.into(),
            server_ports: RefCell::default(),
            owner: None.into(),
        };
        Ok(Self {
            opened_before: world.totals().0,
            missed_before: world.tracker.missed_changes()?,
            ..world
        })
    }

    /// A listener. Flows on its port must be inbound.
    pub(crate) fn listen(&self, backlog: i32) -> Result<TcpListener> {
        self.serving(sockets::listener(backlog)?)
    }

    /// From now on flows on the port of `listener` must be inbound.
    pub(crate) fn serving(&self, listener: TcpListener) -> Result<TcpListener> {
        self.serving_at(listener.local_addr()?);
        Ok(listener)
    }

    /// From now on flows on the port of this address must be inbound.
    pub(crate) fn serving_at(&self, at: SocketAddr) {
        self.server_ports.borrow_mut().insert(at.port());
    }

    /// From now on no port makes a flow inbound.
    pub(crate) fn serving_no_port(&self) {
        self.server_ports.borrow_mut().clear();
    }

    /// From now on this cgroup must own all inbound flows.
    pub(crate) fn owned_by(&self, cgroup: CgroupId) {
        self.owner.set(Some(cgroup));
    }

    /// From now on the counters are not compared, because the flows are older than the tracker.
    pub(crate) fn older_than_tracker(&self) {
        self.older.set(true);
    }

    /// From now on SYN_RECV on a server's port is a fast-open child, not a request.
    pub(crate) fn fast_open(&self) {
        self.fast_open.set(true);
    }

    /// Sets `idle-after`. Without it every open flow is active.
    pub(crate) fn idle_after(&self, after: Duration) {
        self.idle_after.set(after);
    }

    /// The counters of this namespace, by cgroup.
    pub(crate) fn counts(&self) -> Vec<WorkloadCount> {
        let mut counts = self.tracker.counts();
        counts.retain(|c| c.netns == self.netns);
        counts
    }

    /// How many flows were opened and closed, by the counters.
    fn totals(&self) -> (u64, u64) {
        let counts = self.counts();
        (
            counts.iter().map(|c| c.opened).sum(),
            counts.iter().map(|c| c.closed).sum(),
        )
    }

    /// Open inbound flows by the counters, which have only those that were opened while the tracker ran.
    fn counted(&self) -> i64 {
        let (opened, closed) = self.totals();
        opened as i64 - closed as i64
    }

    /// Whether the counters must be those of the kernel's tables. Not if the flows are older than the tracker, or if the
    /// kernel has left out state changes, which it counts: it does so on a busy machine, most of all since 7.0.
    fn compares_counters(&self) -> Result<bool> {
        Ok(!self.older.get() && self.tracker.missed_changes()? == self.missed_before)
    }

    /// Demands that this many inbound flows were opened since the trial began.
    pub(crate) fn has_opened(&self, wanted: u64) -> Result<()> {
        let opened = self.opened();
        ensure!(
            opened == wanted || !self.compares_counters()?,
            "{opened} counted, {wanted} opened"
        );
        Ok(())
    }

    /// How many inbound flows were opened since the trial began.
    pub(crate) fn opened(&self) -> u64 {
        self.totals().0 - self.opened_before
    }

    /// The sockets of this namespace.
    pub(crate) fn dump(&self) -> Result<Vec<Sample>> {
        Ok(kernel::wait(self.tracker.dump(&self.scope))?.samples)
    }

    /// The flows of this namespace.
    pub(crate) fn snapshot(&self) -> Result<Snapshot> {
        let dump = kernel::wait(self.tracker.dump(&self.scope))?;
        let after = self.idle_after.get();
        let samples = &dump.samples;
        Ok(Snapshot::new(
            dump.taken_at,
            samples,
            after,
            |_| true,
            |_| false,
        ))
    }

    /// The kernel's own table: inbound and outbound flows.
    pub(crate) fn kernel_rows(&self) -> Result<(Vec<Row>, Vec<Row>)> {
        Ok(self.by_direction(proc_net::rows()?))
    }

    fn by_direction(&self, rows: Vec<Row>) -> (Vec<Row>, Vec<Row>) {
        let ports = self.server_ports.borrow();
        rows.into_iter()
            .filter(|row| self.is_flow(row))
            .partition(|row| ports.contains(&row.local.port()))
    }

    fn is_flow(&self, row: &Row) -> bool {
        match row.state {
            1 | 4 | 8 | 9 | 11 => true,
            // FIN_WAIT2 of a socket that the application still has.
            5 => row.inode != 0,
            3 => self.fast_open.get() && self.server_ports.borrow().contains(&row.local.port()),
            _ => false,
        }
    }

    fn read(&self) -> Result<Reading> {
        let (inbound, outbound) = self.kernel_rows()?;
        let counts = self.counts();
        let snapshot = self.snapshot()?;
        if let Some(owner) = self.owner.get() {
            let open = |c: &&WorkloadCount| c.opened != c.closed;
            let others = counts.iter().filter(open).find(|c| c.cgroup != owner);
            ensure!(others.is_none(), "not of {owner:?}: {others:?}");
            let inbound = |f: &&Flow| f.direction == Direction::Inbound;
            let flows = snapshot.flows.iter().filter(inbound);
            let other = flows.clone().find(|f| f.cgroup != Some(owner));
            ensure!(other.is_none(), "not of {owner:?}: {other:?}");
        }
        let mut states = BTreeMap::new();
        let mut dialled = 0;
        for flow in &snapshot.flows {
            match flow.direction {
                Direction::Inbound => *states.entry(flow.state).or_default() += 1,
                Direction::Outbound => dialled += 1,
            }
        }
        if states_by_ebb(&snapshot) != states_by_proc(&inbound) {
            // The two readings are of different moments; the caller reads again.
            states.insert(FlowState::Active, u32::MAX);
        }
        Ok(Reading {
            counted: if self.compares_counters()? {
                // A fast-open child is counted when its handshake is done.
                let children = inbound.iter().filter(|row| row.state == 3).count();
                self.counted() + i64::try_from(children)?
            } else {
                inbound.len().try_into()?
            },
            dumped: (states, dialled),
            kernel: (inbound.len().try_into()?, outbound.len().try_into()?),
        })
    }

    /// Demands that counters, dump, kernel and `ss` agree on these inbound flows, by state, and all but the counters on
    /// this number of outbound ones. Waits for it, because loopback works in softirqs.
    #[track_caller]
    pub(crate) fn has(&self, states: &[(FlowState, u32)], outbound: u32) -> Result<()> {
        step(Location::caller());
        self.has_within(TIMEOUT, states, outbound)
    }

    /// As [`Self::has`], but waits for softirqs only: no timer, no second segment.
    #[track_caller]
    pub(crate) fn has_at_once(&self, states: &[(FlowState, u32)], outbound: u32) -> Result<()> {
        step(Location::caller());
        self.has_within(AT_ONCE, states, outbound)
    }

    fn has_within(
        &self,
        limit: Duration,
        states: &[(FlowState, u32)],
        outbound: u32,
    ) -> Result<()> {
        let inbound: u32 = states.iter().map(|(_, n)| n).sum();
        let wanted = Reading {
            counted: inbound.into(),
            dumped: (
                states.iter().filter(|(_, n)| *n > 0).copied().collect(),
                outbound,
            ),
            kernel: (inbound, outbound),
        };
        let until = Instant::now() + scaled(limit);
        loop {
            // The machine may be slow: the last reading must begin after this moment.
            let late = Instant::now() > until;
            let read = self.read()?;
            ensure!(read.counted >= 0, "below zero: {read:?}");
            if read == wanted && self.ss_agrees()? {
                return Ok(());
            }
            if late {
                bail!(
                    "wanted {wanted:?} after {limit:?}, have {read:?}\ndump: {:#?}\nkernel: {:#?}\nss: {:#?}",
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
        let (inbound, outbound) = self.by_direction(ss::rows()?);
        let (wanted_in, wanted_out) = self.kernel_rows()?;
        Ok(states_by_proc(&inbound) == states_by_proc(&wanted_in)
            && (inbound.len(), outbound.len()) == (wanted_in.len(), wanted_out.len()))
    }

    /// Demands `dumped` inbound flows in a dump, and `counted` in counters and kernel.
    pub(crate) fn has_inbound(&self, dumped: usize, counted: u32, limit: Duration) -> Result<()> {
        let until = Instant::now() + scaled(limit);
        loop {
            let flows = self.snapshot()?.flows;
            let inbound = flows.iter().filter(|f| f.direction == Direction::Inbound);
            let kernel = self.kernel_rows()?.0.len();
            let by_counters = match self.compares_counters()? {
                true => self.counted(),
                false => kernel.try_into()?,
            };
            let read = (inbound.count(), by_counters, kernel);
            if read == (dumped, counted.into(), counted.try_into()?) {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("wanted {dumped} of {counted}, have {read:?}: {flows:#?}");
            }
            sleep(Duration::from_millis(10));
        }
    }

    /// As [`Self::has`], now and for as long as `lasting`.
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

    /// Demands that counters, dump and kernel agree; returns the numbers of inbound and outbound flows.
    pub(crate) fn agrees(&self) -> Result<(u32, u32)> {
        let until = Instant::now() + scaled(TIMEOUT);
        loop {
            let read = self.read()?;
            let dumped = (
                read.dumped.0.values().map(|n| u64::from(*n)).sum::<u64>(),
                read.dumped.1,
            );
            let (inbound, outbound) = read.kernel;
            if read.counted == i64::from(inbound) && dumped == (inbound.into(), outbound) {
                return Ok(read.kernel);
            }
            if Instant::now() > until {
                bail!(
                    "counters, dump and kernel differ: {read:?}, counted {:?}",
                    self.counts()
                );
            }
            sleep(Duration::from_millis(10));
        }
    }
}

/// What both ebb and `/proc` know of inbound flows: the addresses, and whether a flow is in the backlog, is being flushed,
/// or neither.
fn states_by_ebb(snapshot: &Snapshot) -> BTreeSet<(SocketAddr, SocketAddr, u8)> {
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
