//! Reads the two stop calls from their raw bodies.
//!
//! It relies on three fields of `runtime/v1/api.proto` (k8s.io/cri-api), whose numbers protobuf's compatibility rules
//! keep. Decoding skips all other fields. The proxy does not encode the message again, because that would lose fields
//! of newer Kubernetes versions. Instead it appends a new timeout: of a repeated scalar field the last occurrence
//! counts (<https://protobuf.dev/programming-guides/encoding/#last-one-wins>).

use std::time::Duration;

use bytes::Bytes;
use ebb_core::{
    clock::millis,
    ids::{ContainerId, SandboxId},
};
use ebb_protocol::hold::HeldCall;
use prost::Message;

use crate::grpc;

const STOP_CONTAINER: &str = "/runtime.v1.RuntimeService/StopContainer";
const STOP_POD_SANDBOX: &str = "/runtime.v1.RuntimeService/StopPodSandbox";

/// Whether this method is a stop call.
pub(crate) fn is_stop(path: &str) -> bool {
    path == STOP_CONTAINER || path == STOP_POD_SANDBOX
}

/// Why the proxy can't read the stop call with this body; `None` stands for a body that is longer than it reads.
pub(crate) fn why_unreadable(body: Option<&Bytes>) -> &'static str {
    match body {
        None => "it is longer than a message of the kubelet",
        Some(body) if body.first() == Some(&1) => "it is compressed",
        Some(body) if grpc::unary_message(body).is_none() => "it is not one whole gRPC message",
        Some(_) => "its message has no id, or is not that of a stop call",
    }
}

/// A stop call of `path` that the proxy can't read, as in reports to the agent: its id is empty.
pub(crate) fn unreadable_call(path: &str) -> HeldCall {
    match path {
        STOP_POD_SANDBOX => HeldCall::StopPodSandbox {
            sandbox: SandboxId::new(""),
        },
        _ => HeldCall::StopContainer {
            container: ContainerId::new(""),
            timeout_ms: 0,
        },
    }
}

/// The fields of a `StopContainerRequest` that the proxy reads.
#[derive(Clone, PartialEq, Message)]
struct StopContainer {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(int64, tag = "2")]
    timeout: i64,
}

/// The field number of `timeout`.
const TIMEOUT: u32 = 2;

/// The fields of a `StopPodSandboxRequest` that the proxy reads.
#[derive(Clone, PartialEq, Message)]
struct StopPodSandbox {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
}

/// A stop call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StopCall {
    /// `StopContainer`.
    Container {
        id: ContainerId,
        /// How long the application has after its stop signal. The message has whole seconds, and zero or less means
        /// no time.
        timeout: Duration,
    },
    /// `StopPodSandbox`.
    Sandbox { id: SandboxId },
}

impl StopCall {
    /// Reads the body of a call of `path`. `None` for other calls, and for a body that ebb can't read, which the
    /// runtime rejects.
    pub(crate) fn parse(path: &str, body: &[u8]) -> Option<Self> {
        let message = grpc::unary_message(body)?;
        let is_named = |id: &String| !id.is_empty();
        match path {
            STOP_CONTAINER => {
                let request = StopContainer::decode(message).ok()?;
                Some(Self::Container {
                    id: ContainerId::new(Some(request.container_id).filter(is_named)?),
                    timeout: Duration::from_secs(request.timeout.try_into().unwrap_or(0)),
                })
            }
            STOP_POD_SANDBOX => {
                let request = StopPodSandbox::decode(message).ok()?;
                Some(Self::Sandbox {
                    id: SandboxId::new(Some(request.pod_sandbox_id).filter(is_named)?),
                })
            }
            _ => None,
        }
    }

    /// The timeout of a StopContainer.
    pub(crate) const fn timeout(&self) -> Option<Duration> {
        match self {
            Self::Container { timeout, .. } => Some(*timeout),
            Self::Sandbox { .. } => None,
        }
    }

    /// The call's `body` with another timeout. A body without a timeout stays as it is.
    pub(crate) fn with_timeout(&self, body: Bytes, seconds: u64) -> Bytes {
        if self.timeout().is_none_or(|t| t.is_zero()) {
            return body;
        }
        let change = || {
            let mut message = grpc::unary_message(&body)?.to_vec();
            let seconds = i64::try_from(seconds).ok()?;
            prost::encoding::int64::encode(TIMEOUT, &seconds, &mut message);
            grpc::unary_body(&message)
        };
        change().unwrap_or(body)
    }

    /// The call as in requests to the agent.
    pub(crate) fn to_wire(&self) -> HeldCall {
        match self {
            Self::Container { id, timeout, .. } => HeldCall::StopContainer {
                container: id.clone(),
                timeout_ms: millis(*timeout),
            },
            Self::Sandbox { id } => HeldCall::StopPodSandbox {
                sandbox: id.clone(),
            },
        }
    }
}

impl std::fmt::Display for StopCall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Container { id, .. } => write!(f, "StopContainer {id}"),
            Self::Sandbox { id } => write!(f, "StopPodSandbox {id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_cri::v1::{StopContainerRequest, StopPodSandboxRequest};
    use proptest::prelude::*;

    use super::*;

    fn body(message: &impl Message) -> Bytes {
        grpc::unary_body(&message.encode_to_vec()).unwrap()
    }

    fn stop(id: &str, timeout: i64) -> Bytes {
        body(&StopContainerRequest {
            container_id: id.into(),
            timeout,
        })
    }

    #[test]
    fn container_and_timeout_are_found() {
        let call = StopCall::parse(STOP_CONTAINER, &stop("c1", 30)).unwrap();
        assert_eq!(call.timeout(), Some(Duration::from_secs(30)));
        assert_eq!(
            call.to_wire(),
            HeldCall::StopContainer {
                container: ContainerId::new("c1"),
                timeout_ms: 30_000
            }
        );
    }

    #[test]
    fn sandbox_is_found() {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: "s1".into(),
        };
        let call = StopCall::parse(STOP_POD_SANDBOX, &body(&request)).unwrap();
        assert_eq!(
            call,
            StopCall::Sandbox {
                id: SandboxId::new("s1")
            }
        );
        assert_eq!(call.timeout(), None);
    }

    #[test]
    fn a_timeout_of_zero_or_less_is_none_and_stays_as_it_is() {
        for timeout in [0, -1, i64::MIN] {
            let body = stop("c1", timeout);
            let call = StopCall::parse(STOP_CONTAINER, &body).unwrap();
            assert_eq!(call.timeout(), Some(Duration::ZERO), "{timeout}");
        }
        let body = stop("c1", 0);
        let call = StopCall::parse(STOP_CONTAINER, &body).unwrap();
        assert_eq!(call.with_timeout(body.clone(), 7), body);
    }

    #[test]
    fn a_call_without_an_id_is_not_read() {
        assert_eq!(StopCall::parse(STOP_CONTAINER, &stop("", 30)), None);
    }

    #[test]
    fn other_methods_are_not_read() {
        assert!(is_stop(STOP_CONTAINER) && is_stop(STOP_POD_SANDBOX));
        for path in [
            "/runtime.v1.RuntimeService/RemoveContainer",
            "/runtime.v2.RuntimeService/StopContainer",
            "/",
        ] {
            assert!(!is_stop(path), "{path}");
            assert_eq!(StopCall::parse(path, &stop("c1", 30)), None, "{path}");
        }
    }

    #[test]
    fn fields_of_the_wrong_type_are_not_read() {
        for message in [
            &[0x08, 1, 0x10, 30][..],
            &[0x0a, 1, b'c', 0x12, 1, 30],
            &[0x0a, 1, 0xff, 0x10, 30],
        ] {
            let body = grpc::unary_body(message).unwrap();
            assert_eq!(StopCall::parse(STOP_CONTAINER, &body), None, "{message:?}");
        }
    }

    #[test]
    fn a_new_timeout_changes_no_other_byte() {
        // id, timeout, an unknown field, the timeout again (the last one counts), another unknown.
        let message = [
            0x0a, 2, b'c', b'1', 0x10, 5, 0x7a, 2, 9, 9, 0x10, 0xac, 0x02, 0x78, 1,
        ];
        let body = grpc::unary_body(&message).unwrap();
        let call = StopCall::parse(STOP_CONTAINER, &body).unwrap();
        assert_eq!(call.timeout(), Some(Duration::from_secs(300)));
        let changed = call.with_timeout(body, 7);
        let expected = [&message[..], &[0x10, 7]].concat();
        assert_eq!(grpc::unary_message(&changed), Some(&expected[..]));
        let changed = StopCall::parse(STOP_CONTAINER, &changed).unwrap();
        assert_eq!(changed.timeout(), Some(Duration::from_secs(7)));
    }

    #[test]
    fn malformed_messages_are_not_read() {
        for bad in [
            &[0x18][..],                                             // a tag without its value
            &[0x18, 0x80],                                           // a varint that does not end
            &[0x1a, 0x05, b'a'],                                     // longer than the message
            &[0x00, 0x00],                                           // field number 0
            &[0x1b],                                                 // a group that does not end
            &[0x1e],                                                 // wire type 6
            &[0x1d, 1, 2, 3],                                        // three bytes of four
            &[0x18, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2], // 65 bits
            &[0x1a, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1], // a length beyond the address space
        ] {
            let message = [&[0x0a, 1, b'c', 0x10, 30], bad].concat();
            let body = grpc::unary_body(&message).unwrap();
            assert_eq!(StopCall::parse(STOP_CONTAINER, &body), None, "{bad:?}");
        }
    }

    /// A message of a later Kubernetes version, with additional fields.
    #[derive(Clone, PartialEq, Message)]
    struct Later {
        #[prost(string, tag = "1")]
        id: String,
        #[prost(int64, tag = "2")]
        timeout: i64,
        #[prost(fixed64, tag = "3")]
        fixed64: u64,
        #[prost(bytes = "vec", tag = "4")]
        bytes: Vec<u8>,
        #[prost(float, tag = "5")]
        float: f32,
        #[prost(sint64, tag = "536870911")]
        highest: i64,
    }

    fn any_later() -> impl Strategy<Value = Later> {
        (
            ".+",
            any::<i64>(),
            any::<u64>(),
            any::<Vec<u8>>(),
            -1e9f32..1e9,
            any::<i64>(),
        )
            .prop_map(|(id, timeout, fixed64, bytes, float, highest)| Later {
                id,
                timeout,
                fixed64,
                bytes,
                float,
                highest,
            })
    }

    proptest! {
        #[test]
        fn id_and_timeout_are_found_among_unknown_fields(later in any_later()) {
            let call = StopCall::parse(STOP_CONTAINER, &body(&later));
            let timeout = Duration::from_secs(later.timeout.try_into().unwrap_or(0));
            prop_assert_eq!(call, Some(StopCall::Container { id: ContainerId::new(later.id), timeout }));
        }

        #[test]
        fn a_new_timeout_changes_no_other_field(mut later in any_later(), timeout in 1..i64::MAX, new in 1..i64::MAX) {
            later.timeout = timeout;
            let body = body(&later);
            let call = StopCall::parse(STOP_CONTAINER, &body).unwrap();
            let changed = call.with_timeout(body, new.cast_unsigned());
            let changed = Later::decode(grpc::unary_message(&changed).unwrap()).unwrap();
            prop_assert_eq!(changed, Later { timeout: new, ..later });
        }

        #[test]
        fn any_bytes_are_read_without_panic(message in any::<Vec<u8>>()) {
            let body = grpc::unary_body(&message).unwrap();
            let _ = StopCall::parse(STOP_CONTAINER, &body);
            let _ = StopCall::parse(STOP_POD_SANDBOX, &body);
        }

        #[test]
        fn a_truncated_message_keeps_its_id_or_is_not_read(later in any_later(), keep in 0.0..1.0f64) {
            let whole = later.encode_to_vec();
            let cut = whole.len() * (keep * 1000.0) as usize / 1000;
            let body = grpc::unary_body(&whole[..cut]).unwrap();
            if let Some(StopCall::Container { id, .. }) = StopCall::parse(STOP_CONTAINER, &body) {
                prop_assert_eq!(id.as_str(), later.id);
            }
        }
    }
}
