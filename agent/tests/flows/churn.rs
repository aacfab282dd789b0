//! A hundred thousand connections, and more events than the receiver reads (case 25).

use std::{
    net::TcpListener,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb::kernel::{KernelEvent, Tracker};
use ebb_common::{LOST_COUNT, LOST_EVENT};
use ebb_testkit::namespace::Namespace;

use crate::{
    starting::turn,
    support::{
        kernel,
        sockets::{self, pair},
        world::World,
    },
};

ebb_testkit::trials![case_25_after_a_hundred_thousand_connections_the_counters_equal_a_dump];

const NAMESPACES: usize = 100;
const WATCHED: usize = 20;
/// In each namespace, and in the host's. Each is two connections: client to sidecar, and sidecar to app.
const REQUESTS: usize = 500;
/// Requests in each namespace that are still open at the end.
const OPEN: usize = 3;

fn case_25_after_a_hundred_thousand_connections_the_counters_equal_a_dump() -> Result<()> {
    let _turn = turn();
    let (tracker, mut events) = kernel::start()?;
    let begun = Instant::now();
    let pods = (0..NAMESPACES)
        .map(|_| Namespace::new())
        .collect::<Result<Vec<_>>>()?;
    let (first, second) = pods.split_at(NAMESPACES / 2);
    let left = thread::scope(|s| {
        let half = |pods: &'static str, namespaces: &[Namespace]| -> Result<Vec<Pod>> {
            namespaces
                .iter()
                .enumerate()
                .map(|(n, pod)| pod.run(|| Pod::churn(&tracker, n < WATCHED / 2)))
                .collect::<Result<Vec<_>>>()
                .context(pods)
        };
        let other = s.spawn(move || half("the second half", second));
        let mut left = half("the first half", first)?;
        left.extend(other.join().unwrap()?);
        // This thread is on the host network.
        left.push(Pod::churn(&tracker, false)?);
        anyhow::Ok(left)
    })?;
    let opened = 2 * REQUESTS * left.len();
    eprintln!("{opened} connections in {:?}", begun.elapsed());

    let losses = tracker.losses()?;
    ensure!(
        losses[LOST_EVENT as usize] > 0,
        "the ring buffer was never full"
    );
    ensure!(losses[LOST_COUNT as usize] == 0);
    eprintln!("{} state changes missed", tracker.missed_changes()?);
    for (pod, namespace) in left.iter().zip(&pods) {
        namespace.run(|| pod.is_as_the_kernel_says(&tracker))?;
    }
    left[NAMESPACES].is_as_the_kernel_says(&tracker)?;
    eprintln!("compared after {:?}", begun.elapsed());

    // The receiver of the events gets a report that some are missing.
    kernel::wait(async {
        let read = async {
            while let Some(event) = events.recv().await {
                if event == KernelEvent::Lost {
                    return true;
                }
            }
            false
        };
        tokio::time::timeout(Duration::from_secs(5), read).await
    })
    .ok()
    .filter(|reported| *reported)
    .context("the loss was not reported")?;
    Ok(())
}

/// What is left in a namespace after the churn.
struct Pod {
    listeners: [TcpListener; 2],
    open: Vec<[(std::net::TcpStream, std::net::TcpStream); 2]>,
    opened: u64,
}

impl Pod {
    /// In the calling thread's namespace.
    fn churn(tracker: &Tracker, watched: bool) -> Result<Self> {
        let world = World::here(tracker.clone())?;
        if watched {
            tracker.watch(&world.scope)?;
        }
        let listeners = [sockets::listener(16)?, sockets::listener(16)?];
        let [sidecar, app] = &listeners;
        let mut open = Vec::new();
        for n in 0..REQUESTS {
            let both = [pair(sidecar)?, pair(app)?];
            if n % (REQUESTS / OPEN) == 7 {
                open.push(both);
                continue;
            }
            for (server, client) in both {
                match n % 8 {
                    0 => drop((server, client)),
                    1 => drop((client, server)),
                    _ => {
                        // TIME_WAIT sockets would only slow down the dump.
                        sockets::reset(client)?;
                        drop(server);
                    }
                }
            }
        }
        Ok(Self {
            listeners,
            open,
            opened: world.opened(),
        })
    }

    fn is_as_the_kernel_says(&self, tracker: &Tracker) -> Result<()> {
        let world = World::here(tracker.clone())?;
        world.older_than_tracker();
        for listener in &self.listeners {
            world.serving_at(listener.local_addr()?);
        }
        let wanted = u32::try_from(2 * self.open.len())?;
        let agreed = world.agrees()?;
        ensure!(agreed == (wanted, wanted), "{agreed:?}, {wanted} are open");
        // The kernel counts the changes that it misses.
        let missed = tracker.missed_changes()?;
        let wanted = 2 * REQUESTS as u64;
        ensure!(
            (wanted.saturating_sub(missed)..=wanted).contains(&self.opened),
            "{} of {wanted} counted, {missed} missed",
            self.opened
        );
        Ok(())
    }
}
