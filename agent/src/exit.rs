//! Exit statuses: one for each kind of trouble, so that scripts and supervisors can tell.

use std::{error::Error, io, process::ExitCode};

use crate::{
    api::client::AgentError,
    host::{doctor::Failing, install::InstallError},
    kernel::KernelError,
    listen::ListenError,
    pods::cri::CriError,
    run_dir::RunDirError,
    start::StartError,
};

/// For `ebb --help` and the README.
pub const HELP: &str = "\
Exit status:
   0  done
   1  anything not listed here
   2  wrong usage, or a value out of range
   3  not permitted: ebb needs root, or a capability is missing
   4  this kernel can't be used: no BTF, or a field or a BPF feature is missing
   5  the CRI socket can't be reached
   6  what answers on the CRI socket is not a CRI v1 runtime
   7  an address, a socket path or the run directory can't be had
   8  another ebb runs here already
   9  the agent can't be reached
  10  no such pod, more than one, or none that drains
  11  ebb doctor found something that fails
  12  install-cri or uninstall-cri changed nothing more: the reason is said";

/// The exit status for an error: of the first cause in its chain that has one.
pub fn code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(error.chain().find_map(status).unwrap_or(1))
}

fn status(cause: &(dyn Error + 'static)) -> Option<u8> {
    if let Some(e) = cause.downcast_ref::<StartError>() {
        return match e {
            StartError::Cri(e) => Some(cri(e)),
            StartError::Kernel(e) => Some(kernel(e)),
            StartError::Listen(e) => Some(listen(e)),
            StartError::RunDir(e) => Some(run_dir(e)),
            StartError::Port { .. } => Some(7),
            StartError::Kube(_) => None,
        };
    }
    if cause.is::<Failing>() {
        return Some(11);
    }
    cause
        .downcast_ref()
        .map(listen)
        .or_else(|| cause.downcast_ref().map(run_dir))
        .or_else(|| cause.downcast_ref().map(cri))
        .or_else(|| cause.downcast_ref().map(kernel))
        .or_else(|| cause.downcast_ref().and_then(agent))
        .or_else(|| cause.downcast_ref().and_then(install))
}

fn cri(e: &CriError) -> u8 {
    match e {
        CriError::Permission { .. } => 3,
        CriError::NotCri { .. } | CriError::WrongVersion { .. } => 6,
        CriError::Unreachable { .. } | CriError::Timeout { .. } | CriError::Failed { .. } => 5,
    }
}

fn kernel(e: &KernelError) -> u8 {
    match e {
        KernelError::NotPermitted => 3,
        KernelError::NoBtf { .. } | KernelError::NoField { .. } | KernelError::Refused { .. } => 4,
        KernelError::Io { source, .. } if is_permission(source) => 3,
        KernelError::Io { .. } => 1,
    }
}

fn run_dir(e: &RunDirError) -> u8 {
    match e {
        RunDirError::Taken { .. } => 8,
        RunDirError::Unusable { source, .. } if is_permission(source) => 3,
        RunDirError::Unusable { .. } => 7,
    }
}

const fn listen(e: &ListenError) -> u8 {
    match e {
        ListenError::AlreadyServed(_) | ListenError::Busy(_) => 8,
        ListenError::NotASocket(_)
        | ListenError::Io { .. }
        | ListenError::NotAListener(_)
        | ListenError::TooMany(_) => 7,
    }
}

fn agent(e: &AgentError) -> Option<u8> {
    match e {
        AgentError::NotAllowed { .. } => Some(3),
        AgentError::NotRunning { .. } | AgentError::Connect { .. } | AgentError::Timeout { .. } => {
            Some(9)
        }
        AgentError::Refused { status, .. } if matches!(status.as_u16(), 404 | 409) => Some(10),
        _ => None,
    }
}

fn install(e: &InstallError) -> Option<u8> {
    match e {
        InstallError::Refused(_) | InstallError::Conflict(_) => Some(12),
        InstallError::Io { source, .. } if is_permission(source) => Some(3),
        // The cause says more.
        InstallError::Io { .. } | InstallError::Systemctl { .. } | InstallError::NoAnswer(_) => {
            None
        }
        // Boxed, so it is not seen in the chain.
        InstallError::Unfinished(why) => install(why),
    }
}

fn is_permission(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::PermissionDenied
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_trouble_has_its_status_also_below_a_context() {
        let not_permitted = || anyhow::Error::from(KernelError::NotPermitted);
        assert_eq!(code(&not_permitted()), ExitCode::from(3));
        assert_eq!(code(&not_permitted().context("x")), ExitCode::from(3));
        let running = StartError::from(RunDirError::Taken { lock: "/x".into() });
        assert_eq!(code(&running.into()), ExitCode::from(8));
        assert_eq!(code(&anyhow::anyhow!("x")), ExitCode::from(1));
    }
}
