//! The bodies that pass through the proxy.
//!
//! Both hide the size hints of what they wrap: hyper would make a `content-length` of them, and
//! headers are to arrive as they were sent.

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

use super::grpc;

/// A request body on its way to the runtime.
#[derive(Debug)]
pub(super) struct RequestBody {
    /// What was read before it was forwarded; comes first.
    read: Option<Bytes>,
    /// What has still to be read.
    rest: Option<Incoming>,
    /// What was read after all data.
    trailers: Option<HeaderMap>,
}

impl RequestBody {
    /// A body nobody looks into.
    pub(super) const fn streaming(body: Incoming) -> Self {
        Self {
            read: None,
            rest: Some(body),
            trailers: None,
        }
    }

    /// Reads a body up to `limit` bytes. One that is longer keeps its rest unread.
    pub(super) async fn read(mut body: Incoming, limit: usize) -> Result<Self, hyper::Error> {
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

    /// All data, if all of it has been read.
    pub(super) fn whole(&self) -> Option<&Bytes> {
        self.read.as_ref().filter(|_| self.rest.is_none())
    }

    /// The same body with other data.
    pub(super) fn with_data(self, data: Bytes) -> Self {
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

/// A reply body on its way to the caller.
///
/// A stream that the runtime resets is reset for the caller with the same code. One that ends because
/// the connection to the runtime broke ends with the trailers that gRPC would have made of it.
#[derive(Debug)]
pub(super) struct ReplyBody {
    from_runtime: Option<Incoming>,
    /// Says that the call has not ended.
    _token: Option<TaskTrackerToken>,
}

impl ReplyBody {
    /// A body from the runtime.
    pub(super) const fn from_runtime(body: Incoming) -> Self {
        Self {
            from_runtime: Some(body),
            _token: None,
        }
    }

    /// No body.
    pub(super) const fn empty() -> Self {
        Self {
            from_runtime: None,
            _token: None,
        }
    }

    /// Keeps a token as long as the body lives.
    pub(super) fn with_token(self, token: Option<TaskTrackerToken>) -> Self {
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
            return Poll::Ready(None);
        };
        match Pin::new(body).poll_frame(cx) {
            Poll::Ready(Some(Err(error))) if !is_reset(&error) => {
                self.from_runtime = None;
                let message = format!("lost the container runtime during the call: {error}");
                Poll::Ready(Some(Ok(Frame::trailers(grpc::unavailable_trailers(
                    &message,
                )))))
            }
            other => other,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.from_runtime.as_ref().is_none_or(Body::is_end_stream)
    }
}

/// Whether the error is about one stream (RST_STREAM), as opposed to its connection.
pub(super) fn is_reset(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return error.is_reset();
        }
        source = error.source();
    }
    false
}
