//! Runs the script and records what HTTP/2 carried: headers, messages and trailers separately.

use std::{collections::HashMap, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::Deserialize;
use tokio::{net::UnixStream, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::script::Step;

/// How long to wait for events that may still come.
const QUIET: Duration = Duration::from_secs(1);

/// The longest that a call may take.
const LONGEST: Duration = Duration::from_secs(60);

/// Names and values, sorted.
pub(crate) type Fields = Vec<(String, String)>;

/// What came back for one step.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Outcome {
    /// The HTTP status or the error of the call, or the gRPC status where the client shows only that.
    pub(crate) status: String,
    /// The headers; `grpc-status` is among them in a reply that has nothing else.
    pub(crate) headers: Fields,
    /// The messages, in hexadecimal digits.
    pub(crate) messages: Vec<String>,
    pub(crate) trailers: Option<Fields>,
}

/// What came back for the whole script.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Recording {
    /// One for each step.
    pub(crate) outcomes: Vec<Outcome>,
    /// Placeholders, and the ids that replaced them.
    pub(crate) ids: HashMap<String, String>,
}

type Sender = http2::SendRequest<Full<Bytes>>;

/// Runs `script` against `socket`, on one connection.
pub(crate) async fn run(script: &[Step], socket: &Path) -> Result<Recording> {
    let stream = UnixStream::connect(socket).await?;
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(stream))
        .await?;
    tokio::spawn(connection);
    let mut recording = Recording::default();
    let end = CancellationToken::new();
    let mut streams: Vec<(usize, JoinHandle<Result<Outcome>>)> = Vec::new();
    for (number, step) in script.iter().enumerate() {
        let mut message = step.request.clone();
        for (placeholder, id) in &recording.ids {
            message = message.replace(&hex(placeholder.as_bytes()), &hex(id.as_bytes()));
        }
        let request = request(&step.method, &unhex(&message)?)?;
        if step.streams {
            let call = call(sender.clone(), request, end.clone());
            streams.push((number, tokio::spawn(call)));
            recording.outcomes.push(Outcome::default());
            // The stream must be open before the next call.
            tokio::time::sleep(QUIET).await;
            continue;
        }
        let outcome = timeout(LONGEST, call(sender.clone(), request, end.clone())).await;
        let outcome = outcome
            .map_err(Into::into)
            .flatten()
            .with_context(|| step.method.clone())?;
        if let Some(placeholder) = &step.saves_id_as {
            let id = outcome.messages.first().and_then(|m| first_string(m));
            let id = id.with_context(|| format!("{} gave no id: {outcome:?}", step.method))?;
            recording.ids.insert(placeholder.clone(), id);
        }
        recording.outcomes.push(outcome);
    }
    tokio::time::sleep(QUIET).await;
    end.cancel();
    for (number, stream) in streams {
        recording.outcomes[number] = stream.await??;
    }
    Ok(recording)
}

fn request(path: &str, message: &[u8]) -> Result<Request<Full<Bytes>>> {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len())?);
    frame.put_slice(message);
    Ok(Request::post(format!("http://localhost{path}"))
        .header("te", "trailers")
        .header("content-type", "application/grpc")
        .header("user-agent", "grpc-go/1.75.0")
        .header("grpc-timeout", "59S")
        .header(
            "traceparent",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        )
        .body(Full::new(frame.freeze()))?)
}

/// Makes a call, and reads the reply until it is complete or `end` is cancelled.
async fn call(
    mut sender: Sender,
    request: Request<Full<Bytes>>,
    end: CancellationToken,
) -> Result<Outcome> {
    // A stream of events may have no headers before its first event.
    let reply = tokio::select! {
        reply = sender.send_request(request) => reply,
        () = end.cancelled() => bail!("no answer until the end"),
    };
    let reply = match reply {
        Ok(reply) => reply,
        Err(error) => {
            return Ok(Outcome {
                status: format!("{error:?}"),
                ..Outcome::default()
            });
        }
    };
    let mut outcome = Outcome {
        status: reply.status().to_string(),
        headers: fields(reply.headers()),
        ..Outcome::default()
    };
    let mut data = BytesMut::new();
    let mut body: Incoming = reply.into_body();
    loop {
        let frame = tokio::select! {
            frame = body.frame() => frame,
            () = end.cancelled() => break,
        };
        let Some(frame) = frame else { break };
        match frame.map(hyper::body::Frame::into_data) {
            Ok(Ok(bytes)) => data.extend_from_slice(&bytes),
            Ok(Err(frame)) => outcome.trailers = frame.trailers_ref().map(fields),
            Err(error) => outcome.status = format!("{error:?}"),
        }
    }
    while data.len() >= 5 {
        let flag = data.get_u8();
        let length = usize::try_from(data.get_u32())?;
        if flag != 0 || data.len() < length {
            bail!(
                "a message with flag {flag}, {} of {length} bytes",
                data.len()
            );
        }
        outcome.messages.push(hex(&data.split_to(length)));
    }
    Ok(outcome)
}

fn fields(headers: &HeaderMap) -> Fields {
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let mut fields: Fields = headers
        .iter()
        .map(|(name, value)| (name.to_string(), text(value)))
        .collect();
    fields.sort();
    fields
}

/// The string in field 1 of a message: the id, in replies that contain one.
fn first_string(message: &str) -> Option<String> {
    let message = unhex(message).ok()?;
    let (head, rest) = message.split_at_checked(2)?;
    let text = rest.get(..usize::from(head[1]))?;
    (head[0] == 0x0a).then(|| String::from_utf8_lossy(text).into_owned())
}

/// Hexadecimal digits of bytes.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Bytes of hexadecimal digits.
pub(crate) fn unhex(digits: &str) -> Result<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2);
    pairs
        .map(|pair| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?))
        .collect()
}
