//! The calls of one client connection.

use std::path::PathBuf;

use bytes::Bytes;
use ebb_core::{clock::BootTime, time_budget::TimeBudget};
use ebb_protocol::proxy_metrics::PROXY_METRICS_PATH;
use http::{
    HeaderValue, Method, Request, Response,
    header::{CONTENT_LENGTH, CONTENT_TYPE, Entry},
};
use hyper::body::Incoming;
use tokio_util::task::TaskTracker;

use crate::{
    body::{ReplyBody, RequestBody},
    grpc,
    hold_client::{HoldClient, HoldOutcome},
    http2_limits,
    metrics::{CallGuard, CallOutcome, ClientGuard, ProxyCounters},
    stop::{self, StopCall},
    upstream::Upstream,
};

/// The longest `traceparent` that the agent gets. Those of version 00 have 55 bytes
/// (<https://www.w3.org/TR/trace-context/#traceparent-header>); a later version may append fields.
const LONGEST_TRACEPARENT: usize = 128;

/// Counts as unanswered although the kubelet sets no deadline for it, because a cancelled pull starts again from the
/// beginning.
const PULL_IMAGE: &str = "/runtime.v1.ImageService/PullImage";

/// A client connection and its connection to the runtime.
#[derive(Debug)]
pub(crate) struct ClientConnection {
    runtime: Upstream,
    holds: HoldClient,
    unanswered: TaskTracker,
    counters: ProxyCounters,
    /// Counts this connection.
    _client: ClientGuard,
}

impl ClientConnection {
    /// A client connection whose calls go to the runtime at `runtime`. Calls for whose end a stopping proxy waits
    /// hold a token of `unanswered`.
    pub(crate) fn new(
        runtime: PathBuf,
        holds: HoldClient,
        unanswered: TaskTracker,
        counters: ProxyCounters,
    ) -> Self {
        Self {
            _client: counters.client(),
            counters,
            runtime: Upstream::new(runtime),
            holds,
            unanswered,
        }
    }

    /// Answers a call. hyper drops the future when the caller resets the stream or disconnects; that cancels the
    /// hold, or the call to the runtime.
    pub(crate) async fn call(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<ReplyBody>, hyper::Error> {
        if request.method() == Method::GET && request.uri().path() == PROXY_METRICS_PATH {
            return Ok(self.metrics());
        }
        let mut counted = self.counters.call(request.uri().path());
        let is_stop = stop::is_stop(request.uri().path());
        // A call without a deadline may be a stream that never ends. The kubelet makes new calls while the proxy
        // stops: of those, the proxy waits only for stop calls.
        let ends = is_stop
            || ((request.headers().contains_key(grpc::GRPC_TIMEOUT)
                || request.uri().path() == PULL_IMAGE)
                && !self.holds.shutdown.is_cancelled());
        let token = ends.then(|| self.unanswered.token());
        let request = if is_stop {
            self.hold(request, &counted).await?
        } else {
            counted.sent();
            request.map(RequestBody::streaming)
        };
        let reply = self.runtime.call(request).await;
        let reply = reply.inspect_err(|_| counted.set(CallOutcome::Reset))?;
        // Without a body, the headers have the status.
        if let Some(outcome) = CallOutcome::of(reply.headers()) {
            counted.set(outcome);
        }
        Ok(reply.map(|body| body.with_token(token).with_call(counted)))
    }

    /// The proxy's own metrics.
    fn metrics(&self) -> Response<ReplyBody> {
        // These types always have a JSON form.
        let json = serde_json::to_vec(&self.counters.view()).unwrap_or_default();
        let mut reply = Response::new(ReplyBody::own(Bytes::from(json)));
        let json = HeaderValue::from_static("application/json");
        reply.headers_mut().insert(CONTENT_TYPE, json);
        reply
    }

    /// Holds a stop call if the agent decides so, and returns the request to forward.
    async fn hold(
        &self,
        request: Request<Incoming>,
        counted: &CallGuard,
    ) -> Result<Request<RequestBody>, hyper::Error> {
        let arrived = BootTime::now();
        let (mut head, body) = request.into_parts();
        // Fails only if the caller disconnects.
        let mut body = RequestBody::read(body, http2_limits::STOP_REQUEST).await?;
        let call = body.whole().and_then(|data| {
            let call = StopCall::parse(head.uri.path(), data)?;
            Some((call, data.clone()))
        });
        let Some((call, data)) = call else {
            let why = stop::why_unreadable(body.whole());
            self.holds.forward_unreadable(head.uri.path(), why);
            counted.sent();
            return Ok(Request::from_parts(head, body));
        };
        let budget = TimeBudget {
            timeout: call.timeout(),
            rpc_timeout: head
                .headers
                .get(grpc::GRPC_TIMEOUT)
                .and_then(grpc::parse_timeout),
        };
        let traceparent = head.headers.get("traceparent");
        let traceparent = traceparent
            .and_then(|value| value.to_str().ok())
            .filter(|value| value.len() <= LONGEST_TRACEPARENT)
            .map(Into::into);
        let outcome = self.holds.hold(&call, budget, arrived, traceparent).await;
        if !outcome.was_held() {
            counted.sent();
        }
        if let HoldOutcome::Delayed {
            waited, reserve, ..
        } = outcome
        {
            if let Some(seconds) = budget.remaining_timeout(waited, reserve) {
                let data = call.with_timeout(data, seconds);
                // gRPC clients send no content-length, but if there is one, it must match the new data.
                if let Entry::Occupied(mut length) = head.headers.entry(CONTENT_LENGTH) {
                    length.insert(data.len().into());
                }
                body = body.with_data(data);
            }
            if let Some(rpc_timeout) = budget.remaining_rpc_timeout(waited) {
                head.headers
                    .insert(grpc::GRPC_TIMEOUT, grpc::format_timeout(rpc_timeout));
            }
        }
        Ok(Request::from_parts(head, body))
    }
}
