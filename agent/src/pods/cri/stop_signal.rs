//! The stop signal that a runtime will send, from `ContainerStatus.stop_signal`, a field that runtimes have had since
//! KEP-4960 (containerd from 2.3 on) and the generated client does not know yet.

use ebb_core::ids::ContainerId;
use k8s_cri::v1::ContainerStatusRequest;
use tokio::time::timeout;
use tonic::{client::Grpc, codegen::http::uri::PathAndQuery};
use tonic_prost::ProstCodec;

use super::{CALL_TIMEOUT, Cri, CriError, MESSAGE_LIMIT};

const CALL: &str = "ContainerStatus";

/// The part of a ContainerStatusResponse that is missing in the client's.
#[derive(Clone, PartialEq, prost::Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Status {
    /// `Signal`, see [`NAMES`].
    #[prost(int32, tag = "19")]
    stop_signal: i32,
}

/// The names of the enum `Signal` of the CRI, from 1 on.
#[rustfmt::skip]
const NAMES: [&str; 34] = [
    "SIGABRT", "SIGALRM", "SIGBUS", "SIGCHLD", "SIGCLD", "SIGCONT", "SIGFPE", "SIGHUP", "SIGILL", "SIGINT", "SIGIO",
    "SIGIOT", "SIGKILL", "SIGPIPE", "SIGPOLL", "SIGPROF", "SIGPWR", "SIGQUIT", "SIGSEGV", "SIGSTKFLT", "SIGSTOP",
    "SIGSYS", "SIGTERM", "SIGTRAP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGUSR1", "SIGUSR2", "SIGVTALRM",
    "SIGWINCH", "SIGXCPU", "SIGXFSZ",
];

/// The number of SIGRTMIN in that enum, and that of SIGRTMAX. SIGRTMIN+1 to SIGRTMIN+15 and SIGRTMAX-14 to SIGRTMAX-1
/// lie between them.
const RTMIN: i32 = 35;
const RTMAX: i32 = 65;

/// The name of a number of the enum. `None` for `RUNTIME_DEFAULT`, 0, which older runtimes leave out.
fn name(number: i32) -> Option<String> {
    match number {
        RTMIN..=50 => Some(format!("SIGRTMIN+{}", number - RTMIN)),
        51..=RTMAX => Some(format!("SIGRTMAX-{}", RTMAX - number)),
        _ => {
            let index = usize::try_from(number.checked_sub(1)?).ok()?;
            NAMES.get(index).map(ToString::to_string)
        }
    }
}

impl Cri {
    /// The name of the signal that the runtime will send to stop this container; `None` if it does not report it.
    ///
    /// # Errors
    /// [`CriError`] if the call fails, also if there is no such container.
    pub(crate) async fn stop_signal(&self, id: &ContainerId) -> Result<Option<String>, CriError> {
        let mut client = Grpc::new(self.channel.clone()).max_decoding_message_size(MESSAGE_LIMIT);
        let request = ContainerStatusRequest {
            container_id: id.as_str().into(),
            verbose: false,
        };
        let call = async {
            let ready = client.ready().await;
            ready.map_err(|e| tonic::Status::unknown(e.to_string()))?;
            let path = PathAndQuery::from_static("/runtime.v1.RuntimeService/ContainerStatus");
            let codec = ProstCodec::<ContainerStatusRequest, Response>::default();
            client
                .unary(tonic::Request::new(request), path, codec)
                .await
        };
        match timeout(CALL_TIMEOUT, call).await {
            Err(_) => Err(self.timed_out(CALL, CALL_TIMEOUT)),
            Ok(Err(status)) => Err(self.failed(CALL, status)),
            Ok(Ok(answer)) => {
                let status = answer.into_inner().status;
                Ok(status.and_then(|status| name(status.stop_signal)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::linux::signal_handling::signal_number;

    #[test]
    fn the_numbers_of_the_cri_are_not_those_of_the_kernel() {
        let kernels = |number| signal_number(&name(number).unwrap()).unwrap();
        assert_eq!(kernels(10), 2, "SIGINT");
        assert_eq!(kernels(18), 3, "SIGQUIT");
        assert_eq!(kernels(23), 15, "SIGTERM");
        assert_eq!(kernels(32), 28, "SIGWINCH");
        assert_eq!(kernels(38), 37, "SIGRTMIN+3");
        assert_eq!(kernels(51), 50, "SIGRTMAX-14");
        assert_eq!(kernels(65), 64, "SIGRTMAX");
        for number in 1..=65 {
            assert!(signal_number(&name(number).unwrap()).is_some(), "{number}");
        }
        assert_eq!((name(0), name(-1), name(66)), (None, None, None));
    }

    #[test]
    fn the_field_is_read_beside_those_of_the_generated_client() {
        // ContainerStatusResponse { status: { id: "c1", stop_signal: SIGQUIT } }
        let bytes = [0x0a, 7, 0x0a, 2, b'c', b'1', 0x98, 0x01, 18];
        let response = Response::decode(&bytes[..]).unwrap();
        assert_eq!(response.status.unwrap().stop_signal, 18);
        let known = k8s_cri::v1::ContainerStatusResponse::decode(&bytes[..]).unwrap();
        assert_eq!(known.status.unwrap().id, "c1");
    }
}
