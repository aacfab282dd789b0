//! A gRPC server like one of generated code. Its argument is the interval of its pings, in ms.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Result;
use futures_util::{Stream, StreamExt as _, stream};
use http::{Request, Response};
use tokio::time::sleep;
use tonic::{
    Status,
    body::Body,
    server::{Grpc, NamedService, ServerStreamingService, UnaryService},
    transport::Server,
};
use tonic_prost::ProstCodec;
use tower::Service;

/// Request and answer, a `google.protobuf.StringValue`. The request is the delay of the answer, in ms.
pub(crate) type Text = String;
type Streamed = Pin<Box<dyn Stream<Item = Result<Text, Status>> + Send>>;
type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

pub(super) async fn serve() -> Result<()> {
    let ping = super::argument(1);
    Server::builder()
        .http2_keepalive_interval((ping > 0).then(|| Duration::from_millis(ping)))
        .add_service(Calls)
        .serve(([0, 0, 0, 0], 8080).into())
        .await?;
    Ok(())
}

/// `/servers.Calls/Wait` answers once, `/servers.Calls/Watch` three times.
#[derive(Clone)]
struct Calls;

impl NamedService for Calls {
    const NAME: &'static str = "servers.Calls";
}

impl Service<Request<Body>> for Calls {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(async move {
            let mut grpc = Grpc::new(ProstCodec::<Text, Text>::default());
            Ok(if request.uri().path().ends_with("Watch") {
                grpc.server_streaming(Watch, request).await
            } else {
                grpc.unary(Wait, request).await
            })
        })
    }
}

struct Wait;

impl UnaryService<Text> for Wait {
    type Response = Text;
    type Future = Answer<Result<tonic::Response<Text>, Status>>;

    fn call(&mut self, request: tonic::Request<Text>) -> Self::Future {
        Box::pin(async move {
            sleep(pause(request.get_ref())).await;
            Ok(tonic::Response::new("done".into()))
        })
    }
}

struct Watch;

impl ServerStreamingService<Text> for Watch {
    type Response = Text;
    type ResponseStream = Streamed;
    type Future = Ready<Result<tonic::Response<Streamed>, Status>>;

    fn call(&mut self, request: tonic::Request<Text>) -> Self::Future {
        let pause = pause(request.get_ref());
        let events = stream::iter(0..3).then(move |n| async move {
            sleep(if n == 0 { Duration::ZERO } else { pause }).await;
            Ok("event".to_owned())
        });
        ready(Ok(tonic::Response::new(Box::pin(events))))
    }
}

fn pause(text: &Text) -> Duration {
    Duration::from_millis(text.parse().unwrap_or(0))
}
