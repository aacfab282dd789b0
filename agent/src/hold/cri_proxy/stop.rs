//! The two calls that stop something, read from their raw bodies.
//!
//! Of `runtime/v1/api.proto` (k8s.io/cri-api) this relies on three fields, which protobuf's rules of
//! compatibility keep where they are:
//!
//! ```text
//! message StopContainerRequest  { string container_id = 1;  int64 timeout = 2; }
//! message StopPodSandboxRequest { string pod_sandbox_id = 1; }
//! ```

use std::{ops::Range, time::Duration};

use bytes::Bytes;

use super::{
    grpc,
    protobuf::{self, Value},
};
use crate::{
    clock::millis,
    hold::wire::HeldCall,
    ids::{ContainerId, SandboxId},
};

const STOP_CONTAINER: &str = "/runtime.v1.RuntimeService/StopContainer";
const STOP_POD_SANDBOX: &str = "/runtime.v1.RuntimeService/StopPodSandbox";

/// Whether calls of this method are looked into at all.
pub(super) fn is_stop(path: &str) -> bool {
    path == STOP_CONTAINER || path == STOP_POD_SANDBOX
}

/// A stop call as far as a hold is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StopCall {
    /// `StopContainer`.
    Container {
        /// The container.
        id: ContainerId,
        /// How long the application has after its stop signal; whole seconds on the wire, where zero and less
        /// are none.
        timeout: Duration,
        /// Where the message has the timeout; zero may be left out.
        timeout_at: Option<Range<usize>>,
    },
    /// `StopPodSandbox`.
    Sandbox {
        /// The sandbox.
        id: SandboxId,
    },
}

impl StopCall {
    /// Reads the body of a call of `path`. `None` is whatever ebb has nothing to do with: a body it doesn't
    /// understand is for the runtime to judge.
    pub(super) fn parse(path: &str, body: &[u8]) -> Option<Self> {
        let fields = protobuf::fields(grpc::unary_message(body)?).ok()?;
        let mut id = None;
        let mut timeout = None;
        for field in fields {
            match (field.number, field.value) {
                (1, Value::Bytes(bytes)) => id = Some(std::str::from_utf8(bytes).ok()?),
                (2, Value::Varint(seconds)) if path == STOP_CONTAINER => {
                    timeout = Some((seconds, field.at));
                }
                // The right number with the wrong type.
                (1, _) => return None,
                (2, _) if path == STOP_CONTAINER => return None,
                _ => {}
            }
        }
        let id = id.filter(|id| !id.is_empty())?;
        match path {
            STOP_CONTAINER => {
                let (seconds, timeout_at) = timeout.map_or((0, None), |(s, at)| (s, Some(at)));
                // On the wire a negative int64 is a varint above i64::MAX.
                let seconds = u64::try_from(seconds.cast_signed()).unwrap_or(0);
                Some(Self::Container {
                    id: ContainerId::new(id),
                    timeout: Duration::from_secs(seconds),
                    timeout_at,
                })
            }
            STOP_POD_SANDBOX => Some(Self::Sandbox {
                id: SandboxId::new(id),
            }),
            _ => None,
        }
    }

    /// The timeout of the call, if it is of a kind that has one.
    pub(super) const fn timeout(&self) -> Option<Duration> {
        match self {
            Self::Container { timeout, .. } => Some(*timeout),
            Self::Sandbox { .. } => None,
        }
    }

    /// `body`, which this call was read from, with another timeout. What has none stays as it is.
    pub(super) fn with_timeout(&self, body: Bytes, seconds: u64) -> Bytes {
        let Self::Container {
            timeout_at: Some(timeout_at),
            ..
        } = self
        else {
            return body;
        };
        grpc::unary_message(&body)
            .map(|message| protobuf::with_varint(message, timeout_at, seconds))
            .and_then(|message| grpc::unary_body(&message))
            .unwrap_or(body)
    }

    /// The call as the agent is told about it.
    pub(super) fn to_wire(&self) -> HeldCall {
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
    use prost::Message;

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
    fn no_id_is_not_ours() {
        assert_eq!(StopCall::parse(STOP_CONTAINER, &stop("", 30)), None);
    }

    #[test]
    fn other_methods_are_not_looked_into() {
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
    fn fields_of_the_wrong_type_are_not_ours() {
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
    fn a_new_timeout_leaves_every_other_byte() {
        // id, timeout, an unknown field, the timeout again (the last one counts), another unknown.
        let message = [
            0x0a, 2, b'c', b'1', 0x10, 5, 0x7a, 2, 9, 9, 0x10, 0xac, 0x02, 0x78, 1,
        ];
        let body = grpc::unary_body(&message).unwrap();
        let call = StopCall::parse(STOP_CONTAINER, &body).unwrap();
        assert_eq!(call.timeout(), Some(Duration::from_secs(300)));
        let changed = call.with_timeout(body, 7);
        let expected = [
            0x0a, 2, b'c', b'1', 0x10, 5, 0x7a, 2, 9, 9, 0x10, 7, 0x78, 1,
        ];
        assert_eq!(grpc::unary_message(&changed), Some(&expected[..]));
    }
}
