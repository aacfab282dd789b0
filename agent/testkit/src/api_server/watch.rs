//! A watch: one line of JSON per change after a version, and bookmarks in between.
//!
//! Like `WatchServer` and the watch cache of the real server (staging/src/k8s.io/apiserver,
//! pkg/endpoints/handlers/watch.go and pkg/storage/cacher): `timeoutSeconds` ends it, with a bookmark shortly before.
//! For a version that is too old, the answer has status 200 and one `ERROR` line.

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

use super::answer::{self, ApiBody};
use super::store::{Gone, PodChange, Selector, partial};
use super::{ApiVerb, Delivery, Faults, ServerShared, ServerState};

/// The real server sends about one per minute (`bookmarkFrequency`, cacher.go).
const BETWEEN_BOOKMARKS: Duration = Duration::from_secs(60);
/// The timeout of a watch without `timeoutSeconds` (`--min-request-timeout`).
const LONGEST: Duration = Duration::from_secs(1800);

/// Starts a watch.
///
/// # Errors
/// What is wrong with the query.
pub(super) fn begin(
    shared: &Arc<ServerShared>,
    verb: ApiVerb,
    query: &BTreeMap<String, String>,
    metadata: bool,
) -> Result<ApiBody, String> {
    let number = |name: &str| match query.get(name).map(|v| v.parse()) {
        None => Ok(None),
        Some(Ok(n)) => Ok(Some(n)),
        Some(Err(_)) => Err(format!("{name} is no number")),
    };
    let after = number("resourceVersion")?.filter(|v| *v != 0);
    let lasts = number("timeoutSeconds")?.map_or(LONGEST, Duration::from_secs);
    let selector = answer::selector(query)?;
    // Without a version the real server sends the current state first.
    let after = after.ok_or("this server watches only from a version")?;
    let (lines, body) = mpsc::channel(16);
    let endings = {
        let mut state = shared.state();
        state.watching += usize::from(verb == ApiVerb::Watch);
        state.endings
    };
    let mut watch = WatchStream {
        verb,
        selector,
        after,
        metadata,
        bookmarks: query
            .get("allowWatchBookmarks")
            .is_some_and(|b| b == "true"),
        ends: Instant::now() + lasts,
        endings,
        lines,
        open: OpenWatch(Arc::clone(shared), verb),
    };
    tokio::spawn(async move { watch.run().await });
    Ok(Lines(body).boxed_unsync())
}

struct WatchStream {
    verb: ApiVerb,
    selector: Selector,
    /// The version that the client has.
    after: u64,
    metadata: bool,
    bookmarks: bool,
    ends: Instant,
    endings: u64,
    lines: mpsc::Sender<io::Result<Bytes>>,
    open: OpenWatch,
}

/// Counts as an open watch.
struct OpenWatch(Arc<ServerShared>, ApiVerb);

impl Drop for OpenWatch {
    fn drop(&mut self) {
        let is_of_pods = self.1 == ApiVerb::Watch;
        self.0
            .change(|state| state.watching -= usize::from(is_of_pods));
    }
}

/// What a watch does next.
enum WatchStep {
    Send(PodChange),
    Wait(Instant),
    Stalled,
    TooOld,
    End,
}

impl WatchStream {
    /// Sends changes until the watch ends or the client disconnects.
    async fn run(&mut self) -> Option<()> {
        let mut changed = self.open.0.changed.subscribe();
        let mut bookmark = Instant::now() + BETWEEN_BOOKMARKS;
        loop {
            changed.mark_unchanged();
            let (next, version) = self.next();
            let until = match next {
                WatchStep::Send(change) => {
                    self.send_change(&change).await?;
                    self.after = change.version;
                    continue;
                }
                WatchStep::TooOld => {
                    let error = answer::status(410, "Expired", "too old resource version");
                    return self.say("ERROR", &error).await;
                }
                WatchStep::End => return self.bookmark(version).await,
                WatchStep::Wait(until) => until.min(bookmark),
                WatchStep::Stalled => self.ends,
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

    /// The next step, and the version for a bookmark.
    fn next(&self) -> (WatchStep, u64) {
        let state = self.open.0.state();
        let store = state.store_of(self.verb);
        let version = store.version();
        let now = Instant::now();
        if now >= self.ends {
            return (WatchStep::End, self.after);
        }
        let lag = match faults_of(&state, self.verb).delivery {
            Delivery::AtOnce => Duration::ZERO,
            Delivery::After(lag) => lag,
            Delivery::Stalled => return (WatchStep::Stalled, version),
        };
        let next = match store.after(self.after, &self.selector) {
            Err(Gone) => WatchStep::TooOld,
            Ok(None) if state.endings > self.endings => WatchStep::End,
            Ok(None) => WatchStep::Wait(self.ends),
            Ok(Some(change)) => match Instant::from_std(change.at) + lag {
                due if due <= now => WatchStep::Send(change),
                _ if state.endings > self.endings => return (WatchStep::End, self.after),
                due => WatchStep::Wait(due.min(self.ends)),
            },
        };
        (next, version)
    }

    async fn send_change(&self, change: &PodChange) -> Option<()> {
        let (faults, before) = {
            let state = self.open.0.state();
            let store = state.store_of(self.verb);
            let before = store.before(change.version - 1, &self.selector);
            (faults_of(&state, self.verb), before)
        };
        let line = self.line(change.kind, &change.object);
        if faults.torn {
            let half = line.slice(..line.len() / 2);
            self.lines.send(Ok(half)).await.ok()?;
            // Otherwise the error could discard the half line before it is sent.
            tokio::time::sleep(Duration::from_millis(50)).await;
            let _ = self.lines.send(Err(io::ErrorKind::BrokenPipe.into())).await;
            return None;
        }
        self.lines.send(Ok(line.clone())).await.ok()?;
        if faults.twice {
            self.lines.send(Ok(line)).await.ok()?;
        }
        match before.filter(|_| faults.replay_previous) {
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

/// The faults of watches on pods; a watch on namespaces has none.
fn faults_of(state: &ServerState, verb: ApiVerb) -> Faults {
    match verb {
        ApiVerb::WatchNamespaces => Faults::default(),
        _ => state.faults,
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
