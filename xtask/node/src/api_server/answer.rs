//! What each request gets.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::store::{Selector, merge, partial};
use super::{Answer, Asked, Shared, Verb, watch};

pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// The longest note of an Event (`NoteLengthLimit`, pkg/apis/core/validation/events.go).
const LONGEST_NOTE: usize = 1024;

/// A Status object: how the API says no.
pub(super) fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code})
}

/// Why a request gets a Status.
struct Refusal(u16, &'static str, String);

impl Refusal {
    fn not_found(what: &str) -> Self {
        Self(404, "NotFound", format!("{what} not found"))
    }
}

/// Answers one request, sooner or later.
pub(super) async fn answer(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let (head, body) = request.into_parts();
    if shared
        .secured
        .as_ref()
        .is_some_and(|s| !s.knows(&head.headers))
    {
        return Ok(refuse(&named(401)));
    }
    let path = head.uri.path().to_owned();
    let query: BTreeMap<String, String> =
        serde_urlencoded::from_str(head.uri.query().unwrap_or_default()).unwrap_or_default();
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let watches = query
        .get("watch")
        .is_some_and(|w| ["true", "1"].contains(&w.as_str()));
    let verb = match (&head.method, parts.as_slice()) {
        (&Method::GET, ["api", "v1", "pods"]) if watches => Verb::Watch,
        (&Method::GET, ["api", "v1", "pods"]) => Verb::List,
        (&Method::GET, ["api", "v1", "namespaces", _, "pods", _]) => Verb::Get,
        (&Method::POST, ["apis", "events.k8s.io", "v1", "namespaces", _, "events"]) => {
            Verb::CreateEvent
        }
        (&Method::PATCH, ["apis", "events.k8s.io", "v1", "namespaces", _, "events", _]) => {
            Verb::PatchEvent
        }
        _ => Verb::Other,
    };
    let accept = head.headers.get(header::ACCEPT);
    let accept = accept.and_then(|a| a.to_str().ok()).unwrap_or_default();
    let metadata = accept.contains("as=PartialObjectMetadata");
    let how = {
        let mut state = shared.state();
        state.asked.push(Asked {
            verb,
            path: path.clone(),
            query: query.clone(),
            metadata,
            at: Instant::now(),
        });
        match verb {
            Verb::List => state.faults.lists,
            Verb::Watch => state.faults.watches,
            Verb::Get => state.faults.gets,
            Verb::CreateEvent | Verb::PatchEvent => state.faults.events,
            Verb::Other => Answer::Good,
        }
    };
    match how {
        Answer::Good => {}
        Answer::After(time) => sleep(time).await,
        Answer::Status(code) => return Ok(refuse(&named(code))),
        Answer::Never => return std::future::pending().await,
    }
    // A body that breaks off is no JSON.
    let body = body.collect().await.map(|b| b.to_bytes());
    let body = body.unwrap_or_default();
    let result = match (verb, parts.as_slice()) {
        (Verb::List, _) => list(&shared, &query, metadata).map(|list| said(200, &list)),
        (Verb::Watch, _) => watch::begin(&shared, &query, metadata)
            .map(|body| json_of(StatusCode::OK, body))
            .map_err(|why| Refusal(400, "BadRequest", why)),
        (Verb::Get, [.., namespace, _, name]) => {
            get(&shared, namespace, name, metadata).map(|pod| said(200, &pod))
        }
        (Verb::CreateEvent, [.., namespace, _]) => {
            create_event(&shared, namespace, &body).map(|event| said(201, &event))
        }
        (Verb::PatchEvent, [.., namespace, _, name]) => {
            patch_event(&shared, namespace, name, &body).map(|event| said(200, &event))
        }
        _ => Err(Refusal::not_found(&path)),
    };
    Ok(result.unwrap_or_else(|refusal| refuse(&refusal)))
}

fn list(
    shared: &Shared,
    query: &BTreeMap<String, String>,
    metadata: bool,
) -> Result<Value, Refusal> {
    let selector = selector(query).map_err(|why| Refusal(400, "BadRequest", why))?;
    let state = shared.state();
    let mut items = state.store.list(&selector);
    let (kind, version) = match metadata {
        true => ("PartialObjectMetadataList", "meta.k8s.io/v1"),
        false => ("PodList", "v1"),
    };
    if metadata {
        items.iter_mut().for_each(|pod| *pod = partial(pod));
    }
    Ok(json!({
        "kind": kind, "apiVersion": version, "items": items,
        "metadata": {"resourceVersion": state.store.version().to_string()},
    }))
}

/// The field selector of a query.
pub(super) fn selector(query: &BTreeMap<String, String>) -> Result<Selector, String> {
    Selector::parse(query.get("fieldSelector").map_or("", String::as_str))
}

fn get(shared: &Shared, namespace: &str, name: &str, metadata: bool) -> Result<Value, Refusal> {
    let state = shared.state();
    let pod = state.store.get(&(namespace.into(), name.into()));
    let pod = pod.ok_or_else(|| Refusal::not_found(&format!("pods {name:?}")))?;
    Ok(if metadata { partial(pod) } else { pod.clone() })
}

/// Demands what `ValidateEventCreate` does (pkg/apis/core/validation/events.go).
fn create_event(shared: &Shared, namespace: &str, body: &[u8]) -> Result<Value, Refusal> {
    let mut event = parse(body)?;
    let invalid = |why: &str| Err(Refusal(422, "Invalid", format!("Event is invalid: {why}")));
    for field in [
        "reason",
        "action",
        "reportingController",
        "reportingInstance",
        "eventTime",
    ] {
        if event[field].as_str().is_none_or(str::is_empty) {
            return invalid(&format!("{field} is required"));
        }
    }
    if !["Normal", "Warning"]
        .map(Some)
        .contains(&event["type"].as_str())
    {
        return invalid("type is neither Normal nor Warning");
    }
    if event["note"].as_str().unwrap_or_default().len() > LONGEST_NOTE {
        return invalid("note is too long");
    }
    let of = |value: &Value| value["namespace"].as_str().map(str::to_owned);
    if of(&event["regarding"]).as_deref() != Some(namespace)
        || of(&event["metadata"]).is_some_and(|n| n != namespace)
    {
        return invalid("it is about an object of another namespace");
    }
    let Some(name) = event["metadata"]["name"].as_str().map(str::to_owned) else {
        return invalid("metadata.name is required");
    };
    event["metadata"]["namespace"] = namespace.into();
    shared.change(|state| {
        let key = (namespace.to_owned(), name.clone());
        if state.events.contains_key(&key) {
            let why = format!("events {name:?} already exists");
            return Err(Refusal(409, "AlreadyExists", why));
        }
        state.events.insert(key, event.clone());
        Ok(event)
    })
}

fn patch_event(
    shared: &Shared,
    namespace: &str,
    name: &str,
    body: &[u8],
) -> Result<Value, Refusal> {
    let patch = parse(body)?;
    shared.change(|state| {
        let event = state.events.get_mut(&(namespace.into(), name.into()));
        let event = event.ok_or_else(|| Refusal::not_found(&format!("events {name:?}")))?;
        merge(event, patch);
        Ok(event.clone())
    })
}

fn parse(body: &[u8]) -> Result<Value, Refusal> {
    serde_json::from_slice(body).map_err(|e| Refusal(400, "BadRequest", e.to_string()))
}

fn named(code: u16) -> Refusal {
    let reason = match code {
        401 => "Unauthorized",
        403 => "Forbidden",
        410 => "Expired",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    Refusal(code, reason, "as it was told to".into())
}

fn refuse(Refusal(code, reason, message): &Refusal) -> Response<Body> {
    said(*code, &status(*code, reason, message))
}

fn said(code: u16, value: &Value) -> Response<Body> {
    let body = Full::new(Bytes::from(value.to_string()));
    let body = body.map_err(|never| match never {}).boxed_unsync();
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json_of(code, body)
}

fn json_of(code: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = code;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
