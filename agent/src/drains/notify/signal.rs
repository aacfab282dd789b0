//! Finds the processes of a container that get the signal, and sends it. Blocking, like all file access.

use std::{fs, io, path::PathBuf};

use ebb_core::{
    ids::ContainerId,
    notification::{SignalOutcome, SignalReport, SignalTarget, StopSignal},
};
use rustix::process::Signal;

use crate::{
    linux::{
        pidfd::{SignalDelivery, send},
        processes::{children, live_parent},
        signal_handling::{SignalEffect, SignalHandling},
    },
    pods::cgroup::is_in_container,
};

/// How many processes of a container are reported. All of them get the signal.
const REPORTED: usize = 64;

/// A container and its main process, by the runtime.
pub(super) struct SignaledContainer {
    /// `/proc` of the node's PID namespace.
    pub(super) proc: PathBuf,
    pub(super) container: ContainerId,
    pub(super) name: String,
    pub(super) pid: u32,
}

impl SignaledContainer {
    /// Sends the signal to the main process or to its children.
    pub(super) fn send(&self, signal: StopSignal, to: SignalTarget) -> Vec<SignalReport> {
        if to == SignalTarget::Main {
            return vec![self.send_to(self.pid, None, signal)];
        }
        let children = match children(&self.proc, self.pid) {
            Ok(children) if children.is_empty() => Err("its main process has no children".into()),
            Ok(children) => Ok(children),
            Err(e) => Err(format!(
                "can't list the children of process {}: {e}",
                self.pid
            )),
        };
        match children {
            Ok(children) => {
                let sent = children.into_iter();
                let mut sent: Vec<_> = sent
                    .map(|child| self.send_to(child, Some(self.pid), signal))
                    .collect();
                sent.truncate(REPORTED);
                sent
            }
            Err(why) => vec![self.report(None, signal, SignalOutcome::Failed, Some(why))],
        }
    }

    fn send_to(&self, pid: u32, parent: Option<u32>, signal: StopSignal) -> SignalReport {
        let handling = SignalHandling::of(&self.proc, pid);
        let delivery = send(pid, raw(signal), || self.check(pid, parent));
        let (outcome, detail) = match delivery {
            SignalDelivery::Sent => {
                let effect = handling.map(|h| h.effect(signal.number()));
                let ignored = effect == Some(SignalEffect::None);
                let outcome = if ignored {
                    SignalOutcome::Ignored
                } else {
                    SignalOutcome::Sent
                };
                (outcome, None)
            }
            SignalDelivery::Exited => (SignalOutcome::Exited, None),
            SignalDelivery::Failed(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                let why = "not permitted: it runs as another user, and the agent lacks CAP_KILL";
                (SignalOutcome::Failed, Some(why.to_owned()))
            }
            SignalDelivery::Failed(e) => (SignalOutcome::Failed, Some(e.to_string())),
        };
        self.report(Some(pid), signal, outcome, detail)
    }

    /// Requires that process `pid` is in the container's cgroup, and a child of `parent`. An error of kind NotFound
    /// says that it has exited.
    fn check(&self, pid: u32, parent: Option<u32>) -> io::Result<()> {
        let cgroup = fs::read_to_string(self.file(pid, "cgroup"))?;
        if !is_in_container(&cgroup, &self.container) {
            return Err(io::Error::other(format!(
                "process {pid} is not in the cgroup of the container"
            )));
        }
        if let Some(parent) = parent {
            let stat = fs::read_to_string(self.file(pid, "stat"))?;
            if live_parent(&stat) != Some(parent) {
                return Err(io::ErrorKind::NotFound.into());
            }
        }
        Ok(())
    }

    fn file(&self, pid: u32, name: &str) -> PathBuf {
        self.proc.join(pid.to_string()).join(name)
    }

    fn report(
        &self,
        pid: Option<u32>,
        signal: StopSignal,
        outcome: SignalOutcome,
        detail: Option<String>,
    ) -> SignalReport {
        SignalReport {
            container: self.name.clone(),
            signal,
            pid,
            outcome,
            detail,
        }
    }
}

const fn raw(signal: StopSignal) -> Signal {
    match signal {
        StopSignal::Hup => Signal::HUP,
        StopSignal::Int => Signal::INT,
        StopSignal::Quit => Signal::QUIT,
        StopSignal::Usr1 => Signal::USR1,
        StopSignal::Usr2 => Signal::USR2,
        StopSignal::Term => Signal::TERM,
        StopSignal::Winch => Signal::WINCH,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::ExitStatusExt as _,
        process::{Child, Command},
    };

    use super::*;

    fn child() -> Child {
        Command::new("sleep").arg("600").spawn().unwrap()
    }

    fn target(pid: u32, container: &str) -> SignaledContainer {
        SignaledContainer {
            proc: "/proc".into(),
            container: ContainerId::new(container),
            name: "web".into(),
            pid,
        }
    }

    /// A `/proc` in which these processes are in the container's cgroup.
    fn proc_with(processes: &[u32], container: &str) -> tempfile::TempDir {
        let proc = tempfile::tempdir().unwrap();
        for pid in processes {
            let dir = proc.path().join(pid.to_string());
            fs::create_dir(&dir).unwrap();
            let cgroup = format!("0::/../kubepods/podu1/{container}/init\n");
            fs::write(dir.join("cgroup"), cgroup).unwrap();
            for file in ["stat", "status"] {
                fs::copy(format!("/proc/{pid}/{file}"), dir.join(file)).unwrap();
            }
        }
        proc
    }

    #[test]
    fn a_process_outside_of_the_containers_cgroup_gets_no_signal() {
        let mut other = child();
        for to in [SignalTarget::Main, SignalTarget::Children] {
            let pid = match to {
                SignalTarget::Main => other.id(),
                SignalTarget::Children => std::process::id(),
            };
            let reports = target(pid, "0123456789abcdef").send(StopSignal::Usr1, to);
            let of_it = reports.iter().find(|r| r.pid == Some(other.id())).unwrap();
            assert_eq!(of_it.outcome, SignalOutcome::Failed);
            assert!(of_it.detail.as_ref().unwrap().contains("not in the cgroup"));
        }
        assert_eq!(other.try_wait().unwrap(), None, "it was signaled");
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn a_process_in_the_containers_cgroup_gets_the_signal() {
        let mut own = child();
        let proc = proc_with(&[own.id()], "c1ff");
        let target = SignaledContainer {
            proc: proc.path().to_owned(),
            ..target(own.id(), "c1ff")
        };
        let reports = target.send(StopSignal::Usr1, SignalTarget::Main);
        assert_eq!(reports.len(), 1);
        assert_eq!(reports[0].outcome, SignalOutcome::Sent, "{reports:?}");
        assert_eq!(own.wait().unwrap().signal(), Some(10));
        // The files of /proc are unchanged, but its id is free now.
        let reports = target.send(StopSignal::Usr1, SignalTarget::Main);
        assert_eq!(reports[0].outcome, SignalOutcome::Exited);
    }

    #[test]
    fn of_the_children_only_those_in_the_containers_cgroup_get_the_signal() {
        let (mut own, mut other) = (child(), child());
        let proc = proc_with(&[own.id(), other.id()], "c1ff");
        let cgroup = proc.path().join(other.id().to_string()).join("cgroup");
        fs::write(cgroup, "0::/kubepods/podu1/c2ff\n").unwrap();
        let target = SignaledContainer {
            proc: proc.path().to_owned(),
            ..target(std::process::id(), "c1ff")
        };
        let reports = target.send(StopSignal::Usr1, SignalTarget::Children);
        let outcome = |pid| {
            let report = reports.iter().find(|r| r.pid == Some(pid));
            report.map(|r| r.outcome)
        };
        assert_eq!(outcome(own.id()), Some(SignalOutcome::Sent));
        assert_eq!(outcome(other.id()), Some(SignalOutcome::Failed));
        assert_eq!(own.wait().unwrap().signal(), Some(10));
        assert_eq!(other.try_wait().unwrap(), None, "it was signaled");
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn a_container_without_children_says_so() {
        let mut alone = child();
        let reports = target(alone.id(), "x").send(StopSignal::Term, SignalTarget::Children);
        assert_eq!(reports.len(), 1);
        assert!(reports[0].to_string().contains("has no children"));
        alone.kill().unwrap();
        alone.wait().unwrap();
    }
}
