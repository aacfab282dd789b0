//! containerd's events about sandboxes and containers.

use http::uri::PathAndQuery;
use tokio::time::timeout;
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;

use super::{CALL_TIMEOUT, Cri, CriError};

/// `SubscribeRequest` in containerd's `api/services/events/v1/events.proto`.
#[derive(Clone, PartialEq, prost::Message)]
struct SubscribeRequest {
    /// containerd sends an event if it matches any of them.
    #[prost(string, repeated, tag = "1")]
    filters: Vec<String>,
}

impl Cri {
    /// Subscribes to one empty message for each sandbox or container that is created, started or removed.
    ///
    /// This uses containerd's own event service, on the same socket as its CRI, and not the CRI's
    /// `GetContainerEvents`: containerd 1.7 sends each of those events to one caller only, and the kubelet may be
    /// another (`GetContainerEvents` in its `pkg/cri/server/container_events.go`). Exit events are left out, because
    /// exec probes send them as well; a container's task is also deleted when it ends.
    ///
    /// # Errors
    /// [`CriError`], with status `Unimplemented` if the runtime is not containerd.
    pub async fn events(&self) -> Result<Streaming<()>, CriError> {
        const CALL: &str = "Subscribe";
        let topics = [
            "containers/create",
            "containers/delete",
            "tasks/start",
            "tasks/delete",
        ];
        let request = SubscribeRequest {
            filters: topics
                .map(|topic| format!(r#"namespace=="k8s.io",topic=="/{topic}""#))
                .to_vec(),
        };
        let subscribe = async {
            let mut client = tonic::client::Grpc::new(self.channel.clone());
            let gone = |e: tonic::transport::Error| Status::unavailable(e.to_string());
            client.ready().await.map_err(gone)?;
            let path = PathAndQuery::from_static("/containerd.services.events.v1.Events/Subscribe");
            let codec = ProstCodec::<SubscribeRequest, ()>::default();
            client
                .server_streaming(tonic::Request::new(request), path, codec)
                .await
        };
        match timeout(CALL_TIMEOUT, subscribe).await {
            Err(_) => Err(self.timed_out(CALL, CALL_TIMEOUT)),
            Ok(Ok(events)) => Ok(events.into_inner()),
            Ok(Err(status)) => Err(self.failed(CALL, status)),
        }
    }
}
