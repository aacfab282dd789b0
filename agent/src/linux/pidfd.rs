//! Sends a signal to a process that is known only by its id.
//!
//! Process ids are reused, so between a check and `kill(2)` the id may become that of another process. A pidfd
//! (`pidfd_open(2)`) names one process for good. Read `/proc/PID` after opening the pidfd: if the process was reaped
//! meanwhile, sending fails. So the order is: open, check, send.

use std::io;

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

/// What became of a signal.
#[derive(Debug)]
pub(crate) enum SignalDelivery {
    Sent,
    /// The process had exited.
    Exited,
    /// It was not sent.
    Failed(io::Error),
}

/// Sends `signal` to process `pid`, if `check` finds in `/proc` that it is the process that is meant. `check` returns
/// why it is not.
pub(crate) fn send(
    pid: u32,
    signal: Signal,
    check: impl FnOnce() -> io::Result<()>,
) -> SignalDelivery {
    let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return SignalDelivery::Failed(io::ErrorKind::InvalidInput.into());
    };
    let process = match pidfd_open(id, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(Errno::SRCH) => return SignalDelivery::Exited,
        Err(e) => return SignalDelivery::Failed(e.into()),
    };
    if let Err(e) = check() {
        // The files of a process that is reaped meanwhile are gone, or can't be read any more.
        let is_gone = e.kind() == io::ErrorKind::NotFound
            || e.raw_os_error() == Some(Errno::SRCH.raw_os_error());
        return if is_gone {
            SignalDelivery::Exited
        } else {
            SignalDelivery::Failed(e)
        };
    }
    match pidfd_send_signal(&process, signal) {
        Ok(()) => SignalDelivery::Sent,
        Err(Errno::SRCH) => SignalDelivery::Exited,
        Err(e) => SignalDelivery::Failed(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::ExitStatusExt as _,
        process::{Child, Command},
    };

    use super::*;

    fn sleeper() -> Child {
        Command::new("sleep").arg("600").spawn().unwrap()
    }

    #[test]
    fn the_process_that_passes_the_check_gets_the_signal() {
        let mut child = sleeper();
        let delivery = send(child.id(), Signal::USR1, || Ok(()));
        assert!(matches!(delivery, SignalDelivery::Sent), "{delivery:?}");
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(Signal::USR1.as_raw()));
    }

    #[test]
    fn a_process_that_fails_the_check_gets_no_signal() {
        let mut child = sleeper();
        let delivery = send(child.id(), Signal::USR1, || {
            Err(io::Error::other("another container's"))
        });
        assert!(
            matches!(delivery, SignalDelivery::Failed(_)),
            "{delivery:?}"
        );
        assert_eq!(child.try_wait().unwrap(), None, "it was signaled");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// The check passes because it reads what belongs to another process by then: the process it was opened for has
    /// exited.
    #[test]
    fn a_process_that_exits_during_the_check_is_not_confused_with_another() {
        let mut child = sleeper();
        let delivery = send(child.id(), Signal::USR1, || {
            child.kill().unwrap();
            child.wait().unwrap();
            Ok(())
        });
        assert!(matches!(delivery, SignalDelivery::Exited), "{delivery:?}");
        let delivery = send(child.id(), Signal::USR1, || Ok(()));
        assert!(matches!(delivery, SignalDelivery::Exited), "{delivery:?}");
        let delivery = send(0, Signal::USR1, || Ok(()));
        assert!(
            matches!(delivery, SignalDelivery::Failed(_)),
            "{delivery:?}"
        );
    }
}
