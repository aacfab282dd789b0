//! A fake container runtime: serves the read calls of CRI v1 from state that a test sets, over real gRPC on a real
//! unix socket. It runs no containers.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_cri::v1;
use prost::Message;
use tokio::{net::UnixListener, task::JoinSet};
use tokio_util::task::AbortOnDropHandle;

const NOT_FOUND: u32 = 5;
const UNIMPLEMENTED: u32 = 12;

#[derive(Default)]
pub(super) struct FakeRuntimeState {
    /// `runtime_api_version`; `None`: there is no RuntimeService at all.
    pub(super) version: Option<String>,
    pub(super) sandboxes: Vec<v1::PodSandbox>,
    pub(super) containers: Vec<v1::Container>,
    pub(super) sandbox_status: HashMap<String, v1::PodSandboxStatusResponse>,
    pub(super) container_status: HashMap<String, v1::ContainerStatusResponse>,
    /// How often each call was made.
    pub(super) calls: BTreeMap<String, u32>,
    /// How long each answer takes.
    pub(super) delay: Duration,
}

pub(super) struct FakeRuntime {
    _dir: tempfile::TempDir,
    path: PathBuf,
    state: Arc<Mutex<FakeRuntimeState>>,
    server: Option<AbortOnDropHandle<()>>,
}

impl FakeRuntime {
    pub(super) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cri.sock");
        let state = FakeRuntimeState {
            version: Some("v1".into()),
            ..FakeRuntimeState::default()
        };
        let mut it = Self {
            _dir: dir,
            path,
            state: Arc::new(Mutex::new(state)),
            server: None,
        };
        it.restart();
        it
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn state(&self) -> MutexGuard<'_, FakeRuntimeState> {
        self.state.lock().unwrap()
    }

    pub(super) fn calls(&self, name: &str) -> u32 {
        self.state().calls.get(name).copied().unwrap_or(0)
    }

    /// Ends the listener and every connection, and removes the socket.
    pub(super) fn stop(&mut self) {
        self.server = None;
        std::fs::remove_file(&self.path).unwrap();
    }

    pub(super) fn restart(&mut self) {
        let listener = UnixListener::bind(&self.path).unwrap();
        let state = Arc::clone(&self.state);
        self.server = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            // Connections end with this task.
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let state = Arc::clone(&state);
                connections.spawn(async move {
                    let service = service_fn(move |request| answer(Arc::clone(&state), request));
                    let _ = http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        })));
    }
}

async fn answer(
    state: Arc<Mutex<FakeRuntimeState>>,
    request: Request<Incoming>,
) -> Result<Response<impl hyper::body::Body<Data = Bytes, Error = Infallible>>, Infallible> {
    let path = request.uri().path().to_owned();
    let body = request
        .into_body()
        .collect()
        .await
        .map(|b| b.to_bytes())
        .unwrap_or_default();
    // Five bytes of gRPC framing come before the message.
    let message = body.slice(5.min(body.len())..);
    let delay = state.lock().unwrap().delay;
    tokio::time::sleep(delay).await;
    let reply = reply(&mut state.lock().unwrap(), &path, message);

    let mut trailers = HeaderMap::new();
    let (status, payload) = match reply {
        Ok(payload) => (0, payload),
        Err(status) => (status, Vec::new()),
    };
    trailers.insert("grpc-status", HeaderValue::from(status));
    let mut framed = BytesMut::new();
    if status == 0 {
        framed.put_u8(0);
        framed.put_u32(payload.len().try_into().unwrap());
        framed.extend_from_slice(&payload);
    }
    let body = Full::new(framed.freeze()).with_trailers(async move { Some(Ok(trailers)) });
    Ok(Response::builder()
        .header("content-type", "application/grpc")
        .body(body)
        .unwrap())
}

fn reply(state: &mut FakeRuntimeState, path: &str, message: Bytes) -> Result<Vec<u8>, u32> {
    let version = state.version.clone().ok_or(UNIMPLEMENTED)?;
    let call = path
        .strip_prefix("/runtime.v1.RuntimeService/")
        .ok_or(UNIMPLEMENTED)?;
    *state.calls.entry(call.into()).or_default() += 1;
    match call {
        "Version" => Ok(v1::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "fake".into(),
            runtime_version: "0.1".into(),
            runtime_api_version: version,
        }
        .encode_to_vec()),
        "ListPodSandbox" => Ok(v1::ListPodSandboxResponse {
            items: state.sandboxes.clone(),
        }
        .encode_to_vec()),
        "ListContainers" => Ok(v1::ListContainersResponse {
            containers: state.containers.clone(),
        }
        .encode_to_vec()),
        "PodSandboxStatus" => {
            let id = v1::PodSandboxStatusRequest::decode(message)
                .unwrap()
                .pod_sandbox_id;
            state
                .sandbox_status
                .get(&id)
                .map(Message::encode_to_vec)
                .ok_or(NOT_FOUND)
        }
        "ContainerStatus" => {
            let id = v1::ContainerStatusRequest::decode(message)
                .unwrap()
                .container_id;
            state
                .container_status
                .get(&id)
                .map(Message::encode_to_vec)
                .ok_or(NOT_FOUND)
        }
        _ => Err(UNIMPLEMENTED),
    }
}
