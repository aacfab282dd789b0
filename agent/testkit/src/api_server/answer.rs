//! The answer to each request.

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
use super::{AnswerMode, ApiVerb, RecordedRequest, ServerShared, watch};

pub(super) type ApiBody = UnsyncBoxBody<Bytes, io::Error>;

/// The longest note of an Event (`NoteLengthLimit`, pkg/apis/core/validation/events.go).
const LONGEST_NOTE: usize = 1024;

/// A Status object: the API's form of an error.
pub(super) fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code})
}

/// The code, reason and message of a Status.
struct ApiError(u16, &'static str, String);

impl ApiError {
    fn not_found(what: &str) -> Self {
        Self(404, "NotFound", format!("{what} not found"))
    }
}

/// Answers one request, after the delay that the faults demand.
pub(super) async fn answer(
    shared: Arc<ServerShared>,
    request: Request<Incoming>,
) -> Result<Response<ApiBody>, Infallible> {
    if shared
        .secured
        .as_ref()
        .is_some_and(|s| !s.knows(request.headers()))
    {
        return Ok(refuse(&named(401)));
    }
    let path = request.uri().path().to_owned();
    if let ["api", "v1", "namespaces", namespace, "pods", name, "exec"] =
        path.split('/').skip(1).collect::<Vec<_>>()[..]
    {
        return Ok(exec(&shared, namespace, name, request).await);
    }
    let (head, body) = request.into_parts();
    let query: BTreeMap<String, String> =
        serde_urlencoded::from_str(head.uri.query().unwrap_or_default()).unwrap_or_default();
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let watches = query
        .get("watch")
        .is_some_and(|w| ["true", "1"].contains(&w.as_str()));
    let verb = match (&head.method, parts.as_slice()) {
        (&Method::GET, ["api", "v1", "pods"]) if watches => ApiVerb::Watch,
        (&Method::GET, ["api", "v1", "pods"] | ["api", "v1", "namespaces", _, "pods"]) => {
            ApiVerb::List
        }
        (&Method::GET, ["api", "v1", "namespaces", _, "pods", _]) => ApiVerb::Get,
        (&Method::GET, ["api", "v1", "namespaces"]) if watches => ApiVerb::WatchNamespaces,
        (&Method::GET, ["api", "v1", "namespaces"]) => ApiVerb::ListNamespaces,
        (&Method::POST, ["apis", "events.k8s.io", "v1", "namespaces", _, "events"]) => {
            ApiVerb::CreateEvent
        }
        (&Method::PATCH, ["apis", "events.k8s.io", "v1", "namespaces", _, "events", _]) => {
            ApiVerb::PatchEvent
        }
        _ => ApiVerb::Other,
    };
    let accept = head.headers.get(header::ACCEPT);
    let accept = accept.and_then(|a| a.to_str().ok()).unwrap_or_default();
    let metadata = accept.contains("as=PartialObjectMetadata");
    let how = {
        let mut state = shared.state();
        state.requests.push(RecordedRequest {
            verb,
            path: path.clone(),
            query: query.clone(),
            metadata,
            at: Instant::now(),
        });
        match verb {
            ApiVerb::List => state.faults.lists,
            ApiVerb::Watch => state.faults.watches,
            ApiVerb::Get => state.faults.gets,
            ApiVerb::CreateEvent | ApiVerb::PatchEvent => state.faults.events,
            ApiVerb::ListNamespaces | ApiVerb::WatchNamespaces => state.faults.namespaces,
            ApiVerb::Other => AnswerMode::Good,
        }
    };
    match how {
        AnswerMode::Good => {}
        AnswerMode::After(time) => sleep(time).await,
        AnswerMode::Status(code) => return Ok(refuse(&named(code))),
        AnswerMode::Never => return std::future::pending().await,
    }
    // A truncated body fails later, as invalid JSON.
    let body = body.collect().await.map(|b| b.to_bytes());
    let body = body.unwrap_or_default();
    let result = match (verb, parts.as_slice()) {
        (ApiVerb::List | ApiVerb::ListNamespaces, parts) => {
            list(&shared, verb, parts, &query, metadata).map(|list| json_reply(200, &list))
        }
        (ApiVerb::Watch | ApiVerb::WatchNamespaces, _) => {
            watch::begin(&shared, verb, &query, metadata)
                .map(|body| reply(StatusCode::OK, body))
                .map_err(|why| ApiError(400, "BadRequest", why))
        }
        (ApiVerb::Get, [.., namespace, _, name]) => {
            get(&shared, namespace, name, metadata).map(|pod| json_reply(200, &pod))
        }
        (ApiVerb::CreateEvent, [.., namespace, _]) => {
            create_event(&shared, namespace, &body).map(|event| json_reply(201, &event))
        }
        (ApiVerb::PatchEvent, [.., namespace, _, name]) => {
            patch_event(&shared, namespace, name, &body).map(|event| json_reply(200, &event))
        }
        _ => Err(ApiError::not_found(&path)),
    };
    Ok(result.unwrap_or_else(|refusal| refuse(&refusal)))
}

async fn exec(
    shared: &ServerShared,
    namespace: &str,
    name: &str,
    request: Request<Incoming>,
) -> Response<ApiBody> {
    let key = (namespace.to_owned(), name.to_owned());
    let target = shared.state().exec_targets.get(&key).cloned();
    let Some(target) = target else {
        return refuse(&ApiError::not_found(&format!("pods {name:?}")));
    };
    match target.start(request).await {
        Ok(head) => head.map(|()| {
            Full::default()
                .map_err(|never| match never {})
                .boxed_unsync()
        }),
        Err(e) => refuse(&ApiError(500, "InternalError", format!("{e:#}"))),
    }
}

fn list(
    shared: &ServerShared,
    verb: ApiVerb,
    parts: &[&str],
    query: &BTreeMap<String, String>,
    metadata: bool,
) -> Result<Value, ApiError> {
    let mut selector = selector(query).map_err(|why| ApiError(400, "BadRequest", why))?;
    if let [.., "namespaces", namespace, "pods"] = parts {
        selector.require("metadata.namespace", namespace);
    }
    let state = shared.state();
    let store = state.store_of(verb);
    let mut items = store.list(&selector);
    let (kind, version) = match metadata {
        true => ("PartialObjectMetadataList", "meta.k8s.io/v1"),
        false if verb == ApiVerb::ListNamespaces => ("NamespaceList", "v1"),
        false => ("PodList", "v1"),
    };
    if metadata {
        items.iter_mut().for_each(|pod| *pod = partial(pod));
    }
    Ok(json!({
        "kind": kind, "apiVersion": version, "items": items,
        "metadata": {"resourceVersion": store.version().to_string()},
    }))
}

/// The field and label selectors of a query.
pub(super) fn selector(query: &BTreeMap<String, String>) -> Result<Selector, String> {
    let text = |key| query.get(key).map_or("", String::as_str);
    Selector::parse(text("fieldSelector"), text("labelSelector"))
}

fn get(
    shared: &ServerShared,
    namespace: &str,
    name: &str,
    metadata: bool,
) -> Result<Value, ApiError> {
    let state = shared.state();
    let pod = state.store.get(&(namespace.into(), name.into()));
    let pod = pod.ok_or_else(|| ApiError::not_found(&format!("pods {name:?}")))?;
    Ok(if metadata { partial(pod) } else { pod.clone() })
}

/// Validates as `ValidateEventCreate` does (pkg/apis/core/validation/events.go).
fn create_event(shared: &ServerShared, namespace: &str, body: &[u8]) -> Result<Value, ApiError> {
    let mut event = parse(body)?;
    let invalid = |why: &str| Err(ApiError(422, "Invalid", format!("Event is invalid: {why}")));
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
            return Err(ApiError(409, "AlreadyExists", why));
        }
        state.events.insert(key, event.clone());
        Ok(event)
    })
}

fn patch_event(
    shared: &ServerShared,
    namespace: &str,
    name: &str,
    body: &[u8],
) -> Result<Value, ApiError> {
    let patch = parse(body)?;
    shared.change(|state| {
        let event = state.events.get_mut(&(namespace.into(), name.into()));
        let event = event.ok_or_else(|| ApiError::not_found(&format!("events {name:?}")))?;
        merge(event, patch);
        Ok(event.clone())
    })
}

fn parse(body: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(body).map_err(|e| ApiError(400, "BadRequest", e.to_string()))
}

fn named(code: u16) -> ApiError {
    let reason = match code {
        401 => "Unauthorized",
        403 => "Forbidden",
        410 => "Expired",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    ApiError(code, reason, "injected fault".into())
}

fn refuse(ApiError(code, reason, message): &ApiError) -> Response<ApiBody> {
    json_reply(*code, &status(*code, reason, message))
}

fn json_reply(code: u16, value: &Value) -> Response<ApiBody> {
    let body = Full::new(Bytes::from(value.to_string()));
    let body = body.map_err(|never| match never {}).boxed_unsync();
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    reply(code, body)
}

fn reply(code: StatusCode, body: ApiBody) -> Response<ApiBody> {
    let mut response = Response::new(body);
    *response.status_mut() = code;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
