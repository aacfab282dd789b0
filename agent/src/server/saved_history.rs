//! Keeps the reports of finished drains and the records of stops in a file of the run directory, so that `ebb drains` and
//! `ebb explain` know them after a restart of the agent.
//!
//! One JSON object per line, newest first: `{"stop": …}` or `{"drain": …}`. The file is written as a whole, by a task of
//! its own, at most once a second and only after a change. It is lost with the next boot, as the run directory is.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ebb_core::{drain_report::Report, format::one_line};
use ebb_protocol::views::StopView;
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::spawn_blocking, time::sleep};

use super::holds::Holds;
use crate::{
    drains::driver::{DrainHandle, DrainsView},
    linux::files,
};

/// The reason of a stop that was held when its agent was killed.
const AGENT_ENDED: &str = "agent-ended";

/// The longest file. Beyond it, the oldest reports are left out: one may list 256 connections.
const LONGEST_FILE: usize = 4 << 20;

/// The time between two writes.
const PACE: Duration = Duration::from_secs(1);

/// How long the last write may take when the agent stops.
const LAST_WRITE_WITHIN: Duration = Duration::from_secs(1);

/// One line of the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SavedLine {
    Stop(Box<StopView>),
    Drain(Arc<Report>),
}

#[derive(Debug, Default, PartialEq, Eq)]
struct PastRecords {
    /// Newest first, as are the drains.
    stops: Vec<StopView>,
    drains: Vec<Arc<Report>>,
}

impl PastRecords {
    fn read(path: &Path) -> io::Result<Self> {
        let text = match fs::read_to_string(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            text => text?,
        };
        let mut records = Self::default();
        for line in text.lines() {
            match serde_json::from_str(line)? {
                SavedLine::Stop(stop) => records.stops.push(ended_with_its_agent(*stop)),
                SavedLine::Drain(report) => records.drains.push(report),
            }
        }
        Ok(records)
    }

    /// The text of the file.
    fn lines(self) -> serde_json::Result<String> {
        let mut text = String::new();
        let stops = self.stops.into_iter().map(|s| SavedLine::Stop(s.into()));
        for line in stops.chain(self.drains.into_iter().map(SavedLine::Drain)) {
            let line = serde_json::to_string(&line)?;
            if text.len() + line.len() >= LONGEST_FILE {
                break;
            }
            text.push_str(&line);
            text.push('\n');
        }
        Ok(text)
    }
}

/// A hold ends with its agent at the latest.
fn ended_with_its_agent(stop: StopView) -> StopView {
    match stop.held && stop.reason.is_none() {
        true => StopView {
            reason: Some(AGENT_ENDED.into()),
            ..stop
        },
        false => stop,
    }
}

/// The file, and what is saved in it.
pub(crate) struct SavedHistory {
    path: PathBuf,
    drains: watch::Receiver<Arc<DrainsView>>,
    holds: Arc<Holds>,
}

impl SavedHistory {
    /// Gives what an earlier agent has saved at `path` to `drains` and `holds`. If the file can't be read, warns and
    /// begins with nothing.
    pub(crate) fn restore(path: PathBuf, drains: &DrainHandle, holds: &Arc<Holds>) -> Self {
        let past = PastRecords::read(&path).unwrap_or_else(|e| {
            tracing::warn!(
                "can't read the history of drains in {}: {}; it begins anew",
                path.display(),
                one_line(&e)
            );
            PastRecords::default()
        });
        drains.restore(past.drains);
        holds.stops().restore(past.stops);
        Self {
            path,
            drains: drains.view(),
            holds: Arc::clone(holds),
        }
    }

    /// Saves after each change. Ends with the drains.
    pub(crate) async fn follow(self: Arc<Self>) {
        let mut drains = self.drains.clone();
        let mut stops = self.holds.stops().changes();
        let mut saved = newest(&drains.borrow_and_update());
        let mut is_failing = false;
        loop {
            tokio::select! {
                changed = drains.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = newest(&drains.borrow_and_update());
                    // Most views differ in drains under way only.
                    if std::mem::replace(&mut saved, now.clone()) == now {
                        continue;
                    }
                }
                // This value holds the sender.
                _ = stops.changed() => {}
            }
            sleep(PACE).await;
            saved = newest(&drains.borrow_and_update());
            stops.borrow_and_update();
            let written = self.save().await;
            if let Err(e) = &written
                && !is_failing
            {
                tracing::warn!(
                    "can't save the history of drains in {}: {}; a restart of the agent will lose it",
                    self.path.display(),
                    one_line(e)
                );
            }
            is_failing = written.is_err();
        }
    }

    /// Saves once more, for an agent that stops.
    pub(crate) async fn save_last(&self) {
        let written = tokio::time::timeout(LAST_WRITE_WITHIN, self.save()).await;
        let failure = match written {
            Ok(Ok(())) => return,
            Ok(Err(e)) => one_line(&e),
            Err(_) => format!("it took longer than {LAST_WRITE_WITHIN:?}"),
        };
        tracing::warn!(
            "can't save the history of drains in {}: {failure}",
            self.path.display()
        );
    }

    async fn save(&self) -> io::Result<()> {
        let records = PastRecords {
            stops: self.holds.stops().of(|_| true),
            drains: self.drains.borrow().finished.clone(),
        };
        if records == PastRecords::default() {
            return Ok(());
        }
        let path = self.path.clone();
        spawn_blocking(move || {
            let text = records.lines()?;
            files::write_for_this_boot(&path, text.as_bytes())
        })
        .await?
    }
}

/// What tells one list of finished drains from another.
fn newest(view: &DrainsView) -> Option<(String, usize)> {
    let first = view.finished.first()?;
    Some((
        format!("{} {} {}", first.pod.uid, first.started_at, first.held_ms),
        view.finished.len(),
    ))
}

#[cfg(test)]
mod tests {
    use ebb_core::{
        drain_report::{CutFlow, ReleaseReason, testing::report},
        flow::FlowState,
    };

    use super::*;

    fn stop(at: &str) -> StopView {
        StopView {
            at: at.into(),
            ..StopView::new(&report(None).pod, "StopContainer")
        }
    }

    #[test]
    fn what_was_saved_is_read_again_in_its_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history");
        assert_eq!(PastRecords::read(&path).unwrap(), PastRecords::default());
        let drain = |reason| Arc::new(report(Some(reason)));
        let records = || PastRecords {
            stops: vec![stop("second"), stop("first")],
            drains: vec![
                drain(ReleaseReason::Deadline),
                drain(ReleaseReason::Drained),
            ],
        };
        files::write_for_this_boot(&path, records().lines().unwrap().as_bytes()).unwrap();
        assert_eq!(PastRecords::read(&path).unwrap(), records());
    }

    #[test]
    fn a_hold_of_a_killed_agent_has_ended_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history");
        let held = StopView {
            held: true,
            ..stop("now")
        };
        let records = PastRecords {
            stops: vec![held],
            drains: vec![],
        };
        fs::write(&path, records.lines().unwrap()).unwrap();
        let read = PastRecords::read(&path).unwrap();
        assert_eq!(read.stops[0].reason.as_deref(), Some(AGENT_ENDED));
    }

    #[test]
    fn a_damaged_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history");
        for damaged in [
            &b"{\"drain\":"[..],
            b"\xff\xfe",
            b"{\"other\":1}\n",
            b"\0\0\0",
        ] {
            fs::write(&path, damaged).unwrap();
            assert!(PastRecords::read(&path).is_err(), "{damaged:?}");
        }
    }

    #[test]
    fn the_file_is_bounded_and_keeps_the_newest() {
        let mut long = report(Some(ReleaseReason::Deadline));
        let cut = CutFlow {
            remote: "[2001:db8::1]:50000".parse().unwrap(),
            peer: None,
            local: "[2001:db8::2]:8080".parse().unwrap(),
            state: FlowState::HalfClosed,
            age_ms: Some(u64::MAX),
            age_at_least_ms: None,
            bytes_in: u64::MAX,
            bytes_out: u64::MAX,
        };
        long.cut = vec![cut; 256];
        let drains = (0..256).map(|n| {
            let mut report = long.clone();
            report.started_at = format!("{n}");
            Arc::new(report)
        });
        let records = PastRecords {
            stops: (0..256).map(|_| stop("x")).collect(),
            drains: drains.collect(),
        };
        let text = records.lines().unwrap();
        assert!(text.len() <= LONGEST_FILE, "{}", text.len());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history");
        fs::write(&path, text).unwrap();
        let read = PastRecords::read(&path).unwrap();
        assert_eq!(read.stops.len(), 256);
        assert_eq!(read.drains[0].started_at, "0");
        assert!(read.drains.len() > 32, "{}", read.drains.len());
    }
}
