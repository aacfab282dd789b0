//! The environment of the proxy in these tests: an HTTP/2 server as the runtime, a scripted agent, and clients.

use std::{
    convert::Infallible,
    future::Future,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use ebb_core::release::ReleaseReason;
use ebb_cri_proxy::{ProxyOptions, serve};
use ebb_protocol::{
    hold::{BypassReport, HoldMessage, HoldRequest},
    service::listen,
};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{body::Incoming, client::conn::http2 as client, server::conn::http2 as server};
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::transport::{Channel, Endpoint};

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type BoxedBody = BoxBody<Bytes, BoxError>;
pub(crate) type BoxedReply = Response<BoxedBody>;
type RuntimeHandler =
    dyn Fn(Request<Incoming>) -> Pin<Box<dyn Future<Output = BoxedReply> + Send>> + Send + Sync;

/// Waits for a future; panics after ten seconds.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), what)
        .await
        .expect("done within ten seconds")
}

/// A gRPC frame.
pub(crate) fn frame(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).unwrap());
    frame.put_slice(message);
    frame.freeze()
}

pub(crate) fn grpc_frame(message: &impl prost::Message) -> Bytes {
    frame(&message.encode_to_vec())
}

pub(crate) fn trailers(status: &'static str) -> HeaderMap {
    HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static(status),
    )])
}

/// A body whose frames come from a channel.
pub(crate) fn channel() -> (
    mpsc::UnboundedSender<Result<Frame<Bytes>, BoxError>>,
    BoxedBody,
) {
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let stream = futures_util::stream::poll_fn(move |cx| receiver.poll_recv(cx));
    (sender, BodyExt::boxed(StreamBody::new(stream)))
}

pub(crate) fn whole(data: Bytes, trailers: HeaderMap) -> BoxedBody {
    Full::new(data)
        .map_err(|e: Infallible| match e {})
        .with_trailers(async { Some(Ok(trailers)) })
        .boxed()
}

pub(crate) fn ok(data: Bytes) -> BoxedReply {
    grpc_reply(whole(data, trailers("0")))
}

pub(crate) fn grpc_reply(body: BoxedBody) -> BoxedReply {
    Response::builder()
        .header("content-type", "application/grpc")
        .body(body)
        .unwrap()
}

/// UNIMPLEMENTED as gRPC servers send it: trailers-only.
pub(crate) fn unimplemented() -> BoxedReply {
    let mut reply = grpc_reply(BodyExt::boxed(
        http_body_util::Empty::new().map_err(|e: Infallible| match e {}),
    ));
    reply
        .headers_mut()
        .insert("grpc-status", HeaderValue::from_static("12"));
    reply
        .headers_mut()
        .insert("grpc-message", HeaderValue::from_static("unknown method"));
    reply
}

/// A whole call or reply as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct RecordedCall {
    pub(crate) uri: http::Uri,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<HeaderMap>,
}

impl RecordedCall {
    pub(crate) async fn request(request: Request<Incoming>) -> Self {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap();
        let trailers = body.trailers().cloned();
        Self {
            uri: head.uri,
            headers: head.headers,
            body: body.to_bytes(),
            trailers,
        }
    }

    pub(crate) async fn reply(reply: Response<Incoming>) -> Self {
        let (head, body) = reply.into_parts();
        assert_eq!(head.status, 200);
        let body = body.collect().await.unwrap();
        let trailers = body.trailers().cloned();
        Self {
            uri: http::Uri::default(),
            headers: head.headers,
            body: body.to_bytes(),
            trailers,
        }
    }

    pub(crate) fn decode<M: prost::Message + Default>(&self) -> M {
        M::decode(&self.body[5..]).unwrap()
    }
}

/// An HTTP/2 server as the runtime. Dropping it closes its connections and removes its socket.
pub(crate) struct Runtime {
    path: PathBuf,
    _server: AbortOnDropHandle<()>,
}

impl Runtime {
    pub(crate) fn start<F>(
        path: &Path,
        handler: impl Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = BoxedReply> + Send + 'static,
    {
        let handler: Arc<RuntimeHandler> = Arc::new(move |request| Box::pin(handler(request)));
        let listener = UnixListener::bind(path).unwrap();
        let server = async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let handler = Arc::clone(&handler);
                let service = hyper::service::service_fn(move |request| {
                    let reply = handler(request);
                    async move { Ok::<_, Infallible>(reply.await) }
                });
                connections.spawn(
                    server::Builder::new(TokioExecutor::new())
                        .auto_date_header(false)
                        .max_header_list_size(1 << 20)
                        .max_concurrent_streams(10_000)
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        };
        Self {
            path: path.to_owned(),
            _server: AbortOnDropHandle::new(tokio::spawn(server)),
        }
    }

    /// A runtime that sends each call to the test, and answers Version, StopContainer and StopPodSandbox with
    /// success.
    pub(crate) fn recording(path: &Path) -> (Self, mpsc::UnboundedReceiver<RecordedCall>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let runtime = Self::start(path, move |request| {
            let sender = sender.clone();
            async move {
                let seen = RecordedCall::request(request).await;
                let reply = match seen.uri.path().rsplit('/').next() {
                    Some("Version") => ok(grpc_frame(&k8s_cri::v1::VersionResponse {
                        runtime_name: "stand-in".into(),
                        ..Default::default()
                    })),
                    Some("StopContainer" | "StopPodSandbox") => ok(frame(&[])),
                    _ => unimplemented(),
                };
                let _ = sender.send(seen);
                reply
            }
        });
        (runtime, receiver)
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The agent's message when the pod has drained.
pub(crate) const RELEASE: HoldMessage = HoldMessage::Release {
    reason: ReleaseReason::Drained,
    held_ms: 1,
};

/// A hold request to the scripted agent, with its connection.
pub(crate) struct HoldConnection {
    pub(crate) request: HoldRequest,
    stream: UnixStream,
}

impl HoldConnection {
    /// Sends a message as a line.
    pub(crate) async fn send(&mut self, message: &HoldMessage) {
        self.send_raw(&format!("{}\n", serde_json::to_string(message).unwrap()))
            .await;
    }

    pub(crate) async fn send_raw(&mut self, text: &str) {
        // The proxy may be gone already.
        let _ = self
            .stream
            .write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes())
            .await;
    }

    /// Waits until the proxy has closed the connection.
    pub(crate) async fn closed(&mut self) {
        let mut byte = [0];
        assert!(
            !matches!(self.stream.read(&mut byte).await, Ok(1..)),
            "the proxy sent more data"
        );
    }
}

/// Starts an agent that passes each hold request to the test, which answers it.
pub(crate) fn agent(
    path: &Path,
) -> (
    AbortOnDropHandle<()>,
    mpsc::UnboundedReceiver<HoldConnection>,
) {
    let (agent, requests, _) = agent_with_reports(path);
    (agent, requests)
}

/// As [`agent`], with the reports of calls that were forwarded without a hold request.
pub(crate) fn agent_with_reports(
    path: &Path,
) -> (
    AbortOnDropHandle<()>,
    mpsc::UnboundedReceiver<HoldConnection>,
    mpsc::UnboundedReceiver<BypassReport>,
) {
    let listener = UnixListener::bind(path).unwrap();
    let (sender, receiver) = mpsc::unbounded_channel();
    let (reports, reported) = mpsc::unbounded_channel();
    let server = async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (sender, reports) = (sender.clone(), reports.clone());
            tokio::spawn(async move {
                match read_request(&mut stream).await {
                    AgentRequest::Report(report) => {
                        let _ = reports.send(report);
                        let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await;
                    }
                    AgentRequest::Hold(request) => {
                        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
                        let _ = stream.write_all(head.as_bytes()).await;
                        let _ = sender.send(HoldConnection { request, stream });
                    }
                }
            });
        }
    };
    let server = AbortOnDropHandle::new(tokio::spawn(server));
    (server, receiver, reported)
}

/// A request of the proxy to the agent.
enum AgentRequest {
    Hold(HoldRequest),
    Report(BypassReport),
}

async fn read_request(stream: &mut UnixStream) -> AgentRequest {
    let mut read = Vec::new();
    loop {
        stream.read_buf(&mut read).await.unwrap();
        let text = std::str::from_utf8(&read).unwrap();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let is_report = head.starts_with("POST /v1/passed HTTP/1.1\r\n");
            assert!(
                is_report || head.starts_with("POST /v1/holds HTTP/1.1\r\n"),
                "{head}"
            );
            let head = head.to_ascii_lowercase();
            let (_, length) = head.split_once("content-length: ").unwrap();
            let length: usize = length.lines().next().unwrap().parse().unwrap();
            if body.len() == length {
                return match is_report {
                    true => AgentRequest::Report(serde_json::from_str(body).unwrap()),
                    false => AgentRequest::Hold(serde_json::from_str(body).unwrap()),
                };
            }
        }
    }
}

/// A proxy in this process, and its sockets.
pub(crate) struct TestProxy {
    directory: TempDir,
    pub(crate) shutdown: CancellationToken,
    pub(crate) serving: JoinHandle<()>,
}

impl TestProxy {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// Starts a proxy with other options.
    pub(crate) async fn start_with(change: impl FnOnce(&mut ProxyOptions)) -> Self {
        let directory = TempDir::new().unwrap();
        let shutdown = CancellationToken::new();
        let path = directory.path();
        let listening = listen::bind(&path.join("proxy.sock")).await.unwrap();
        let mut options = ProxyOptions::new(path.join("runtime.sock"), path.join("agent.sock"));
        change(&mut options);
        let serving = tokio::spawn({
            let shutdown = shutdown.clone();
            async move {
                serve(listening.listener, options, shutdown).await;
                drop(listening.file);
            }
        });
        Self {
            directory,
            shutdown,
            serving,
        }
    }

    pub(crate) fn runtime(&self) -> PathBuf {
        self.directory.path().join("runtime.sock")
    }

    pub(crate) fn agent(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("proxy.sock")
    }

    /// A client that sends and receives raw requests.
    pub(crate) async fn raw(&self) -> RawClient {
        RawClient::connect(&self.socket()).await
    }

    /// A CRI client.
    pub(crate) async fn cri(&self) -> RuntimeServiceClient<Channel> {
        let socket = self.socket();
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await
            .unwrap();
        RuntimeServiceClient::new(channel)
    }
}

/// `ebb-cri-proxy`, between `runtime.sock` and `agent.sock` in its directory.
pub(crate) struct ProxyProgram {
    directory: TempDir,
    child: std::process::Child,
}

impl ProxyProgram {
    pub(crate) async fn start() -> Self {
        Self::start_after(":").await
    }

    /// Starts it from a shell that runs `script` first, such as a ulimit.
    pub(crate) async fn start_after(script: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let at = |name: &str| directory.path().join(name);
        let log = std::fs::File::create(at("log")).unwrap();
        let child = std::process::Command::new("sh")
            .arg("-c")
            .arg(format!(r#"{script}; exec "$0" "$@""#))
            .arg(env!("CARGO_BIN_EXE_ebb-cri-proxy"))
            .stderr(log)
            .arg("--listen")
            .arg(at("proxy.sock"))
            .arg("--runtime")
            .arg(at("runtime.sock"))
            .arg("--agent")
            .arg(at("agent.sock"))
            .env("EBB_LOG", "warn")
            .stdin(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let socket = at("proxy.sock");
        soon(async {
            while UnixStream::connect(&socket).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        Self { directory, child }
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) async fn client(&self) -> RawClient {
        RawClient::connect(&self.at("proxy.sock")).await
    }

    /// Its log.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.at("log")).unwrap()
    }

    /// A field of `/proc/PID/status`, in bytes.
    pub(crate) fn memory(&self, field: &str) -> u64 {
        let status = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find(|l| l.starts_with(field)).unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib << 10
    }
}

impl Drop for ProxyProgram {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Raises this process's limit of open files, because the scripted agent needs one per hold.
pub(crate) fn many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = maximum;
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
}

/// A bare HTTP/2 client. Dropping the last clone closes its connection, even during calls.
#[derive(Clone)]
pub(crate) struct RawClient {
    pub(crate) sender: client::SendRequest<BoxedBody>,
    pub(crate) connection: Arc<AbortOnDropHandle<()>>,
}

impl RawClient {
    pub(crate) async fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).await.unwrap();
        let (sender, connection) = client::Builder::new(TokioExecutor::new())
            .initial_max_send_streams(10_000)
            // Unread replies must not block other replies.
            .initial_connection_window_size((1 << 31) - 1)
            .max_header_list_size(1 << 20)
            .handshake(TokioIo::new(stream))
            .await
            .unwrap();
        let connection = tokio::spawn(async move {
            let _ = connection.await;
        });
        Self {
            sender,
            connection: Arc::new(AbortOnDropHandle::new(connection)),
        }
    }

    pub(crate) async fn send(
        &self,
        request: Request<BoxedBody>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        self.sender.clone().send_request(request).await
    }

    /// Makes a unary call with these headers.
    pub(crate) async fn unary(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> RecordedCall {
        let reply = self
            .send(request(path, headers, whole(body, HeaderMap::new())))
            .await
            .unwrap();
        RecordedCall::reply(reply).await
    }
}

pub(crate) fn request(path: &str, headers: &[(&str, &str)], body: BoxedBody) -> Request<BoxedBody> {
    let mut request = Request::post(format!("http://localhost{path}"))
        .header("te", "trailers")
        .header("content-type", "application/grpc");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(body).unwrap()
}

/// Sends a message when it is dropped.
pub(crate) struct DropNotifier(mpsc::UnboundedSender<()>);

impl DropNotifier {
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<()>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }
}

impl Drop for DropNotifier {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}
