//! A client of the container runtime's CRI v1 service, for the few reads ebb needs.
//!
//! The channel is lazy: when the runtime restarts, the next call dials its socket again.

mod error;
mod events;
mod stop_signal;

use std::{future::Future, io, path::Path, sync::Arc, time::Duration};

use ebb_core::ids::{ContainerId, SandboxId};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::{
    self, ContainerStatusRequest, ContainerStatusResponse, ImageSpec, ImageStatusRequest,
    ListContainersRequest, ListPodSandboxRequest, PodSandboxFilter, PodSandboxState,
    PodSandboxStateValue, PodSandboxStatusRequest, PodSandboxStatusResponse, VersionRequest,
    VersionResponse, image_service_client::ImageServiceClient,
    runtime_service_client::RuntimeServiceClient,
};
use tokio::{net::UnixStream, time::timeout};
use tonic::{
    Code, Response, Status,
    transport::{Channel, Endpoint},
};

pub use error::CriError;

use self::error::{DialError, broken_transport, dial_error, dial_failure};
use super::info::stop_signal;

/// The API version that ebb speaks, as a runtime reports it in VersionResponse.
const API_VERSION: &str = "v1";

/// The largest message of the CRI: `maxMsgSize` in kubelet's `pkg/kubelet/cri/remote`. A node's list of
/// containers with their annotations exceeds tonic's default of 4 MiB.
const MESSAGE_LIMIT: usize = 16 * 1024 * 1024;

/// How long one call may take. Lists and statuses are answered from the runtime's memory; a runtime
/// that needs longer is stuck.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection to a container runtime. Cheap to clone; clones share it.
#[derive(Clone, Debug)]
pub struct Cri {
    path: Arc<Path>,
    channel: Channel,
    client: RuntimeServiceClient<Channel>,
    runtime: Arc<str>,
}

impl Cri {
    /// Connects to the runtime's socket, and checks that it serves CRI v1.
    ///
    /// # Errors
    /// [`CriError`] if the socket is absent or forbidden, or does not serve CRI v1.
    pub async fn connect(path: &Path) -> Result<Self, CriError> {
        // Dial once without the channel, which would wrap the kernel's error.
        drop(
            UnixStream::connect(path)
                .await
                .map_err(|e| dial_error(path, e))?,
        );
        let channel = channel(path);
        let mut cri = Self {
            path: path.into(),
            client: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(MESSAGE_LIMIT),
            channel,
            runtime: "".into(),
        };
        let version = cri.version().await?;
        if version.runtime_api_version != API_VERSION {
            let version = match version.runtime_api_version.as_str() {
                "" => "of no version".into(),
                v => v.into(),
            };
            return Err(CriError::WrongVersion {
                path: path.into(),
                version,
            });
        }
        cri.runtime = format!("{} {}", version.runtime_name, version.runtime_version).into();
        Ok(cri)
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The runtime's name and version, as it gave them at [`Cri::connect`].
    pub fn runtime(&self) -> &str {
        &self.runtime
    }

    /// The sandboxes that are ready.
    ///
    /// # Errors
    /// [`CriError`].
    pub async fn ready_sandboxes(&self) -> Result<Vec<v1::PodSandbox>, CriError> {
        let state = PodSandboxStateValue {
            state: PodSandboxState::SandboxReady.into(),
        };
        let request = ListPodSandboxRequest {
            filter: Some(PodSandboxFilter {
                state: Some(state),
                ..Default::default()
            }),
        };
        let listed = self
            .call("ListPodSandbox", |mut c| {
                let request = request.clone();
                async move { c.list_pod_sandbox(request).await }
            })
            .await?;
        Ok(listed.items)
    }

    /// All containers, of any state.
    ///
    /// # Errors
    /// [`CriError`].
    pub async fn containers(&self) -> Result<Vec<v1::Container>, CriError> {
        let listed = self
            .call("ListContainers", |mut c| async move {
                c.list_containers(ListContainersRequest { filter: None })
                    .await
            })
            .await?;
        Ok(listed.containers)
    }

    /// The verbose status of a sandbox; `None` if there is no such sandbox (any more).
    ///
    /// # Errors
    /// [`CriError`].
    pub async fn sandbox_status(
        &self,
        id: &SandboxId,
    ) -> Result<Option<PodSandboxStatusResponse>, CriError> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: id.as_str().into(),
            verbose: true,
        };
        found(
            self.call("PodSandboxStatus", |mut c| {
                let request = request.clone();
                async move { c.pod_sandbox_status(request).await }
            })
            .await,
        )
    }

    /// The verbose status of a container; `None` if there is no such container (any more).
    ///
    /// # Errors
    /// [`CriError`].
    pub async fn container_status(
        &self,
        id: &ContainerId,
    ) -> Result<Option<ContainerStatusResponse>, CriError> {
        let request = ContainerStatusRequest {
            container_id: id.as_str().into(),
            verbose: true,
        };
        found(
            self.call("ContainerStatus", |mut c| {
                let request = request.clone();
                async move { c.container_status(request).await }
            })
            .await,
        )
    }

    /// The stop signal that an image names; `None` if it names none, there is no such image, or the answer can't be
    /// parsed.
    ///
    /// # Errors
    /// [`CriError`] if the call fails.
    pub async fn image_stop_signal(&self, image: &str) -> Result<Option<String>, CriError> {
        let request = ImageStatusRequest {
            image: Some(ImageSpec {
                image: image.into(),
                ..Default::default()
            }),
            verbose: true,
        };
        let mut client =
            ImageServiceClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        const CALL: &str = "ImageStatus";
        match timeout(CALL_TIMEOUT, client.image_status(request)).await {
            Err(_) => Err(self.timed_out(CALL, CALL_TIMEOUT)),
            Ok(Err(status)) => Err(self.failed(CALL, status)),
            Ok(Ok(answer)) => Ok(stop_signal(&answer.into_inner().info).ok().flatten()),
        }
    }

    async fn version(&self) -> Result<VersionResponse, CriError> {
        const CALL: &str = "Version";
        // Not retried: a server that closes a new connection on the first call is not a runtime.
        let mut client = self.client.clone();
        let request = VersionRequest {
            version: API_VERSION.into(),
        };
        let status = match timeout(CALL_TIMEOUT, client.version(request)).await {
            Err(_) => return Err(self.timed_out(CALL, CALL_TIMEOUT)),
            Ok(Ok(answer)) => return Ok(answer.into_inner()),
            Ok(Err(status)) => status,
        };
        match self.failed(CALL, status) {
            // containerd without its CRI plugin, and containerd before 1.6, give this answer, too.
            CriError::Failed { path, status, .. } if status.code() == Code::Unimplemented => {
                Err(CriError::NotCri {
                    path,
                    detail: "it has no runtime.v1.RuntimeService; \
                             containerd without its CRI plugin, or older than 1.6, looks like this"
                        .into(),
                })
            }
            CriError::Failed { path, status, .. } if broken_transport(&status) => {
                Err(CriError::NotCri {
                    path,
                    detail: "it does not speak gRPC".into(),
                })
            }
            other => Err(other),
        }
    }

    /// One read call, retried once if the connection broke: the channel notices a restart of the runtime only then.
    async fn call<T, F>(
        &self,
        call: &'static str,
        send: impl Fn(RuntimeServiceClient<Channel>) -> F,
    ) -> Result<T, CriError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut retried = false;
        loop {
            match timeout(CALL_TIMEOUT, send(self.client.clone())).await {
                Err(_) => return Err(self.timed_out(call, CALL_TIMEOUT)),
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) if !retried && broken_transport(&status) => retried = true,
                Ok(Err(status)) => return Err(self.failed(call, status)),
            }
        }
    }

    pub(super) fn timed_out(&self, call: &'static str, after: Duration) -> CriError {
        CriError::Timeout {
            path: self.path.to_path_buf(),
            call,
            after,
        }
    }

    fn failed(&self, call: &'static str, status: Status) -> CriError {
        match dial_failure(&status) {
            // `io::Error` is not `Clone`; its number or kind is enough.
            Some(e) => {
                let e = e
                    .raw_os_error()
                    .map_or_else(|| e.kind().into(), io::Error::from_raw_os_error);
                dial_error(&self.path, e)
            }
            None => CriError::Failed {
                path: self.path.to_path_buf(),
                call,
                status,
            },
        }
    }
}

fn channel(path: &Path) -> Channel {
    let path: Arc<Path> = path.into();
    let connector = tower::service_fn(move |_| {
        let path = Arc::clone(&path);
        async move {
            UnixStream::connect(&*path)
                .await
                .map(TokioIo::new)
                .map_err(DialError)
        }
    });
    // The address only sets `:authority`: "localhost", as the kubelet sends from 1.31 on.
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector)
}

fn found<T>(answer: Result<T, CriError>) -> Result<Option<T>, CriError> {
    match answer {
        Ok(t) => Ok(Some(t)),
        Err(CriError::Failed { status, .. }) if status.code() == Code::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::pods::testing::FakeRuntime;

    /// The whole chain on one line, as `main` prints it.
    fn line(e: CriError) -> String {
        ebb_core::format::one_line(&e)
    }

    #[tokio::test]
    async fn a_runtime_is_recognised_and_named() {
        let runtime = FakeRuntime::start();
        let cri = Cri::connect(runtime.path()).await.unwrap();
        assert_eq!(cri.runtime(), "fake 0.1");
        assert!(cri.ready_sandboxes().await.unwrap().is_empty());
        assert!(
            cri.sandbox_status(&SandboxId::new("gone"))
                .await
                .unwrap()
                .is_none()
        );
    }

    #[tokio::test]
    async fn an_absent_socket_is_unreachable() {
        let e = Cri::connect(Path::new("/nonexistent/cri.sock"))
            .await
            .unwrap_err();
        assert!(matches!(e, CriError::Unreachable { .. }));
        let line = line(e);
        assert!(
            line.contains("/nonexistent/cri.sock: No such file or directory"),
            "{line}"
        );
        assert!(
            line.ends_with("is containerd running? set --cri-socket to its socket"),
            "{line}"
        );
    }

    #[tokio::test]
    async fn an_http1_server_is_not_cri() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("http.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().take(2) {
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
            }
        });
        let e = Cri::connect(&path).await.unwrap_err();
        assert!(matches!(e, CriError::NotCri { .. }), "{e:?}");
        assert!(!line(e).contains('\n'));
    }

    #[tokio::test]
    async fn grpc_without_a_runtime_service_is_not_cri() {
        let runtime = FakeRuntime::start();
        runtime.state().version = None;
        let e = Cri::connect(runtime.path()).await.unwrap_err();
        assert!(matches!(e, CriError::NotCri { .. }), "{e:?}");
    }

    #[tokio::test]
    async fn an_older_api_version_is_refused_by_name() {
        let runtime = FakeRuntime::start();
        runtime.state().version = Some("v1alpha2".into());
        let e = Cri::connect(runtime.path()).await.unwrap_err();
        assert!(
            matches!(&e, CriError::WrongVersion { version, .. } if version == "v1alpha2"),
            "{e:?}"
        );
    }

    #[tokio::test]
    async fn the_connection_outlives_a_restart_of_the_runtime() {
        let mut runtime = FakeRuntime::start();
        let cri = Cri::connect(runtime.path()).await.unwrap();
        runtime.stop();
        let e = cri.containers().await.unwrap_err();
        assert!(matches!(e, CriError::Unreachable { .. }), "{e:?}");
        runtime.restart();
        assert!(cri.containers().await.is_ok());
        // After a restart between two calls, the next call succeeds.
        runtime.stop();
        runtime.restart();
        assert!(cri.containers().await.is_ok());
    }
}
