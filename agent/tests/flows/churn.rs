//! A hundred thousand connections, and more events than anybody reads (case 25).

use std::{
    net::TcpListener,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb::kernel::{KernelEvent, Tracker};
use ebb_common::{LOST_EVENT, LOST_STORAGE, LOST_WORKLOAD};

use crate::{
    seeding::turn,
    support::{
        kernel,
        namespace::Namespace,
        sockets::{self, pair},
        world::World,
    },
};

trials![case_25_a_hundred_thousand_connections_leave_counters_equal_to_a_sweep];

const NAMESPACES: usize = 100;
const WATCHED: usize = 20;
/// In each namespace, and once more on the host network. Each is two: client to sidecar, sidecar to app.
const REQUESTS: usize = 500;
/// Requests in each that are not over at the end.
const OPEN: usize = 3;

fn case_25_a_hundred_thousand_connections_leave_counters_equal_to_a_sweep() -> Result<()> {
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
        "the ring buffer never was full"
    );
    ensure!(losses[LOST_STORAGE as usize] == 0 && losses[LOST_WORKLOAD as usize] == 0);
    for (pod, namespace) in left.iter().zip(&pods) {
        namespace.run(|| pod.is_as_the_kernel_says(&tracker))?;
    }
    left[NAMESPACES].is_as_the_kernel_says(&tracker)?;
    eprintln!("swept after {:?}", begun.elapsed());

    // Whoever reads the events is told that some are missing.
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
    .filter(|told| *told)
    .context("nobody was told of the loss")?;
    drop(left);
    let found = kernel::wait(tracker.audit(None))?;
    ensure!(
        found.drift == 0 && tracker.drift() == 0 && found.uncounted == 0,
        "{found:?}"
    );
    for count in tracker.counts() {
        ensure!(count.inbound >= 0, "{count:?}");
    }
    Ok(())
}

/// What is left in a namespace after the churn.
struct Pod {
    listeners: [TcpListener; 2],
    open: Vec<[(std::net::TcpStream, std::net::TcpStream); 2]>,
    ever: u64,
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
                        // TIME_WAIT sockets would only slow down the sweep.
                        sockets::reset(client)?;
                        drop(server);
                    }
                }
            }
        }
        Ok(Self {
            listeners,
            open,
            ever: world.ever(),
        })
    }

    fn is_as_the_kernel_says(&self, tracker: &Tracker) -> Result<()> {
        let world = World::here(tracker.clone())?;
        for listener in &self.listeners {
            world.serving_at(listener.local_addr()?);
        }
        let wanted = u32::try_from(2 * self.open.len())?;
        let agreed = world.agrees()?;
        ensure!(agreed == (wanted, wanted), "{agreed:?}, {wanted} are open");
        ensure!(
            self.ever == 2 * REQUESTS as u64,
            "{} of {} counted",
            self.ever,
            2 * REQUESTS
        );
        Ok(())
    }
}
