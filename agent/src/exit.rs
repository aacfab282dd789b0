//! Exit statuses: one for each kind of trouble, so that scripts and supervisors can tell.

use std::process::ExitCode;

use crate::{
    api::client::ClientError,
    hold::cri_proxy::listen::ListenError,
    kernel::KernelError,
    pods::{cri::CriError, table::FindError},
    serve::StartError,
};

/// For `ebb --help` and the README.
pub const HELP: &str = "\
Exit status:
   0  done
   1  anything not listed here
   2  wrong usage, or a value out of range
   3  not permitted: ebb needs root, or a capability is missing
   4  this kernel can't be used (no BTF, a field or a BPF feature is missing)
   5  the CRI socket can't be reached
   6  what answers on the CRI socket is not a CRI v1 runtime
   7  an address or a port is in use, or not to be had
   8  another ebb runs here already
   9  the agent can't be reached
  10  no such pod, or more than one";

/// The exit status for an error, by the first cause that has one.
pub fn code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(error.chain().find_map(status).unwrap_or(1))
}

fn status(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(e) = cause.downcast_ref::<KernelError>() {
        return Some(match e {
            KernelError::NotPermitted => 3,
            KernelError::NoBtf { .. } | KernelError::NoField { .. } | KernelError::Refused { .. } => 4,
            KernelError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => 3,
            KernelError::Io { .. } => 1,
        });
    }
    None
}
