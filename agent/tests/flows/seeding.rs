//! What is older than the agent (case 23 and seeding).

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
use ebb::flow::{
    Direction,
    FlowState::{Active, Backlog},
};

use crate::support::{
    kernel,
    namespace::Namespace,
    puppet::Puppet,
    raw,
    sockets::{self, dial, give, pair, take},
    steps::step,
    world::World,
};

trials![
    case_23_an_agent_started_amid_ten_thousand_closing_connections_counts_what_is_left,
    seeding_is_exact_while_connections_open_and_close,
    a_hundred_thousand_connections_are_seeded_and_go_on,
    a_dial_under_way_at_the_start_is_outbound,
    a_queued_connection_older_than_the_agent_is_inbound_backlog,
];

const MANY: usize = 10_000;
/// A process may commonly open 20,000 files or less, and both ends of a connection are here.
const HOLDERS: usize = 4;
/// As many as a node may have.
const VERY_MANY: usize = 100_000;

/// Ten thousand connections at a time are enough for one machine, and whoever seeds must find no namespace with more
/// listeners than there are places for.
static TURN: Mutex<()> = Mutex::new(());

pub(crate) fn turn() -> MutexGuard<'static, ()> {
    step("waiting for its turn");
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    step("having its turn");
    turn
}

/// A namespace with a process in it: seeding goes by the namespaces of processes.
fn inhabited<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    Namespace::new()?.run(|| {
        let _inhabitant = Puppet::start()?;
        f()
    })
}

/// What a holder is to do next with its connections.
#[derive(Clone, Copy)]
enum Order<'a> {
    /// Close nine in ten, in all ways, and count them while at it.
    CloseMost(&'a AtomicUsize),
    /// Replace the oldest by new ones until told to stop.
    Replace(&'a AtomicBool),
    CloseRest,
    /// Move a byte each way on all of them, and accept one more.
    Exchange,
}

/// A thread with descriptors of its own that holds its share of the connections.
struct Holder<'a> {
    at: SocketAddr,
    to: mpsc::Sender<Order<'a>>,
    /// How many connections it has after each order.
    from: mpsc::Receiver<usize>,
}

/// All of them, in the calling thread's namespace.
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
                let (say, at) = mpsc::channel();
                s.spawn(move || {
                    if let Err(error) = hold(connections / holders, &say, &orders, &replies) {
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

    /// Waits for all to have done what they were told; returns how many connections are left.
    fn done(&self) -> Result<u32> {
        let mut left = 0;
        for holder in &self.0 {
            left += holder.from.recv().context("a holder failed")?;
        }
        Ok(left.try_into()?)
    }

    /// A fresh tracker's view of this namespace, and how long it took to be ready.
    fn fresh(&self) -> Result<(World, Duration)> {
        fresh(self.0.iter().map(|holder| holder.at))
    }
}

fn hold(
    share: usize,
    say: &mpsc::Sender<SocketAddr>,
    orders: &mpsc::Receiver<Order<'_>>,
    replies: &mpsc::Sender<usize>,
) -> Result<()> {
    raw::own_descriptors()?;
    let listener = sockets::listener(128)?;
    let mut pairs = (0..share)
        .map(|_| pair(&listener))
        .collect::<Result<VecDeque<_>>>()?;
    say.send(listener.local_addr()?)?;
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
                    // Slowly enough to be closing still when the tracker seeds.
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
                    give(client, 1)?;
                    take(server, 1)?;
                    give(server, 1)?;
                    take(client, 1)?;
                }
                pairs.push_back(pair(&listener)?);
            }
        }
        replies.send(pairs.len())?;
    }
    Ok(())
}

fn fresh(listeners: impl Iterator<Item = SocketAddr>) -> Result<(World, Duration)> {
    let begun = Instant::now();
    let (tracker, _) = kernel::start()?;
    let took = begun.elapsed();
    let world = World::here(tracker)?;
    listeners.for_each(|at| world.serving_at(at));
    Ok((world, took))
}

fn case_23_an_agent_started_amid_ten_thousand_closing_connections_counts_what_is_left() -> Result<()>
{
    let _turn = turn();
    let closed = AtomicUsize::new(0);
    inhabited(|| {
        thread::scope(|s| {
            let holders = Holders::start(s)?;
            holders.order(Order::CloseMost(&closed))?;
            while closed.load(Ordering::Relaxed) < MANY / 20 {
                sleep(Duration::from_micros(100));
            }
            let before = closed.load(Ordering::Relaxed);
            let (world, took) = holders.fresh()?;
            let after = closed.load(Ordering::Relaxed);
            eprintln!("ready after {took:?}, while {before} to {after} of {MANY} were closed");
            ensure!(
                before < after && after < MANY * 9 / 10,
                "closing and seeding were not at the same time"
            );
            let left = holders.done()?;
            world.has(&[(Active, left)], left)?;
            // Nobody was disturbed.
            holders.order(Order::Exchange)?;
            let left = holders.done()?;
            world.has(&[(Active, left)], left)?;
            ensure!(world.tracker.losses()?.iter().all(|n| *n == 0));
            // A restart finds the same.
            drop(world);
            let (world, took) = holders.fresh()?;
            eprintln!("ready again after {took:?}");
            world.has(&[(Active, left)], left)?;
            world.has_no_drift()?;
            holders.order(Order::CloseRest)?;
            holders.done()?;
            world.has(&[], 0)
        })
    })
}

fn seeding_is_exact_while_connections_open_and_close() -> Result<()> {
    let _turn = turn();
    let stops = [const { AtomicBool::new(false) }; 3];
    inhabited(|| {
        thread::scope(|s| {
            let holders = Holders::start(s)?;
            for stop in &stops {
                holders.order(Order::Replace(stop))?;
                let fresh = holders.fresh();
                stop.store(true, Ordering::Relaxed);
                holders.done()?;
                holders.order(Order::Exchange)?;
                let open = holders.done()?;
                let (world, took) = fresh?;
                eprintln!("{open} connections seeded in {took:?}");
                world.has(&[(Active, open)], open)?;
                world.has_no_drift()?;
                ensure!(world.tracker.losses()?.iter().all(|n| *n == 0));
            }
            Ok(())
        })
    })
}

fn a_hundred_thousand_connections_are_seeded_and_go_on() -> Result<()> {
    let _turn = turn();
    inhabited(|| {
        thread::scope(|s| {
            let holders = Holders::start_many(s, 20, VERY_MANY)?;
            let (world, took) = holders.fresh()?;
            eprintln!("{VERY_MANY} connections seeded in {took:?}");
            ensure!(took < Duration::from_secs(10), "not ready after {took:?}");
            let is = |open: usize| -> Result<()> {
                let counted: i64 = world.counts().iter().map(|c| c.inbound).sum();
                let flows = world.snapshot()?.flows;
                let inbound = flows.iter().filter(|f| f.direction == Direction::Inbound);
                let seen = inbound.count();
                ensure!(
                    (counted, seen) == (open as i64, open) && flows.len() == 2 * open,
                    "{counted} counted and {seen} of {} seen of {open}",
                    flows.len()
                );
                Ok(())
            };
            is(VERY_MANY)?;
            holders.order(Order::Exchange)?;
            let open = holders.done()?;
            ensure!(open as usize == VERY_MANY + 20, "{open}");
            is(open as usize)?;
            world.has_no_drift()?;
            ensure!(world.tracker.losses()?.iter().all(|n| *n == 0));
            holders.order(Order::CloseRest)?;
            holders.done()?;
            Ok(())
        })
    })
}

fn a_dial_under_way_at_the_start_is_outbound() -> Result<()> {
    let _turn = turn();
    inhabited(|| {
        let listener = sockets::listener(16)?;
        let client = dial(listener.local_addr()?, libc::IPPROTO_TCP, |s| {
            Ok(raw::deafen(s)?)
        })?;
        let (world, _) = fresh([listener.local_addr()?].into_iter())?;
        world.has(&[], 0)?;
        raw::undeafen(&client)?;
        // The SYN, or the SYN+ACK, is sent again after a second.
        world.has(&[(Backlog, 1)], 1)?;
        drop((client, listener));
        world.has(&[], 0)
    })
}

fn a_queued_connection_older_than_the_agent_is_inbound_backlog() -> Result<()> {
    let _turn = turn();
    inhabited(|| {
        let listener = sockets::listener(16)?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        let (world, _) = fresh([listener.local_addr()?].into_iter())?;
        world.has(&[(Backlog, 1)], 1)?;
        drop(listener.accept()?);
        world.has(&[], 1)?;
        drop(client);
        world.has(&[], 0)
    })
}
