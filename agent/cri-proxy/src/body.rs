//! The request and reply bodies that the proxy forwards.
//!
//! Both hide the size hint of the body that they wrap, because hyper would add a `content-length` header for it, and
//! the proxy must not change headers.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::{
    grpc,
    metrics::{CallGuard, CallOutcome},
};

/// The body of a request to the runtime.
#[derive(Debug)]
pub(crate) struct RequestBody {
    /// The data that the proxy has read; it is forwarded first.
    read: Option<Bytes>,
    /// The rest, not read yet.
    rest: Option<Incoming>,
    /// The trailers, if the proxy has read them.
    trailers: Option<HeaderMap>,
}

impl RequestBody {
    /// A body that the proxy forwards without reading it.
    pub(crate) const fn streaming(body: Incoming) -> Self {
        Self {
            read: None,
            rest: Some(body),
            trailers: None,
        }
    }

    /// Reads a body up to `limit` bytes. The rest of a longer body stays unread.
    pub(crate) async fn read(mut body: Incoming, limit: usize) -> Result<Self, hyper::Error> {
        let mut read = BytesMut::new();
        let mut trailers = None;
        while let Some(frame) = body.frame().await {
            match frame?.into_data() {
                Ok(data) => read.extend_from_slice(&data),
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
            if read.len() > limit {
                return Ok(Self {
                    read: Some(read.freeze()),
                    rest: Some(body),
                    trailers,
                });
            }
        }
        Ok(Self {
            read: Some(read.freeze()),
            rest: None,
            trailers,
        })
    }

    /// The data, if all of it has been read.
    pub(crate) fn whole(&self) -> Option<&Bytes> {
        self.read.as_ref().filter(|_| self.rest.is_none())
    }

    /// The same body with other data.
    pub(crate) fn with_data(self, data: Bytes) -> Self {
        Self {
            read: Some(data),
            ..self
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(read) = self.read.take().filter(|read| !read.is_empty()) {
            return Poll::Ready(Some(Ok(Frame::data(read))));
        }
        if let Some(rest) = &mut self.rest {
            return Pin::new(rest).poll_frame(cx);
        }
        Poll::Ready(
            self.trailers
                .take()
                .map(|trailers| Ok(Frame::trailers(trailers))),
        )
    }

    fn is_end_stream(&self) -> bool {
        self.read.as_ref().is_none_or(Bytes::is_empty)
            && self.rest.as_ref().is_none_or(Body::is_end_stream)
            && self.trailers.is_none()
    }
}

/// The body of a reply to the caller.
///
/// If the runtime resets the stream, hyper resets the caller's stream with the same code. If the connection to the
/// runtime breaks, the body ends with the trailers of a gRPC UNAVAILABLE.
#[derive(Debug)]
pub(crate) struct ReplyBody {
    from_runtime: Option<Incoming>,
    /// Data of the proxy's own.
    own: Option<Bytes>,
    /// Gets the outcome of the call.
    call: Option<CallGuard>,
    /// Counts the call as unanswered until the body is dropped.
    _token: Option<TaskTrackerToken>,
}

impl ReplyBody {
    /// A body from the runtime.
    pub(crate) const fn from_runtime(body: Incoming) -> Self {
        Self {
            from_runtime: Some(body),
            own: None,
            call: None,
            _token: None,
        }
    }

    /// No body.
    pub(crate) const fn empty() -> Self {
        Self {
            from_runtime: None,
            own: None,
            call: None,
            _token: None,
        }
    }

    /// A body that the proxy itself has made.
    pub(crate) fn own(data: Bytes) -> Self {
        Self {
            own: Some(data),
            ..Self::empty()
        }
    }

    /// Counts the call, by the outcome of this body.
    pub(crate) fn with_call(self, call: CallGuard) -> Self {
        Self {
            call: Some(call),
            ..self
        }
    }

    fn set_outcome(&mut self, outcome: CallOutcome) {
        if let Some(call) = &mut self.call {
            call.set(outcome);
        }
    }

    /// Drops the token with the body.
    pub(crate) fn with_token(self, token: Option<TaskTrackerToken>) -> Self {
        Self {
            _token: token,
            ..self
        }
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = &mut self.from_runtime else {
            return Poll::Ready(self.own.take().map(|own| Ok(Frame::data(own))));
        };
        let polled = Pin::new(body).poll_frame(cx);
        match polled {
            Poll::Ready(Some(Err(error))) if !is_reset(&error) => {
                self.from_runtime = None;
                self.set_outcome(CallOutcome::Unavailable);
                let message = format!("lost the container runtime during the call: {error}");
                Poll::Ready(Some(Ok(Frame::trailers(grpc::unavailable_trailers(
                    &message,
                )))))
            }
            other => {
                let outcome = match &other {
                    Poll::Ready(Some(Ok(frame))) => frame.trailers_ref().and_then(CallOutcome::of),
                    Poll::Ready(Some(Err(_))) => Some(CallOutcome::Reset),
                    Poll::Ready(None) | Poll::Pending => None,
                };
                if let Some(outcome) = outcome {
                    self.set_outcome(outcome);
                }
                other
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.own.is_none() && self.from_runtime.as_ref().is_none_or(Body::is_end_stream)
    }
}

/// Whether the error is a reset of one stream (RST_STREAM), and not of its connection.
pub(crate) fn is_reset(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return error.is_reset();
        }
        source = error.source();
    }
    false
}
