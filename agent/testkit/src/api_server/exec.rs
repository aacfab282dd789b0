//! `pods/exec`, as an API server and a kubelet serve it: the runtime runs the command and serves its streams, and the
//! client's upgraded connection is passed on to the runtime (`Exec` of the CRI; `streamingRuntime.GetExec`).

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Uri, header};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use k8s_cri::v1::ExecRequest;
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;

use crate::kubelet::{Kubelet, StartedPod};

/// A pod whose containers run commands.
#[derive(Debug, Clone)]
pub(super) struct ExecTarget {
    pub(super) kubelet: Kubelet,
    pub(super) pod: StartedPod,
}

impl ExecTarget {
    /// Starts the command of this request and returns the head of the reply, after which the streams follow.
    pub(super) async fn start(&self, request: Request<Incoming>) -> Result<Response<()>> {
        let query: Vec<(String, String)> =
            serde_urlencoded::from_str(request.uri().query().unwrap_or_default())?;
        let is_set = |key: &str| query.iter().any(|(k, v)| k == key && v == "true");
        let values = |key: &'static str| query.iter().filter(move |(k, _)| k == key);
        let container = values("container").next().map(|(_, name)| name.as_str());
        let mut containers = self.pod.containers.iter();
        let container = containers.find(|c| container.is_none_or(|name| c.name == name));
        let mut runtime = self.kubelet.runtime();
        let started = runtime.exec(ExecRequest {
            container_id: container.context("no such container")?.id.clone(),
            cmd: values("command").map(|(_, word)| word.clone()).collect(),
            tty: is_set("tty"),
            stdin: is_set("stdin"),
            stdout: is_set("stdout"),
            stderr: is_set("stderr"),
        });
        let url: Uri = started.await?.into_inner().url.parse()?;
        let (reply, streams) = upgrade(&url, request.headers()).await?;
        let client = hyper::upgrade::on(request);
        tokio::spawn(async move {
            if let (Ok(client), Ok(streams)) = (client.await, streams.await) {
                let _ =
                    copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(streams)).await;
            }
        });
        Ok(reply)
    }
}

/// Asks the runtime's streaming server to upgrade, with the headers of the client.
async fn upgrade(
    url: &Uri,
    headers: &HeaderMap,
) -> Result<(Response<()>, hyper::upgrade::OnUpgrade)> {
    let authority = url.authority().context("no address")?.as_str();
    let stream = TcpStream::connect(authority).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    let path = url.path_and_query().context("no path")?.as_str();
    let mut request = Request::builder().uri(path).body(Empty::<Bytes>::new())?;
    *request.headers_mut() = headers.clone();
    request
        .headers_mut()
        .insert(header::HOST, authority.parse()?);
    let reply = sender.send_request(request).await?;
    ensure!(
        reply.status() == StatusCode::SWITCHING_PROTOCOLS,
        "the runtime refused the streams: {}",
        reply.status()
    );
    let mut head = Response::new(());
    *head.status_mut() = reply.status();
    *head.headers_mut() = reply.headers().clone();
    Ok((head, hyper::upgrade::on(reply)))
}
