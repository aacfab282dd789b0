//! The calls of one client connection.

use std::path::PathBuf;

use http::{
    Request, Response,
    header::{CONTENT_LENGTH, Entry},
};
use hyper::body::Incoming;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    allowance::Allowance,
    body::{ReplyBody, RequestBody},
    gate::{self, Outcome},
    grpc,
    runtime::Runtime,
    stop::{self, StopCall},
    tuning,
};
use crate::api::client::AgentClient;

/// A client connection and what belongs to it.
#[derive(Debug)]
pub(super) struct Session {
    runtime: Runtime,
    agent: AgentClient,
    shutdown: CancellationToken,
}

impl Session {
    /// A session whose calls go to the runtime at `runtime`.
    pub(super) fn new(runtime: PathBuf, agent: AgentClient, shutdown: CancellationToken) -> Self {
        Self {
            runtime: Runtime::new(runtime),
            agent,
            shutdown,
        }
    }

    /// Answers a call. hyper drops the future when the caller resets the stream or goes away, and with
    /// it the hold or the call to the runtime, whichever it is at.
    pub(super) async fn call(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<ReplyBody>, hyper::Error> {
        let request = if stop::is_stop(request.uri().path()) {
            self.hold(request).await?
        } else {
            request.map(RequestBody::streaming)
        };
        self.runtime.call(request).await
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
            let outcome = gate::hold(&self.agent, &call, allowance, arrived, &self.shutdown).await;
            if let Outcome::Held { held, reserve } = outcome {
                if let Some(seconds) = allowance.timeout_after(held, reserve) {
                    let data = call.with_timeout(data, seconds);
                    // gRPC clients send none, but one that is wrong would end the stream.
                    if let Entry::Occupied(mut length) = head.headers.entry(CONTENT_LENGTH) {
                        length.insert(data.len().into());
                    }
                    body = body.with_data(data);
                }
                if let Some(patience) = allowance.patience_after(held) {
                    head.headers
                        .insert(grpc::GRPC_TIMEOUT, grpc::format_timeout(patience));
                }
            }
        }
        Ok(Request::from_parts(head, body))
    }
}
