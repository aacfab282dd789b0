//! Word from containerd that something has changed.

use http::uri::PathAndQuery;
use tokio::time::timeout;
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;

use super::{CALL_TIMEOUT, Cri, CriError};

/// `SubscribeRequest` in containerd's `api/services/events/v1/events.proto`.
#[derive(Clone, PartialEq, prost::Message)]
struct SubscribeRequest {
    /// An event that fits any of them is sent.
    #[prost(string, repeated, tag = "1")]
    filters: Vec<String>,
}

impl Cri {
    /// One empty message for each sandbox or container that is made, started or removed from now on.
    ///
    /// By containerd's own service, on the socket that also has its CRI. The CRI's `GetContainerEvents` will not
    /// do: containerd 1.7 gives each event to one caller only, and the kubelet may be another
    /// (`GetContainerEvents` in its `pkg/cri/server/container_events.go`). Exits are left out, because those of
    /// exec probes are among them; the end of a container's own task is a deletion, too.
    ///
    /// # Errors
    /// [`CriError`]; `Unimplemented` if the runtime is not containerd.
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
