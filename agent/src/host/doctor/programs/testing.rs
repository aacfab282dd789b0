//! Processes for tests.

use super::process::Process;
use crate::linux::signal_handling::SignalHandling;

/// A process with this pid in its PID namespace that catches these signals (bit N-1 is signal N).
pub(super) fn process(program: &str, pid: u32, caught: u64) -> Process {
    let status = format!("NSpid:\t99\t{pid}\nSigBlk:\t0\nSigIgn:\t0\nSigCgt:\t{caught:x}\n");
    Process {
        program: program.into(),
        command: vec![program.into()],
        signals: SignalHandling::parse(&status).unwrap(),
        is_go: false,
        config: String::new(),
        children: vec![],
    }
}

impl Process {
    pub(super) fn with_command(mut self, words: &[&str]) -> Self {
        self.command = words.iter().map(ToString::to_string).collect();
        self
    }

    pub(super) fn with_child(mut self, child: Self) -> Self {
        self.children.push(child);
        self
    }
}
