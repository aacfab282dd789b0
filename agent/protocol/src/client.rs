//! A client of the agent's unix socket: HTTP/1.1 with JSON, one connection per request.
//!
//! The proxy requests holds through it, and the CLI everything that it shows. The value that reads a reply owns the
//! connection, and closing the connection cancels the request. So the proxy cancels a hold by dropping its
//! [`JsonLines`].

use std::{io, marker::PhantomData, path::PathBuf, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::views::Problem;

/// How long a connect may take. The agent is on this node, so a running agent accepts at once.
const CONNECT: Duration = Duration::from_millis(250);

/// How long a whole reply may take, unless it is a stream. Enough for a dump of a very full node.
const REPLY: Duration = Duration::from_secs(10);

/// The longest reply that is not a stream: every connection of a very full node.
const LONGEST_REPLY: usize = 256 << 20;

/// The longest line of a stream.
const LONGEST_LINE: usize = 64 << 10;

/// The longest part of a refusal that is shown.
const LONGEST_REFUSAL: usize = 64 << 10;

/// Why the agent did not answer.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No process listens at the socket.
    #[error(
        "the ebb agent is not running on this node: no process listens at {} ({source}); start it, or name its \
         socket with --agent",
        .socket.display()
    )]
    NotRunning {
        /// The agent's socket.
        socket: PathBuf,
        /// The error of the connect.
        source: io::Error,
    },
    /// This user may not connect to the socket.
    #[error("no permission to talk to the ebb agent at {}: run this as root", .socket.display())]
    NotAllowed {
        /// The agent's socket.
        socket: PathBuf,
        /// The error of the connect.
        source: io::Error,
    },
    /// The connect failed in another way.
    #[error("can't connect to the ebb agent at {}", .socket.display())]
    Connect {
        /// The agent's socket.
        socket: PathBuf,
        /// The error of the connect.
        source: io::Error,
    },
    /// The agent runs, but did not answer in time.
    #[error(
        "the ebb agent at {} did not {what} within {after:?}: it is stuck or has no CPU time. Its log \
         should say why",
        .socket.display()
    )]
    Timeout {
        /// The agent's socket.
        socket: PathBuf,
        /// What it should have done.
        what: &'static str,
        /// After how long.
        after: Duration,
    },
    /// The agent refused the request and says why.
    #[error("{problem}")]
    Problem {
        /// The HTTP status.
        status: StatusCode,
        /// The agent's reason.
        problem: Problem,
    },
    /// The server knows no such request.
    #[error("this agent does not know {path}: is it older than this program?")]
    UnknownPath {
        /// The path of the request, without its query.
        path: String,
    },
    /// The server refused the request, and is perhaps no agent.
    #[error("the ebb agent refused {path} ({status}): {message}")]
    Refused {
        /// The path of the request.
        path: String,
        /// The HTTP status.
        status: StatusCode,
        /// The agent's reason.
        message: String,
    },
    /// The connection ended before the end of the reply.
    #[error("lost the ebb agent while it answered {path}: it may have been restarted; try again")]
    Lost {
        /// The path of the request.
        path: String,
        /// How the connection ended.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The agent's answer is not valid.
    #[error(
        "the ebb agent's answer to {path} is not valid: do the agent and this program have the same \
         version?"
    )]
    BadReply {
        /// The path of the request.
        path: String,
        /// What is wrong with the answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The request can't be written as JSON.
    #[error("can't write the request for {path} as JSON")]
    BadRequest {
        /// The path of the request.
        path: String,
        /// Why not.
        source: serde_json::Error,
    },
}

/// A client of the agent. It keeps no connection.
#[derive(Clone, Debug)]
pub struct AgentClient {
    socket: PathBuf,
}

impl AgentClient {
    /// A client of the agent that listens at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// `GET path`, with the reply as one JSON value. Fails after 10 s.
    pub async fn get_json<T: DeserializeOwned>(&self, path: &str) -> Result<T, AgentError> {
        self.get_json_within(path, Some(REPLY)).await
    }

    /// `GET path`, with the reply as one JSON value, which may take this long. Without a limit, only the connect has one.
    pub async fn get_json_within<T: DeserializeOwned>(
        &self,
        path: &str,
        within: Option<Duration>,
    ) -> Result<T, AgentError> {
        self.whole(Method::GET, path, Bytes::new(), within).await
    }

    /// `POST path` with `body` as JSON, with the reply as one JSON value (`()` if it is empty). Fails after 10 s.
    pub async fn post_json<B, T>(&self, path: &str, body: &B) -> Result<T, AgentError>
    where
        B: Serialize + Sync,
        T: DeserializeOwned,
    {
        let body = to_json(path, body)?;
        self.whole(Method::POST, path, body, Some(REPLY)).await
    }

    /// `POST path` with `body` as JSON, with the reply as a stream of JSON lines. Only the connect has a time limit;
    /// the caller sets its own for the rest.
    pub async fn post_lines<B, T>(&self, path: &str, body: &B) -> Result<JsonLines<T>, AgentError>
    where
        B: Serialize + Sync,
        T: DeserializeOwned,
    {
        self.lines(Method::POST, path, to_json(path, body)?).await
    }

    async fn whole<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        within: Option<Duration>,
    ) -> Result<T, AgentError> {
        let reply = async {
            let bytes = self.bytes(method, path, body).await?;
            let json = if bytes.is_empty() {
                b"null"
            } else {
                &bytes[..]
            };
            serde_json::from_slice(json).map_err(|e| AgentError::BadReply {
                path: path.to_owned(),
                source: e.into(),
            })
        };
        let Some(within) = within else {
            return reply.await;
        };
        timeout(within, reply)
            .await
            .unwrap_or_else(|_| Err(self.timeout("answer", within)))
    }

    /// The whole body of a successful reply.
    async fn bytes(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, AgentError> {
        let (reply, _connection) = self.send(method, path, body).await?;
        let body = Limited::new(reply.into_body(), LONGEST_REPLY).collect();
        let body = body.await.map_err(|source| {
            let path = path.to_owned();
            if source.is::<LengthLimitError>() {
                AgentError::BadReply { path, source }
            } else {
                AgentError::Lost { path, source }
            }
        })?;
        Ok(body.to_bytes())
    }

    async fn lines<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<JsonLines<T>, AgentError> {
        let (reply, connection) = self.send(method, path, body).await?;
        Ok(JsonLines {
            path: path.to_owned(),
            body: reply.into_body(),
            unread: BytesMut::new(),
            ended: false,
            _connection: connection,
            line: PhantomData,
        })
    }

    /// Sends a request and waits for the head of a successful reply. Dropping the handle closes the connection, and
    /// ends the body.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(Response<Incoming>, AbortOnDropHandle<()>), AgentError> {
        let lost = |source: hyper::Error| AgentError::Lost {
            path: path.to_owned(),
            source: source.into(),
        };
        let stream = self.connect().await?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
        // The reader of the reply gets the connection's error.
        let connection = AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = connection.await;
        }));
        let request = Request::builder()
            .method(method)
            .uri(path)
            // HTTP/1.1 requires one; a unix socket has no host name.
            .header(header::HOST, "ebb")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|e| AgentError::Refused {
                path: path.to_owned(),
                status: StatusCode::BAD_REQUEST,
                message: e.to_string(),
            })?;
        let reply = sender.send_request(request).await.map_err(lost)?;
        if reply.status().is_success() {
            return Ok((reply, connection));
        }
        let status = reply.status();
        let message = match Limited::new(reply.into_body(), LONGEST_REFUSAL)
            .collect()
            .await
        {
            Ok(body) => String::from_utf8_lossy(&body.to_bytes()).trim().to_owned(),
            Err(_) => String::new(),
        };
        Err(match serde_json::from_str(&message) {
            Ok(problem) => AgentError::Problem { status, problem },
            // The agent's own refusals are problems. These are of a server without this route.
            Err(_) if [StatusCode::NOT_FOUND, StatusCode::METHOD_NOT_ALLOWED].contains(&status) => {
                AgentError::UnknownPath {
                    path: path.split('?').next().unwrap_or(path).to_owned(),
                }
            }
            Err(_) => AgentError::Refused {
                path: path.to_owned(),
                status,
                message,
            },
        })
    }

    async fn connect(&self) -> Result<UnixStream, AgentError> {
        let connect = timeout(CONNECT, UnixStream::connect(&self.socket)).await;
        let socket = || self.socket.clone();
        match connect.map_err(|_| self.timeout("accept a connection", CONNECT))? {
            Ok(stream) => Ok(stream),
            Err(source) => Err(match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    AgentError::NotRunning {
                        socket: socket(),
                        source,
                    }
                }
                io::ErrorKind::PermissionDenied => AgentError::NotAllowed {
                    socket: socket(),
                    source,
                },
                _ => AgentError::Connect {
                    socket: socket(),
                    source,
                },
            }),
        }
    }

    fn timeout(&self, what: &'static str, after: Duration) -> AgentError {
        AgentError::Timeout {
            socket: self.socket.clone(),
            what,
            after,
        }
    }
}

fn to_json<B: Serialize>(path: &str, body: &B) -> Result<Bytes, AgentError> {
    serde_json::to_vec(body)
        .map(Bytes::from)
        .map_err(|source| AgentError::BadRequest {
            path: path.to_owned(),
            source,
        })
}

/// A reply that comes as lines of JSON, each a `T`. Dropping it closes the connection.
#[derive(Debug)]
pub struct JsonLines<T> {
    path: String,
    body: Incoming,
    unread: BytesMut,
    ended: bool,
    _connection: AbortOnDropHandle<()>,
    line: PhantomData<fn() -> T>,
}

/// A line of a stream that is too long.
#[derive(Debug, thiserror::Error)]
#[error("a line of more than {LONGEST_LINE} bytes")]
struct LineTooLong;

impl<T: DeserializeOwned> JsonLines<T> {
    /// The next line; `None` when the agent has ended the stream. After an error there are no more lines. Cancel
    /// safe: dropping the future loses no line.
    pub async fn next(&mut self) -> Result<Option<T>, AgentError> {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line = self.unread.split_to(end + 1);
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return self.parse(&line).map(Some);
            }
            if self.unread.len() > LONGEST_LINE {
                return Err(self.bad(LineTooLong));
            }
            if self.ended {
                // The last line may lack its newline.
                let line = self.unread.split();
                return if line.trim_ascii().is_empty() {
                    Ok(None)
                } else {
                    self.parse(&line).map(Some)
                };
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.unread.extend_from_slice(&data);
                    }
                }
                Some(Err(source)) => {
                    return Err(AgentError::Lost {
                        path: self.path.clone(),
                        source: source.into(),
                    });
                }
                None => self.ended = true,
            }
        }
    }

    fn parse(&self, line: &[u8]) -> Result<T, AgentError> {
        serde_json::from_slice(line).map_err(|e| self.bad(e))
    }

    fn bad(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> AgentError {
        AgentError::BadReply {
            path: self.path.clone(),
            source: source.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::{
        Router,
        routing::{get, post},
    };
    use serde_json::{Value, json};
    use tempfile::TempDir;
    use tokio::net::UnixListener;

    use super::*;

    fn agent(routes: Router) -> (TempDir, AgentClient) {
        let directory = TempDir::new().unwrap();
        let socket = directory.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move { axum::serve(listener, routes).await });
        (directory, AgentClient::new(socket))
    }

    #[tokio::test]
    async fn reads_and_posts_json() {
        let (_directory, client) = agent(
            Router::new()
                .route(
                    "/v1/pods",
                    get(async || axum::Json(json!({"pods": ["web"]}))),
                )
                .route("/v1/echo", post(async |body: axum::Json<Value>| body))
                .route("/v1/nothing", post(async || ())),
        );
        let pods: Value = client.get_json("/v1/pods").await.unwrap();
        assert_eq!(pods, json!({"pods": ["web"]}));
        let echo: Value = client
            .post_json("/v1/echo", &json!([1, "ä"]))
            .await
            .unwrap();
        assert_eq!(echo, json!([1, "ä"]));
        let () = client.post_json("/v1/nothing", &json!({})).await.unwrap();
    }

    #[tokio::test]
    async fn a_socket_without_a_listener_is_an_agent_that_is_not_running() {
        let directory = TempDir::new().unwrap();
        let socket = directory.path().join("agent.sock");
        let client = AgentClient::new(&socket);
        let missing = client.get_json::<Value>("/v1/pods").await.unwrap_err();
        drop(UnixListener::bind(&socket).unwrap());
        let refused = client.get_json::<Value>("/v1/pods").await.unwrap_err();
        for error in [missing, refused] {
            assert!(matches!(error, AgentError::NotRunning { .. }), "{error:?}");
            assert!(
                error.to_string().contains("is not running on this node"),
                "{error}"
            );
        }
    }

    #[tokio::test]
    async fn a_refusal_names_the_agents_reason() {
        let (_directory, client) = agent(
            Router::new()
                .route(
                    "/v1/pods",
                    get(async || (StatusCode::BAD_REQUEST, "no such label\n")),
                )
                .route(
                    "/v1/explain",
                    get(async || {
                        let problem = json!({"error": "no pod x"});
                        (StatusCode::NOT_FOUND, axum::Json(problem))
                    }),
                ),
        );
        let error = client.get_json::<Value>("/v1/pods").await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the ebb agent refused /v1/pods (400 Bad Request): no such label"
        );
        let error = client.get_json::<Value>("/v1/explain").await.unwrap_err();
        assert!(
            matches!(
                error,
                AgentError::Problem {
                    status: StatusCode::NOT_FOUND,
                    ..
                }
            ),
            "{error:?}"
        );
        assert_eq!(error.to_string(), "no pod x");
    }

    #[tokio::test]
    async fn an_agent_without_the_route_is_another_version_and_not_a_pod_that_is_missing() {
        let (_directory, client) = agent(Router::new().route("/v1/release", get(async || ())));
        let get = client.get_json::<Value>("/v1/advice?pod=x").await;
        let post = client
            .post_json::<_, Value>("/v1/release", &json!({}))
            .await;
        for (answer, path) in [(get, "/v1/advice"), (post, "/v1/release")] {
            let error = answer.unwrap_err();
            assert!(matches!(error, AgentError::UnknownPath { .. }), "{error:?}");
            assert_eq!(
                error.to_string(),
                format!("this agent does not know {path}: is it older than this program?")
            );
        }
    }

    #[tokio::test]
    async fn an_invalid_answer_and_a_lost_connection_are_different_errors() {
        let (_directory, client) = agent(Router::new().route("/v1/pods", get(async || "<html>")));
        let error = client.get_json::<Value>("/v1/pods").await.unwrap_err();
        assert!(matches!(error, AgentError::BadReply { .. }), "{error:?}");

        let directory = TempDir::new().unwrap();
        let socket = directory.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move { drop(listener.accept().await) });
        let error = AgentClient::new(socket)
            .get_json::<Value>("/v1/pods")
            .await
            .unwrap_err();
        assert!(matches!(error, AgentError::Lost { .. }), "{error:?}");
    }

    async fn get_lines(client: &AgentClient) -> JsonLines<Value> {
        let lines = client.lines(Method::GET, "/v1/lines", Bytes::new());
        lines.await.unwrap()
    }

    #[tokio::test]
    async fn reads_lines_with_or_without_a_last_newline() {
        let (_directory, client) = agent(Router::new().route(
            "/v1/lines",
            get(async || "{\"a\":1}\n\n  \r\n{\"a\":2}\n{\"a\":3}"),
        ));
        let mut lines = get_lines(&client).await;
        for a in 1..=3 {
            assert_eq!(lines.next().await.unwrap(), Some(json!({ "a": a })));
        }
        assert_eq!(lines.next().await.unwrap(), None);
        assert_eq!(lines.next().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_line_that_is_too_long_is_an_error() {
        let (_directory, client) =
            agent(Router::new().route("/v1/lines", get(async || "1".repeat(LONGEST_LINE + 1))));
        let mut lines = get_lines(&client).await;
        let error = lines.next().await.unwrap_err();
        assert!(matches!(error, AgentError::BadReply { .. }), "{error:?}");
    }
}
