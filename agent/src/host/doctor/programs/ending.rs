//! Follows a signal from a container's main process to the one that acts on it.

use ebb_core::notification::StopSignal;

use super::{
    kind::{Kind, Runtime, kind},
    process::Process,
    servers::{Reaction, Server},
};
use crate::linux::signal_handling::SignalEffect;

/// SIGKILL and SIGQUIT.
const KILL: u32 = 9;
const QUIT: u32 = 3;

/// What a signal to a container's main process leads to.
#[derive(Clone, Copy, Debug)]
pub(super) enum ProgramEnding {
    /// The reaction of a known server.
    Server(&'static Server, Reaction),
    /// The program has a handler. ebb cannot see what the handler does.
    Handled,
    /// The language runtime catches it, whether or not the program has a handler.
    Runtime(Runtime),
    /// A Go program prints its goroutines, and exits.
    Dumps,
    /// A shell has a trap for it.
    Trapped,
    /// A shell does not pass it on.
    NotPassedOn,
    /// It ends the shell below an init, and the end of the shell ends the container.
    EndsShell,
    /// The program does not act on it.
    RunsOn,
    /// It ends the program at once.
    Ends,
}

/// An ending, and the process that decides it.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndingVerdict<'a> {
    pub(super) ending: ProgramEnding,
    pub(super) process: &'a Process,
    /// The init, or the server's start script, that has passed the signal on.
    pub(super) init: Option<&'a Process>,
}

impl ProgramEnding {
    /// Whether requests under way are finished, as far as ebb can tell.
    pub(super) const fn is_good(self) -> bool {
        matches!(self, Self::Handled | Self::Server(_, Reaction::Drains))
    }

    /// Whether that depends on what ebb can't see.
    pub(super) const fn is_unknown(self) -> bool {
        matches!(self, Self::Runtime(_) | Self::Trapped)
    }
}

/// The signal by which the program drains: a known server's, else SIGTERM. `None` if no signal drains the server.
pub(super) fn draining(process: &Process) -> Option<StopSignal> {
    match kind(process) {
        Kind::Server(server) => server.draining(process).map(|(signal, _)| signal),
        _ => Some(StopSignal::Term),
    }
}

/// What the signal does if it is sent to this process.
pub(super) fn verdict(process: &Process, signal: u32) -> EndingVerdict<'_> {
    follow(process, signal, None)
}

fn follow<'a>(process: &'a Process, signal: u32, init: Option<&'a Process>) -> EndingVerdict<'a> {
    let at = |ending| EndingVerdict {
        ending,
        process,
        init,
    };
    if signal == KILL {
        return at(ProgramEnding::Ends);
    }
    let effect = process.signals.effect(signal);
    match kind(process) {
        // Between two waits, an init waits for no signal and blocks all.
        Kind::Init if effect == SignalEffect::Caught || process.signals.blocks(signal) => {
            let children = process.children.iter();
            // Helpers of s6 such as s6-ipcserverd.
            let children = children.filter(|child| {
                matches!(kind(child), Kind::Init) || !child.program.starts_with("s6-")
            });
            let verdicts = children.map(|child| follow(child, signal, Some(process)));
            // An init with several children passes the signal to all, or its end ends the others.
            let worst = verdicts.max_by_key(|v| match v.ending {
                ending if ending.is_good() => 0,
                ending if ending.is_unknown() => 1,
                _ => 2,
            });
            worst.unwrap_or_else(|| at(ProgramEnding::Handled))
        }
        Kind::Shell if !process.children.is_empty() => match effect {
            SignalEffect::Caught => match started(process) {
                Some(server) => follow(server, signal, Some(process)),
                None => at(ProgramEnding::Trapped),
            },
            SignalEffect::None => at(ProgramEnding::NotPassedOn),
            SignalEffect::Ends => at(ProgramEnding::EndsShell),
        },
        kind => at(match effect {
            SignalEffect::None => ProgramEnding::RunsOn,
            SignalEffect::Ends => ProgramEnding::Ends,
            SignalEffect::Caught => caught(kind, process, signal),
        }),
    }
}

/// The server whose start script this shell is.
fn started(shell: &Process) -> Option<&Process> {
    shell.children.iter().find(|child| match kind(child) {
        Kind::Server(server) => server.is_start_script(&shell.command),
        _ => false,
    })
}

fn caught(kind: Kind, process: &Process, signal: u32) -> ProgramEnding {
    match kind {
        Kind::Server(server) => match server.reaction(signal, process) {
            Some(reaction) => ProgramEnding::Server(server, reaction),
            None => ProgramEnding::Handled,
        },
        Kind::Runtime(Runtime::Go) if signal == QUIT => ProgramEnding::Dumps,
        // A handler of Python is the program's own.
        Kind::Runtime(Runtime::Python) => ProgramEnding::Handled,
        Kind::Runtime(runtime) => ProgramEnding::Runtime(runtime),
        Kind::Shell => ProgramEnding::Trapped,
        Kind::Init | Kind::Other => ProgramEnding::Handled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::doctor::programs::testing::process;

    const TERM: u64 = 1 << 14;

    fn of(process: &Process) -> ProgramEnding {
        verdict(process, 15).ending
    }

    #[test]
    fn an_inits_child_is_judged_instead() {
        let app = |caught| process("app", 7, caught);
        let init = |child: Process| process("dumb-init", 1, TERM).with_child(child);
        assert!(matches!(of(&init(app(TERM))), ProgramEnding::Handled));
        assert!(matches!(of(&init(app(0))), ProgramEnding::Ends));
        // `tini -- sh -c app`
        let shell = init(process("dash", 7, 0).with_child(process("app", 8, TERM)));
        let found = verdict(&shell, 15);
        assert!(
            matches!(found.ending, ProgramEnding::EndsShell),
            "{found:?}"
        );
        assert_eq!(found.init.unwrap().program, "dumb-init");
        // An init that does not act on the signal drops it.
        assert!(matches!(
            of(&process("dumb-init", 1, 0)),
            ProgramEnding::RunsOn
        ));
    }

    #[test]
    fn a_shell_passes_nothing_on_unless_it_has_become_the_program() {
        let app = process("app", 8, TERM);
        let shell = process("bash", 1, 0).with_child(app.clone());
        assert!(matches!(of(&shell), ProgramEnding::NotPassedOn));
        let trap = process("bash", 1, TERM).with_child(app);
        assert!(matches!(of(&trap), ProgramEnding::Trapped));
        // `exec app` leaves no shell.
        assert!(matches!(
            of(&process("app", 1, TERM)),
            ProgramEnding::Handled
        ));
    }

    #[test]
    fn a_trap_of_a_known_start_script_passes_the_signal_on() {
        let words = ["/usr/lib/erlang/erts-13.1.5/bin/beam.smp", "rabbit@web"];
        let rabbitmq = process("beam.smp", 8, TERM).with_command(&words);
        let shell = process("dash", 1, TERM).with_child(rabbitmq);
        let script = |words: &[&str]| of(&shell.clone().with_command(words));
        let known = script(&["/bin/sh", "/usr/lib/rabbitmq/bin/rabbitmq-server"]);
        assert!(
            matches!(known, ProgramEnding::Server(_, Reaction::Drops)),
            "{known:?}"
        );
        let unknown = script(&["sh", "/entrypoint.sh"]);
        assert!(matches!(unknown, ProgramEnding::Trapped), "{unknown:?}");
    }

    #[test]
    fn what_a_runtime_catches_says_nothing_about_the_program() {
        let node = of(&process("node", 1, TERM));
        assert!(
            matches!(node, ProgramEnding::Runtime(Runtime::Node)),
            "{node:?}"
        );
        let java = process("java", 1, TERM);
        assert!(matches!(of(&java), ProgramEnding::Runtime(Runtime::Java)));
        // -Xrs
        assert!(matches!(of(&process("java", 1, 0)), ProgramEnding::RunsOn));
        assert!(matches!(
            of(&process("python3.11", 1, TERM)),
            ProgramEnding::Handled
        ));
        assert!(matches!(
            of(&process("python3.11", 1, 0)),
            ProgramEnding::RunsOn
        ));
        assert!(matches!(
            of(&process("python3.11", 7, 0)),
            ProgramEnding::Ends
        ));
        let go = Process {
            is_go: true,
            ..process("app", 1, u64::MAX)
        };
        assert!(matches!(of(&go), ProgramEnding::Runtime(Runtime::Go)));
        assert!(matches!(verdict(&go, 3).ending, ProgramEnding::Dumps));
    }

    #[test]
    fn a_server_that_does_not_catch_the_signal_does_not_react() {
        let nginx = process("nginx", 1, TERM);
        assert!(matches!(
            of(&nginx),
            ProgramEnding::Server(_, Reaction::Drops)
        ));
        // HAProxy without -W has no handler for SIGTERM.
        assert!(matches!(
            of(&process("haproxy", 1, 0)),
            ProgramEnding::RunsOn
        ));
        assert!(matches!(verdict(&nginx, 9).ending, ProgramEnding::Ends));
    }
}
