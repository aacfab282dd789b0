//! Connections that are older than the agent (case 23), and how soon it is ready.

use std::{
    collections::VecDeque,
    net::{SocketAddr, TcpStream},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb_core::flow::{
    Direction,
    FlowState::{Active, Backlog},
};
use ebb_testkit::{namespace::Namespace, trial::step};

use crate::support::{
    kernel, raw,
    sockets::{self, dial, pair, read_bytes, write_bytes},
    world::World,
};

ebb_testkit::trials![
    case_23_an_agent_started_while_ten_thousand_connections_close_counts_the_rest,
    an_agent_started_while_connections_open_and_close_sees_all_of_them,
    an_agent_is_ready_and_sees_a_hundred_thousand_connections,
    a_connection_being_dialled_at_the_start_is_outbound,
    a_queued_connection_older_than_the_agent_is_inbound_backlog,
];

const MANY: usize = 10_000;
/// A process may usually open at most 20,000 files, and this one has both ends of each connection.
const HOLDERS: usize = 4;
/// As many as a busy node has.
const VERY_MANY: usize = 100_000;

/// One trial at a time opens this many connections, for the machine's sake.
static TURN: Mutex<()> = Mutex::new(());

/// Waits until no other trial that opens many connections runs.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    step("waiting for its turn");
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    step("running alone");
    turn
}

/// What a holder does next with its connections.
#[derive(Clone, Copy)]
enum Order<'a> {
    /// Close nine in ten, in all ways, and count them.
    CloseMost(&'a AtomicUsize),
    /// Replace the oldest by new ones until this is true.
    Replace(&'a AtomicBool),
    CloseRest,
    /// Move a byte each way on all of them, and accept one more.
    Exchange,
}

/// A thread with its own descriptor table and its share of the connections.
struct Holder<'a> {
    at: SocketAddr,
    to: mpsc::Sender<Order<'a>>,
    /// How many connections it has after each order.
    from: mpsc::Receiver<usize>,
}

/// All holders, in the calling thread's namespace.
struct Holders<'a>(Vec<Holder<'a>>);

impl<'a> Holders<'a> {
    fn start<'s>(s: &'s thread::Scope<'s, '_>) -> Result<Self>
    where
        'a: 's,
    {
        Self::start_many(s, HOLDERS, MANY)
    }

    fn start_many<'s>(
        s: &'s thread::Scope<'s, '_>,
        holders: usize,
        connections: usize,
    ) -> Result<Self>
    where
        'a: 's,
    {
        let started: Vec<_> = (0..holders)
            .map(|_| {
                let (to, orders) = mpsc::channel();
                let (replies, from) = mpsc::channel();
                let (listening, at) = mpsc::channel();
                s.spawn(move || {
                    if let Err(error) = hold(connections / holders, &listening, &orders, &replies) {
                        eprintln!("a holder of connections: {error:#}");
                    }
                });
                (at, to, from)
            })
            .collect();
        let mut holders = Vec::new();
        for (at, to, from) in started {
            let at = at.recv().context("a holder could not open its share")?;
            holders.push(Holder { at, to, from });
        }
        Ok(Self(holders))
    }

    fn order(&self, order: Order<'a>) -> Result<()> {
        for holder in &self.0 {
            holder.to.send(order).ok().context("a holder failed")?;
        }
        Ok(())
    }

    /// Waits until all holders have finished the order; returns how many connections are left.
    fn done(&self) -> Result<u32> {
        let mut left = 0;
        for holder in &self.0 {
            left += holder.from.recv().context("a holder failed")?;
        }
        Ok(left.try_into()?)
    }

    /// Starts a tracker. Returns its view of this namespace, and how long the start took.
    fn start_tracker(&self) -> Result<(World, Duration)> {
        start_tracker(self.0.iter().map(|holder| holder.at))
    }
}

fn hold(
    share: usize,
    listening: &mpsc::Sender<SocketAddr>,
    orders: &mpsc::Receiver<Order<'_>>,
    replies: &mpsc::Sender<usize>,
) -> Result<()> {
    raw::own_descriptors()?;
    let listener = sockets::listener(128)?;
    let mut pairs = (0..share)
        .map(|_| pair(&listener))
        .collect::<Result<VecDeque<_>>>()?;
    listening.send(listener.local_addr()?)?;
    while let Ok(order) = orders.recv() {
        match order {
            Order::CloseMost(closed) => {
                for n in 0..pairs.len() * 9 / 10 {
                    let Some((server, client)) = pairs.pop_front() else {
                        break;
                    };
                    match n % 3 {
                        0 => drop((client, server)),
                        1 => drop((server, client)),
                        _ => {
                            sockets::reset(client)?;
                            drop(server);
                        }
                    }
                    closed.fetch_add(1, Ordering::Relaxed);
                    // Slow enough that connections still close when the tracker starts.
                    if n % 2 == 0 {
                        sleep(Duration::from_millis(1));
                    }
                }
            }
            Order::Replace(stop) => {
                while !stop.load(Ordering::Relaxed) {
                    if let Some((server, client)) = pairs.pop_front() {
                        sockets::reset(client)?;
                        drop(server);
                    }
                    pairs.push_back(pair(&listener)?);
                }
            }
            Order::CloseRest => pairs.clear(),
            Order::Exchange => {
                for (server, client) in &pairs {
                    write_bytes(client, 1)?;
                    read_bytes(server, 1)?;
                    write_bytes(server, 1)?;
                    read_bytes(client, 1)?;
                }
                pairs.push_back(pair(&listener)?);
            }
        }
        replies.send(pairs.len())?;
    }
    Ok(())
}

fn start_tracker(listeners: impl Iterator<Item = SocketAddr>) -> Result<(World, Duration)> {
    let begun = Instant::now();
    let (tracker, _) = kernel::start()?;
    let took = begun.elapsed();
    let world = World::here(tracker)?;
    world.older_than_tracker();
    listeners.for_each(|at| world.serving_at(at));
    Ok((world, took))
}

fn case_23_an_agent_started_while_ten_thousand_connections_close_counts_the_rest() -> Result<()> {
    let _turn = turn();
    let closed = AtomicUsize::new(0);
    Namespace::new()?.run(|| {
        thread::scope(|s| {
            let holders = Holders::start(s)?;
            holders.order(Order::CloseMost(&closed))?;
            while closed.load(Ordering::Relaxed) < MANY / 20 {
                sleep(Duration::from_micros(100));
            }
            let before = closed.load(Ordering::Relaxed);
            let (world, took) = holders.start_tracker()?;
            let after = closed.load(Ordering::Relaxed);
            eprintln!("ready after {took:?}, while {before} to {after} of {MANY} were closed");
            ensure!(
                before < after && after < MANY * 9 / 10,
                "closing and starting were not at the same time"
            );
            let left = holders.done()?;
            world.has(&[(Active, left)], left)?;
            // All connections still work.
            holders.order(Order::Exchange)?;
            let left = holders.done()?;
            world.has(&[(Active, left)], left)?;
            ensure!(world.tracker.losses()?.iter().all(|n| *n == 0));
            // A restarted agent sees the same.
            drop(world);
            let (world, took) = holders.start_tracker()?;
            eprintln!("ready again after {took:?}");
            world.has(&[(Active, left)], left)?;
            holders.order(Order::CloseRest)?;
            holders.done()?;
            world.has(&[], 0)
        })
    })
}

fn an_agent_started_while_connections_open_and_close_sees_all_of_them() -> Result<()> {
    let _turn = turn();
    let stops = [const { AtomicBool::new(false) }; 3];
    Namespace::new()?.run(|| {
        thread::scope(|s| {
            let holders = Holders::start(s)?;
            for stop in &stops {
                holders.order(Order::Replace(stop))?;
                let started = holders.start_tracker();
                stop.store(true, Ordering::Relaxed);
                holders.done()?;
                holders.order(Order::Exchange)?;
                let open = holders.done()?;
                let (world, took) = started?;
                eprintln!("ready after {took:?}, amid {open} connections");
                world.has(&[(Active, open)], open)?;
                ensure!(world.tracker.losses()?.iter().all(|n| *n == 0));
            }
            Ok(())
        })
    })
}

fn an_agent_is_ready_and_sees_a_hundred_thousand_connections() -> Result<()> {
    let _turn = turn();
    Namespace::new()?.run(|| {
        thread::scope(|s| {
            let holders = Holders::start_many(s, 20, VERY_MANY)?;
            let (world, took) = holders.start_tracker()?;
            eprintln!("ready after {took:?}, amid {VERY_MANY} connections");
            ensure!(took < Duration::from_secs(10), "not ready after {took:?}");
            let is = |open: usize| -> Result<()> {
                let flows = world.snapshot()?.flows;
                let inbound = flows.iter().filter(|f| f.direction == Direction::Inbound);
                let seen = inbound.count();
                ensure!(
                    seen == open && flows.len() == 2 * open,
                    "{seen} of {} seen of {open}",
                    flows.len()
                );
                Ok(())
            };
            is(VERY_MANY)?;
            holders.order(Order::Exchange)?;
            let open = holders.done()?;
            ensure!(open as usize == VERY_MANY + 20, "{open}");
            is(open as usize)?;
            ensure!(world.tracker.losses()?.iter().all(|n| *n == 0));
            holders.order(Order::CloseRest)?;
            holders.done()?;
            Ok(())
        })
    })
}

fn a_connection_being_dialled_at_the_start_is_outbound() -> Result<()> {
    let _turn = turn();
    Namespace::new()?.run(|| {
        let listener = sockets::listener(16)?;
        let client = dial(listener.local_addr()?, libc::IPPROTO_TCP, |s| {
            Ok(raw::block_receive(s)?)
        })?;
        let (world, _) = start_tracker([listener.local_addr()?].into_iter())?;
        world.has(&[], 0)?;
        raw::unblock_receive(&client)?;
        // The client sends the SYN again after a second, or the server the SYN+ACK.
        world.has(&[(Backlog, 1)], 1)?;
        drop((client, listener));
        world.has(&[], 0)
    })
}

fn a_queued_connection_older_than_the_agent_is_inbound_backlog() -> Result<()> {
    let _turn = turn();
    Namespace::new()?.run(|| {
        let listener = sockets::listener(16)?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        let (world, _) = start_tracker([listener.local_addr()?].into_iter())?;
        world.has(&[(Backlog, 1)], 1)?;
        drop(listener.accept()?);
        world.has(&[], 1)?;
        drop(client);
        world.has(&[], 0)
    })
}
