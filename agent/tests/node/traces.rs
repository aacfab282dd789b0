//! Spans of drains, as an OpenTelemetry collector gets them. The collector's end is a stand-in that speaks OTLP.

use anyhow::{Context as _, Result, ensure};
use k8s_cri::v1::StopContainerRequest;
use libtest_mimic::Trial;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

use crate::{
    peer::Peer,
    scene::{SECOND, SOON, Scene, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial(
        "a_drain_is_a_span_of_the_trace_of_the_kubelets_call",
        traced,
    )]
}

/// A collector that passes on what it gets.
struct Collector(mpsc::UnboundedSender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let _ = self.0.send(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn traced(scene: Scene) -> Result<()> {
    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const CALL: &str = "b7ad6b7169203331";
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    let (sender, mut exports) = mpsc::unbounded_channel();
    let collector = Server::builder()
        .add_service(TraceServiceServer::new(Collector(sender)))
        .serve_with_incoming(TcpIncoming::from(listener));
    let _collector = AbortOnDropHandle::new(tokio::spawn(collector));

    let flags = ["--hold-unknown", "--quiet", "300ms", "--otlp-endpoint"];
    let agent = scene.agent(&[&flags[..], &[&endpoint]].concat()).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("traced").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    let mut call = Request::new(StopContainerRequest {
        container_id: pod.containers[0].id.clone(),
        timeout: 30,
    });
    call.set_timeout(60 * SECOND);
    let parent = format!("00-{TRACE}-{CALL}-01");
    call.metadata_mut().insert("traceparent", parent.parse()?);
    let mut runtime = scene.kubelet_at(&proxy)?.runtime();
    let stopping = tokio::spawn(async move { runtime.stop_container(call).await });
    agent.until_draining("traced").await?;
    tokio::time::sleep(SECOND).await;
    drop(peer);
    stopping.await??;
    let report = agent.drain("traced").await?;
    ensure!(report.traceparent == Some(parent), "{report:?}");
    // An agent that stops sends what is left.
    agent.stop().await?;

    let export = timeout(SOON, exports.recv()).await?.context("no export")?;
    let spans = &export.resource_spans[0];
    let resource = spans.resource.as_ref().context("no resource")?;
    ensure!(text(&resource.attributes, "service.name") == Some("ebb"));
    let span = &spans.scope_spans[0].spans[0];
    ensure!(span.name == "drain", "{span:?}");
    ensure!(hex(&span.trace_id) == TRACE, "{span:?}");
    ensure!(hex(&span.parent_span_id) == CALL, "{span:?}");
    ensure!(
        text(&span.attributes, "k8s.pod.name") == Some("traced"),
        "{span:?}"
    );
    ensure!(
        text(&span.attributes, "ebb.reason") == Some("drained"),
        "{span:?}"
    );
    let events: Vec<_> = span.events.iter().map(|e| e.name.as_str()).collect();
    ensure!(events == ["settle", "drain", "released"], "{span:?}");
    let lasted = span.end_time_unix_nano - span.start_time_unix_nano;
    ensure!(lasted == report.held_ms * 1_000_000, "{span:?}");
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn text<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a str> {
    let found = attributes.iter().find(|a| a.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text),
        _ => None,
    }
}
