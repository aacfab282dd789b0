//! A watch: one line of JSON for every change after a version, and bookmarks in between.
//!
//! As `WatchServer` and the watch cache of the real server have it (staging/src/k8s.io/apiserver,
//! pkg/endpoints/handlers/watch.go and pkg/storage/cacher): `timeoutSeconds` ends it, with a bookmark shortly
//! before; a version that is too old is told as an `ERROR` within a good answer.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::answer::{self, Body};
use super::store::{Change, Gone, Selector, partial};
use super::{Delivery, Shared};

/// The real one sends about one a minute (`bookmarkFrequency`, cacher.go).
const BETWEEN_BOOKMARKS: Duration = Duration::from_secs(60);
/// How long a watch lasts that does not say (`--min-request-timeout`).
const LONGEST: Duration = Duration::from_secs(1800);

/// Begins one.
///
/// # Errors
/// What is wrong with the query.
pub(super) fn begin(
    shared: &Arc<Shared>,
    query: &BTreeMap<String, String>,
    metadata: bool,
) -> Result<Body, String> {
    let number = |name: &str| match query.get(name).map(|v| v.parse()) {
        None => Ok(None),
        Some(Ok(n)) => Ok(Some(n)),
        Some(Err(_)) => Err(format!("{name} is no number")),
    };
    let after = number("resourceVersion")?.filter(|v| *v != 0);
    let lasts = number("timeoutSeconds")?.map_or(LONGEST, Duration::from_secs);
    let selector = answer::selector(query)?;
    // The real one would tell the state first.
    let after = after.ok_or("this stand-in watches from a version only")?;
    let (lines, body) = mpsc::channel(16);
    let endings = {
        let mut state = shared.state();
        state.watching += 1;
        state.endings
    };
    let mut watch = Watch {
        selector,
        after,
        metadata,
        bookmarks: query
            .get("allowWatchBookmarks")
            .is_some_and(|b| b == "true"),
        ends: Instant::now() + lasts,
        endings,
        lines,
        open: Open(Arc::clone(shared)),
    };
    tokio::spawn(async move { watch.run().await });
    Ok(Lines(body).boxed_unsync())
}

struct Watch {
    selector: Selector,
    /// What the client knows.
    after: u64,
    metadata: bool,
    bookmarks: bool,
    ends: Instant,
    endings: u64,
    lines: mpsc::Sender<io::Result<Bytes>>,
    open: Open,
}

/// Counts as an open watch.
struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.change(|state| state.watching -= 1);
    }
}

/// What a watch does next.
enum Next {
    Tell(Change),
    Wait(Instant),
    Stalled,
    TooOld,
    End,
}

impl Watch {
    /// Tells until it ends or the client has left.
    async fn run(&mut self) -> Option<()> {
        let mut changed = self.open.0.changed.subscribe();
        let mut bookmark = Instant::now() + BETWEEN_BOOKMARKS;
        loop {
            changed.mark_unchanged();
            let (next, version) = self.next();
            let until = match next {
                Next::Tell(change) => {
                    self.tell(&change).await?;
                    self.after = change.version;
                    continue;
                }
                Next::TooOld => {
                    let error = answer::status(410, "Expired", "too old resource version");
                    return self.say("ERROR", &error).await;
                }
                Next::End => return self.bookmark(version).await,
                Next::Wait(until) => until.min(bookmark),
                Next::Stalled => self.ends,
            };
            tokio::select! {
                () = self.lines.closed() => return None,
                _ = changed.changed() => {}
                () = sleep_until(until) => {}
            }
            if Instant::now() >= bookmark {
                bookmark += BETWEEN_BOOKMARKS;
                let at = self.after;
                self.bookmark(at).await?;
            }
        }
    }

    /// What comes next, and the version that it is told at.
    fn next(&self) -> (Next, u64) {
        let state = self.open.0.state();
        let version = state.store.version();
        let now = Instant::now();
        if now >= self.ends {
            return (Next::End, self.after);
        }
        let lag = match state.faults.delivery {
            Delivery::AtOnce => Duration::ZERO,
            Delivery::After(lag) => lag,
            Delivery::Stalled => return (Next::Stalled, version),
        };
        let next = match state.store.after(self.after, &self.selector) {
            Err(Gone) => Next::TooOld,
            Ok(None) if state.endings > self.endings => Next::End,
            Ok(None) => Next::Wait(self.ends),
            Ok(Some(change)) => match Instant::from_std(change.at) + lag {
                due if due <= now => Next::Tell(change),
                _ if state.endings > self.endings => return (Next::End, self.after),
                due => Next::Wait(due.min(self.ends)),
            },
        };
        (next, version)
    }

    async fn tell(&self, change: &Change) -> Option<()> {
        let (faults, before) = {
            let state = self.open.0.state();
            let before = state.store.before(change.version - 1, &self.selector);
            (state.faults, before)
        };
        let told = self.line(change.kind, &change.object);
        if faults.torn {
            let half = told.slice(..told.len() / 2);
            self.lines.send(Ok(half)).await.ok()?;
            // Else it might be thrown away with the connection.
            tokio::time::sleep(Duration::from_millis(50)).await;
            let _ = self.lines.send(Err(io::ErrorKind::BrokenPipe.into())).await;
            return None;
        }
        self.lines.send(Ok(told.clone())).await.ok()?;
        if faults.twice {
            self.lines.send(Ok(told)).await.ok()?;
        }
        match before.filter(|_| faults.old_news) {
            Some(old) => self.say(old.kind, &old.object).await,
            None => Some(()),
        }
    }

    async fn bookmark(&self, version: u64) -> Option<()> {
        if !self.bookmarks {
            return Some(());
        }
        let object = json!({
            "kind": "Pod", "apiVersion": "v1", "spec": {"containers": null}, "status": {},
            "metadata": {"resourceVersion": version.to_string()},
        });
        self.say("BOOKMARK", &object).await
    }

    async fn say(&self, kind: &str, object: &Value) -> Option<()> {
        self.lines.send(Ok(self.line(kind, object))).await.ok()
    }

    fn line(&self, kind: &str, object: &Value) -> Bytes {
        let object = match self.metadata && kind != "ERROR" {
            true => partial(object),
            false => object.clone(),
        };
        format!("{}\n", json!({"type": kind, "object": object})).into()
    }
}

/// The lines as the body of an answer.
struct Lines(mpsc::Receiver<io::Result<Bytes>>);

impl HttpBody for Lines {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let line = self.0.poll_recv(context);
        line.map(|line| line.map(|line| line.map(Frame::data)))
    }
}
