//! Exit statuses: one for each kind of error, for scripts and supervisors.

use std::{error::Error, io, process::ExitCode};

use ebb_core::format::one_line;
use ebb_protocol::{
    client::AgentError,
    service::{listen::ListenError, log::LogError},
};

use super::{output::OtherNamespace, wait::NotDrained};
use crate::{
    app::{run_dir::RunDirError, start::StartError},
    host::{doctor::FailedChecks, install::InstallError},
    kernel::KernelError,
    pods::cri::CriError,
};

/// The text in `ebb --help` and docs/using.md.
pub const HELP: &str = "\
Exit status:
   0  done
   1  anything not listed here
   2  wrong usage, or a value out of range
   3  not permitted: ebb needs root, or a capability is missing
   4  this kernel can't be used: no BTF, or a field or a BPF feature is missing
   5  the CRI socket can't be reached
   6  the server on the CRI socket is not a CRI v1 runtime
   7  an address, a socket path or the run directory can't be used
   8  another ebb runs here already
   9  the agent can't be reached, or is too old for the command
  10  no pod matches, or more than one does, or the pod is not draining
  11  a check of ebb doctor failed
  12  install-cri or uninstall-cri refused to go on: the error says why
  13  ebb wait: the pod has not drained: --timeout passed, or its drain ended otherwise";

/// The exit status of the first cause in the error's chain that has one, else 1.
pub fn code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(error.chain().find_map(status).unwrap_or(1))
}

/// The error on one line. Pods of which the user may choose one follow on lines of their own.
pub fn message(error: &anyhow::Error) -> String {
    let problem = error.downcast_ref().and_then(|e| match e {
        AgentError::Problem { problem, .. } => Some(problem.to_string()),
        _ => None,
    });
    problem.unwrap_or_else(|| one_line(error.as_ref()))
}

fn status(cause: &(dyn Error + 'static)) -> Option<u8> {
    if let Some(e) = cause.downcast_ref::<StartError>() {
        return match e {
            StartError::Cri(e) => Some(cri(e)),
            StartError::Kernel(e) => Some(kernel(e)),
            StartError::Listen(e) => Some(e.exit_status()),
            StartError::RunDir(e) => Some(run_dir(e)),
            StartError::CriIsProxy { .. } | StartError::Traces { .. } => Some(2),
            StartError::Port { .. } => Some(7),
            StartError::Kube(_) => None,
        };
    }
    if cause.is::<NotDrained>() {
        return Some(13);
    }
    if cause.is::<OtherNamespace>() {
        return Some(2);
    }
    if cause.is::<FailedChecks>() {
        return Some(11);
    }
    cause
        .downcast_ref()
        .map(ListenError::exit_status)
        .or_else(|| cause.downcast_ref().map(LogError::exit_status))
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
        KernelError::NoBtf { .. }
        | KernelError::TooOld { .. }
        | KernelError::NoField { .. }
        | KernelError::Refused { .. } => 4,
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

fn agent(e: &AgentError) -> Option<u8> {
    match e {
        AgentError::NotAllowed { .. } => Some(3),
        AgentError::NotRunning { .. }
        | AgentError::Connect { .. }
        | AgentError::Timeout { .. }
        | AgentError::UnknownPath { .. } => Some(9),
        AgentError::Problem { status, .. } if matches!(status.as_u16(), 404 | 409) => Some(10),
        _ => None,
    }
}

fn install(e: &InstallError) -> Option<u8> {
    match e {
        InstallError::Refused(_) | InstallError::Conflict(_) => Some(12),
        InstallError::Io { source, .. } if is_permission(source) => Some(3),
        // The next cause in the chain decides.
        InstallError::Io { .. }
        | InstallError::Systemctl { .. }
        | InstallError::NoAnswer(_)
        | InstallError::NoRuntime(_) => None,
        // It is boxed, so the chain does not show its type.
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
    fn each_kind_of_error_has_its_status_also_below_a_context() {
        let not_permitted = || anyhow::Error::from(KernelError::NotPermitted);
        assert_eq!(code(&not_permitted()), ExitCode::from(3));
        assert_eq!(code(&not_permitted().context("x")), ExitCode::from(3));
        let running = StartError::from(RunDirError::Taken { lock: "/x".into() });
        assert_eq!(code(&running.into()), ExitCode::from(8));
        assert_eq!(code(&anyhow::anyhow!("x")), ExitCode::from(1));
        let too_old = AgentError::UnknownPath {
            path: "/v1/advice".into(),
        };
        assert_eq!(code(&too_old.into()), ExitCode::from(9));
    }
}
