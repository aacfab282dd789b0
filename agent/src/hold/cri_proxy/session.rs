//! The calls of one client connection.

use std::path::PathBuf;

use http::{
    Request, Response,
    header::{CONTENT_LENGTH, Entry},
};
use hyper::body::Incoming;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::{
    allowance::Allowance,
    body::{ReplyBody, RequestBody},
    gate::{Gate, Outcome},
    grpc,
    runtime::Runtime,
    stop::{self, StopCall},
    tuning,
};

/// The kubelet gives it no deadline, and it ends all the same. To cut it off is to begin the download anew.
const PULL_IMAGE: &str = "/runtime.v1.ImageService/PullImage";

/// A client connection and what belongs to it.
#[derive(Debug)]
pub(super) struct Session {
    runtime: Runtime,
    gate: Gate,
    unanswered: TaskTracker,
}

impl Session {
    /// A session whose calls go to the runtime at `runtime`. Those that a proxy that is being stopped
    /// should wait for have a token of `unanswered` until they have ended.
    pub(super) fn new(runtime: PathBuf, gate: Gate, unanswered: TaskTracker) -> Self {
        Self {
            runtime: Runtime::new(runtime),
            gate,
            unanswered,
        }
    }

    /// Answers a call. hyper drops the future when the caller resets the stream or goes away, and with
    /// it the hold or the call to the runtime, whichever it is at.
    pub(super) async fn call(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<ReplyBody>, hyper::Error> {
        let is_stop = stop::is_stop(request.uri().path());
        // What has no deadline may be a stream that never ends. And while the proxy is being stopped a
        // kubelet goes on calling: only its stops are a reason to stay longer.
        let ends = is_stop
            || ((request.headers().contains_key(grpc::GRPC_TIMEOUT)
                || request.uri().path() == PULL_IMAGE)
                && !self.gate.shutdown.is_cancelled());
        let token = ends.then(|| self.unanswered.token());
        let request = if is_stop {
            self.hold(request).await?
        } else {
            request.map(RequestBody::streaming)
        };
        let reply = self.runtime.call(request).await?;
        Ok(reply.map(|body| body.with_token(token)))
    }

    /// Holds a stop call if it is to be held, and returns what to forward.
    async fn hold(&self, request: Request<Incoming>) -> Result<Request<RequestBody>, hyper::Error> {
        let arrived = Instant::now();
        let (mut head, body) = request.into_parts();
        // Fails only when the caller has gone.
        let mut body = RequestBody::read(body, tuning::STOP_REQUEST).await?;
        let call = body.whole().and_then(|data| {
            let call = StopCall::parse(head.uri.path(), data)?;
            Some((call, data.clone()))
        });
        if let Some((call, data)) = call {
            let allowance = Allowance {
                timeout: call.timeout(),
                patience: head
                    .headers
                    .get(grpc::GRPC_TIMEOUT)
                    .and_then(grpc::parse_timeout),
            };
            let outcome = self.gate.hold(&call, allowance, arrived).await;
            if let Outcome::Kept { waited, reserve } = outcome {
                if let Some(seconds) = allowance.timeout_after(waited, reserve) {
                    let data = call.with_timeout(data, seconds);
                    // gRPC clients send none, but one that is wrong would end the stream.
                    if let Entry::Occupied(mut length) = head.headers.entry(CONTENT_LENGTH) {
                        length.insert(data.len().into());
                    }
                    body = body.with_data(data);
                }
                if let Some(patience) = allowance.patience_after(waited) {
                    head.headers
                        .insert(grpc::GRPC_TIMEOUT, grpc::format_timeout(patience));
                }
            }
        }
        Ok(Request::from_parts(head, body))
    }
}
