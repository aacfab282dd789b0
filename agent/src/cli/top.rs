//! `ebb top`.
//!
//! [`state`] says what is shown and how a key changes it, [`rows`] which rows that are, [`cells`] and [`details`] what
//! they contain. These are pure. [`draw`] draws them, [`interactive`] reads keys and asks the agent, [`screen`] is the
//! terminal. Without a terminal, [`frame`] is printed instead.

mod cells;
mod details;
mod draw;
mod frame;
mod interactive;
mod rows;
mod screen;
mod state;
#[cfg(test)]
mod testing;

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
    num::NonZeroU32,
    ops::RangeInclusive,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use clap::Args;
use ebb_core::format::{duration_within as within, one_line};
use ebb_protocol::{
    client::{AgentClient, AgentError},
    filter::PodQuery,
    service::stop_on_signal,
    views::{DrainList, PodList},
};
use tokio::time::sleep;

use self::frame::frame;
use super::{ConnectFlags, output::NamespaceFlags};

const INTERVAL: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(3600);

macro_rules! keys {
    () => {
        "  up, down, j, k   select a row; also page up, page down, home, end
  enter, right, l  open it: pod, its flows, one flow, the pod's drain
  esc, left, h     go back; esc also clears the filter
  /                show only rows with these words (names, labels, peers)
  s, r             sort by the next column; reverse the order
  e                hide or show pods without flows
  o                show or hide flows that the pod dialled
  d, D             the last drain of the pod; all drains of the node
  ?, q             help; quit"
    };
}

/// The keys, for the help inside `ebb top`.
const KEYS: &str = keys!();

/// The legend of the lists, and the keys.
pub(super) const LEGEND: &str = concat!(
    "\
Pods:
  LIVE    inbound connections in the middle of something
  IDLE    inbound connections that only wait, as between two requests
  NEW/S   new inbound connections per second
  PEERS   different addresses of these connections' clients
  OLDEST  the age of the oldest of them; > before a lower bound
  DRAIN   settling or draining, if a drain is under way
  LEFT    the time until its deadline
  FLOWS   these connections by state (docs/until.md)
Flows of a pod:
  PEER    the other end; an arrow before one that the pod dialled
  PORT    the port at the pod's end
  The other columns are those of ebb flows.
Drains:
  START   inbound connections when it began
  NOW     those that are open now, or were when it ended
  The other columns are those of ebb drains.

Keys:
",
    keys!(),
    "

Without a terminal, it prints each refresh as text. NO_COLOR turns colours off."
);

#[derive(Args)]
pub(super) struct TopFlags {
    /// Time between two refreshes. Each costs as much as `ebb pods`: a dump of the node's connections per pod.
    #[arg(short, long, default_value = "2s", value_parser = within(INTERVAL), value_name = "DURATION")]
    interval: Duration,
    /// Exit after N refreshes instead of at q or Ctrl-C.
    #[arg(long, value_name = "N")]
    times: Option<NonZeroU32>,
    #[command(flatten)]
    agent: ConnectFlags,
    #[command(flatten)]
    scope: NamespaceFlags,
}

/// Asks the agent for the lists of the pods that the flags ask for.
#[derive(Clone)]
struct Source {
    client: AgentClient,
    scope: NamespaceFlags,
}

impl Source {
    fn new(flags: &TopFlags) -> Self {
        Self {
            client: flags.agent.client(),
            scope: flags.scope.clone(),
        }
    }

    async fn pods(&self) -> Result<PodList, AgentError> {
        let query = PodQuery {
            namespace: self.scope.namespace.clone(),
            ..PodQuery::default()
        };
        // Plain values always have this form.
        let query = serde_urlencoded::to_string(query).unwrap_or_default();
        self.client.get_json(&format!("/v1/pods?{query}")).await
    }

    async fn drains(&self) -> Result<DrainList, AgentError> {
        let mut list: DrainList = self.client.get_json("/v1/drains").await?;
        list.drains
            .retain(|report| self.scope.includes(&report.pod.namespace));
        Ok(list)
    }

    async fn lists(&self) -> Result<(PodList, DrainList), AgentError> {
        tokio::try_join!(self.pods(), self.drains())
    }
}

pub(super) async fn run(flags: &TopFlags) -> Result<()> {
    // A terminal that calls itself dumb can't move its cursor.
    let is_dumb = env::var_os("TERM").is_some_and(|name| name == "dumb");
    if io::stdin().is_terminal() && io::stdout().is_terminal() && !is_dumb {
        return interactive::run(flags).await;
    }
    print_frames(flags).await
}

/// Appends a frame to standard output at each refresh.
async fn print_frames(flags: &TopFlags) -> Result<()> {
    let source = Source::new(flags);
    // If the first request fails, the command does. Later failures are shown above the last lists.
    let mut lists = source.lists().await?;
    let mut problem = None;
    let stop = stop_on_signal()?;
    let mut left = flags.times.map(NonZeroU32::get);
    loop {
        let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let (pods, drains) = &lists;
        match put(&frame(&now, problem.as_deref(), pods, drains)) {
            // The reader has closed the pipe.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written?,
        }
        left = left.map(|n| n - 1);
        if left == Some(0) {
            return Ok(());
        }
        let next = async {
            sleep(flags.interval).await;
            source.lists().await
        };
        match stop.run_until_cancelled(next).await {
            None => return Ok(()),
            Some(Ok(new)) => (lists, problem) = (new, None),
            // The agent may be back soon, as after an upgrade. Until then, its last answer is shown.
            Some(Err(e)) => problem = Some(not_refreshed(&e)),
        }
    }
}

fn not_refreshed(e: &AgentError) -> String {
    format!("not refreshed: {}", one_line(e))
}

fn put(frame: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{frame}")?;
    out.flush()
}
