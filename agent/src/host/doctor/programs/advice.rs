//! The finding about a container's stop: what happens, which requests that costs, and the change to make.

use ebb_core::notification::{SignalTarget, StopSignal};

use super::{
    ending::{EndingVerdict, ProgramEnding, verdict},
    kind::Runtime,
    process::Process,
    servers::Reaction,
};
use crate::{
    host::doctor::{Check, CheckStatus},
    linux::signal_handling::{signal_name, signal_number},
};

/// Where a container's stop signal comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::host::doctor) enum SignalSource {
    /// `lifecycle.stopSignal` in the pod's spec (KEP-4960).
    Pod,
    /// STOPSIGNAL of the image.
    Image,
    /// The runtime's default.
    Default,
}

#[derive(Clone, Debug)]
pub(in crate::host::doctor) struct StopFacts {
    pub(in crate::host::doctor) container: String,
    /// Whether the pod has other containers, which would get an annotation's signal, too.
    pub(in crate::host::doctor) has_siblings: bool,
    /// Its main process; `None` if it is not visible.
    pub(in crate::host::doctor) process: Option<Process>,
    /// The stop signal, as the image or the runtime names it.
    pub(in crate::host::doctor) signal: String,
    pub(in crate::host::doctor) source: SignalSource,
    /// The signal that ebb sends before the stop (`ebb.dev/stop-signal`), and to which processes.
    pub(in crate::host::doctor) annotated_signal: Option<StopSignal>,
    pub(in crate::host::doctor) annotated_target: SignalTarget,
}

const CUTS: &str = "requests that are still under way when the stop arrives are cut";
const KILLED: &str = "it is killed at the end of the grace period: each stop takes the whole grace period, and \
                      requests that are under way then are cut";

/// Whether the container ends without cutting requests off.
pub(in crate::host::doctor) fn check(facts: &StopFacts) -> Check {
    let name = format!("container {}", facts.container);
    let new = |status, what: String| Check::new(&name, status, what);
    let Some(process) = &facts.process else {
        return new(
            CheckStatus::Warn,
            "its main process is not visible from here".into(),
        );
    };
    let annotated = facts.annotated_signal;
    if let Some(check) = annotated.and_then(|signal| check_of_annotation(facts, process, signal)) {
        return check;
    }
    let Some(number) = signal_number(&facts.signal) else {
        return new(
            CheckStatus::Warn,
            format!("ebb does not know its stop signal {:?}", facts.signal),
        );
    };
    let found = verdict(process, number);
    let source = match facts.source {
        SignalSource::Pod => "the stopSignal of its pod",
        SignalSource::Image => "the STOPSIGNAL of its image",
        SignalSource::Default => "the runtime's default",
    };
    let what = format!("{} ({source})", what(&found, number));
    explained(new(status(found.ending), what), facts, &found, number)
}

/// The check by the signal that ebb sends first; `None` if ebb sends none that is known to work or to do harm.
fn check_of_annotation(facts: &StopFacts, process: &Process, signal: StopSignal) -> Option<Check> {
    let name = format!("container {}", facts.container);
    let number = signal.number();
    let targets = match facts.annotated_target {
        SignalTarget::Main => std::slice::from_ref(process),
        SignalTarget::Children => &process.children,
    };
    let found = targets.iter().map(|target| verdict(target, number));
    let rank = |v: &EndingVerdict<'_>| (!v.ending.is_good(), !v.ending.is_unknown());
    let found = found.max_by_key(rank)?;
    let what = what(&found, number);
    let detail = format!("before its stop, ebb sends it {signal}: {what}");
    let check = Check::new(&name, status(found.ending), detail);
    match found.ending {
        // Not the signal that matters: the stop signal comes next.
        ProgramEnding::RunsOn | ProgramEnding::NotPassedOn => None,
        _ => Some(explained(check, facts, &found, number)),
    }
}

const fn status(ending: ProgramEnding) -> CheckStatus {
    if ending.is_good() {
        CheckStatus::Ok
    } else if ending.is_unknown() {
        CheckStatus::Unknown
    } else {
        CheckStatus::Warn
    }
}

/// What happens on the signal.
fn what(found: &EndingVerdict<'_>, signal: u32) -> String {
    let program = &found.process.program;
    let signal = signal_name(signal);
    let child = || {
        let child = found.process.children.first();
        child.map_or("its child", |c| c.program.as_str())
    };
    let by = found.init.map_or(String::new(), |init| {
        format!("{} passes {signal} on, and ", init.program)
    });
    match found.ending {
        ProgramEnding::Server(server, reaction) => {
            let name = server.name;
            match reaction {
                Reaction::Drains => {
                    format!("{by}{name} finishes its requests on {signal}, then exits")
                }
                Reaction::Drops => format!("{by}{name} closes its connections at once on {signal}"),
                Reaction::WaitsForClients => {
                    format!(
                        "{by}{name} waits on {signal} until its clients have left, also the idle ones"
                    )
                }
                Reaction::Restarts => format!("{by}{name} restarts on {signal} and runs on"),
            }
        }
        ProgramEnding::Handled => format!("{by}{program} handles {signal}"),
        ProgramEnding::Runtime(runtime) => format!(
            "{by}{program} runs on {}, which catches {signal} whether or not the program handles it: ebb can't tell",
            runtime_name(runtime)
        ),
        ProgramEnding::Dumps => {
            format!("{by}{program} is a Go program: on {signal} it prints its goroutines and exits")
        }
        ProgramEnding::Trapped => {
            format!(
                "{by}the shell {program} traps {signal}: ebb can't tell whether it passes it on to {}",
                child()
            )
        }
        ProgramEnding::NotPassedOn => format!(
            "the shell {program} does not pass {signal} on to {}",
            child()
        ),
        ProgramEnding::EndsShell => {
            format!(
                "{by}that ends the shell {program}, and with it the container: {} gets no signal",
                child()
            )
        }
        ProgramEnding::RunsOn => format!("{by}{program} does not handle {signal}, and runs on"),
        ProgramEnding::Ends if signal == "SIGKILL" => format!("{signal} ends {program} at once"),
        ProgramEnding::Ends => format!("{by}{program} does not handle {signal}, and ends at once"),
    }
}

const fn runtime_name(runtime: Runtime) -> &'static str {
    match runtime {
        Runtime::Node => "Node",
        Runtime::Java => "Java",
        Runtime::Python => "Python",
        Runtime::Ruby => "Ruby",
        Runtime::Go => "Go",
    }
}

/// Adds why that costs requests, and the change to make.
fn explained(check: Check, facts: &StopFacts, found: &EndingVerdict<'_>, signal: u32) -> Check {
    if found.ending.is_good() {
        return check;
    }
    check
        .because(why(found))
        .change(change(facts, found, signal))
}

fn why(found: &EndingVerdict<'_>) -> &'static str {
    match found.ending {
        ProgramEnding::Runtime(Runtime::Node) if found.process.signals.is_first => {
            "without a handler of the program's own, the kernel drops the signal to the first process of a container, \
             which is then killed at the end of the grace period"
        }
        ProgramEnding::Runtime(Runtime::Java) => {
            "Java exits as soon as its shutdown hooks have run; without one, it cuts requests under way"
        }
        ProgramEnding::Runtime(_) => {
            "without a handler of the program's own, it ends at once and cuts requests under way"
        }
        ProgramEnding::Trapped => "a trap runs only when the command in the foreground has ended",
        ProgramEnding::Server(_, Reaction::WaitsForClients) => {
            "connection pools keep idle connections open, so it is killed at the end of the grace period, and has to \
             recover when it starts again"
        }
        ProgramEnding::RunsOn
        | ProgramEnding::NotPassedOn
        | ProgramEnding::Server(_, Reaction::Restarts) => KILLED,
        _ => CUTS,
    }
}

fn change(facts: &StopFacts, found: &EndingVerdict<'_>, signal: u32) -> String {
    let signal = signal_name(signal);
    match found.ending {
        ProgramEnding::Server(server, _) => {
            let Some((draining, lacks)) = server.draining(found.process) else {
                return server.instead.unwrap_or_default().into();
            };
            let of_signal = (draining.name() != signal).then(|| use_signal(facts, draining));
            let of_setting = lacks.map(|need| need.change().to_owned());
            let changes: Vec<_> = of_setting.into_iter().chain(of_signal).collect();
            changes.join("; and ")
        }
        ProgramEnding::NotPassedOn => {
            let exec = "start the program by `exec` in the shell's script";
            let children = found.process.children.iter();
            // ebb can signal the program without the shell, if the program acts on the signal.
            let mut signals = children.filter_map(|child| {
                let draining = super::ending::draining(child)?;
                let ending = verdict(child, draining.number()).ending;
                (ending.is_good() || ending.is_unknown()).then_some(draining)
            });
            match signals.next_back() {
                Some(signal) => format!(
                    "{exec}, or annotate the pod with {} and ebb.dev/stop-signal-to: children",
                    annotation(facts, signal)
                ),
                None => format!("{exec}, and handle {signal} there"),
            }
        }
        ProgramEnding::EndsShell => "start the program by `exec` in the shell's script".into(),
        ProgramEnding::Trapped => {
            "let the trap signal the program, and run the program in the background: `app & wait`".into()
        }
        ProgramEnding::Runtime(runtime) => match runtime {
            Runtime::Node => format!("check that the program has process.on('{signal}', …) that closes its server"),
            Runtime::Java => {
                "check that a shutdown hook waits for requests (Spring Boot: server.shutdown=graceful)".into()
            }
            Runtime::Go => {
                format!("check that the program has signal.Notify for {signal}, and calls http.Server.Shutdown")
            }
            Runtime::Ruby => format!("check that the program, or its server, has trap('{signal}')"),
            Runtime::Python => format!("check that the program handles {signal}"),
        },
        ProgramEnding::Dumps => "use SIGTERM as its stop signal".into(),
        ProgramEnding::RunsOn | ProgramEnding::Ends if signal == "SIGKILL" => "use SIGTERM as its stop signal".into(),
        ProgramEnding::RunsOn | ProgramEnding::Ends => match super::ending::draining(found.process) {
            Some(draining) if verdict(found.process, draining.number()).ending.is_good() => {
                use_signal(facts, draining)
            }
            _ => format!("handle {signal} in the program: finish the requests, then exit"),
        },
        ProgramEnding::Handled => String::new(),
    }
}

fn use_signal(facts: &StopFacts, signal: StopSignal) -> String {
    format!(
        "set STOPSIGNAL {signal} in its image or stopSignal: {signal} in its lifecycle (Kubernetes 1.33), or annotate \
         the pod with {}",
        annotation(facts, signal)
    )
}

fn annotation(facts: &StopFacts, signal: StopSignal) -> String {
    match facts.has_siblings {
        true => format!("ebb.dev/stop-signal: {}={signal}", facts.container),
        false => format!("ebb.dev/stop-signal: {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::doctor::programs::testing::process;

    const TERM: u64 = 1 << 14;
    const QUIT: u64 = 1 << 2;

    fn facts(process: Process, signal: &str) -> StopFacts {
        StopFacts {
            container: "app".into(),
            has_siblings: false,
            process: Some(process),
            signal: signal.into(),
            source: SignalSource::Image,
            annotated_signal: None,
            annotated_target: SignalTarget::Main,
        }
    }

    fn says(process: Process, signal: &str) -> (CheckStatus, String) {
        let check = check(&facts(process, signal));
        let parts = [Some(check.detail), check.why, check.change];
        (
            check.status,
            parts.map(Option::unwrap_or_default).join("; "),
        )
    }

    #[test]
    fn a_main_process_without_a_handler_is_pointed_out() {
        let (status, text) = says(process("app", 1, TERM), "SIGTERM");
        assert_eq!(status, CheckStatus::Ok, "{text}");
        let (status, text) = says(process("app", 1, TERM), "SIGQUIT");
        assert_eq!(status, CheckStatus::Warn);
        assert!(
            text.contains("does not handle SIGQUIT, and runs on"),
            "{text}"
        );
        assert!(text.contains("the whole grace period"), "{text}");
        let (status, text) = says(process("app", 7, 0), "SIGTERM");
        assert_eq!(status, CheckStatus::Warn);
        assert!(text.contains("ends at once"), "{text}");
        let (status, text) = says(process("app", 1, TERM), "SIGKILL");
        assert_eq!(status, CheckStatus::Warn);
        assert!(text.contains("use SIGTERM"), "{text}");
        let (status, _) = says(process("app", 1, TERM), "SIGNONSENSE");
        assert_eq!(status, CheckStatus::Warn);
    }

    #[test]
    fn a_server_is_told_its_draining_signal() {
        let nginx = || process("nginx", 1, TERM | QUIT);
        assert_eq!(says(nginx(), "SIGQUIT").0, CheckStatus::Ok);
        let (status, text) = says(nginx(), "SIGTERM");
        assert_eq!(status, CheckStatus::Warn);
        assert!(text.contains("STOPSIGNAL SIGQUIT"), "{text}");
        assert!(text.contains("ebb.dev/stop-signal: SIGQUIT"), "{text}");
        let mut of_two = facts(nginx(), "SIGTERM");
        of_two.has_siblings = true;
        let change = check(&of_two).change.unwrap();
        assert!(
            change.contains("ebb.dev/stop-signal: app=SIGQUIT"),
            "{change}"
        );
        of_two.annotated_signal = Some(StopSignal::Quit);
        assert_eq!(check(&of_two).status, CheckStatus::Ok);
        of_two.annotated_signal = Some(StopSignal::Term);
        let harmful = check(&of_two);
        assert_eq!(harmful.status, CheckStatus::Warn);
        assert!(
            harmful
                .detail
                .contains("before its stop, ebb sends it SIGTERM")
        );
        // HAProxy without -W drops SIGTERM, and drains on SIGUSR1.
        let (_, text) = says(process("haproxy", 1, 1 << 9), "SIGTERM");
        assert!(text.contains("ebb.dev/stop-signal: SIGUSR1"), "{text}");
        // The signal is right, and the setting is not.
        let (_, text) = says(process("php-fpm8.2", 1, TERM | QUIT), "SIGQUIT");
        assert!(text.contains("process_control_timeout"), "{text}");
        assert!(!text.contains("STOPSIGNAL SIGQUIT in"), "{text}");
    }

    #[test]
    fn a_shells_child_can_be_told_without_a_change_of_the_image() {
        let shell = |child| process("dash", 1, 0).with_child(child);
        let (status, text) = says(shell(process("app", 7, TERM)), "SIGTERM");
        assert_eq!(status, CheckStatus::Warn);
        assert!(text.contains("`exec`"), "{text}");
        assert!(
            text.contains("ebb.dev/stop-signal: SIGTERM and ebb.dev/stop-signal-to: children"),
            "{text}"
        );
        let (_, text) = says(shell(process("nginx", 7, TERM | QUIT)), "SIGTERM");
        assert!(text.contains("ebb.dev/stop-signal: SIGQUIT and"), "{text}");
        // It would end at once.
        let (_, text) = says(shell(process("app", 7, 0)), "SIGTERM");
        assert!(!text.contains("ebb.dev"), "{text}");
        let mut annotated = facts(shell(process("app", 7, TERM)), "SIGTERM");
        annotated.annotated_signal = Some(StopSignal::Term);
        assert_eq!(
            check(&annotated).status,
            CheckStatus::Warn,
            "the shell gets it"
        );
        annotated.annotated_target = SignalTarget::Children;
        assert_eq!(check(&annotated).status, CheckStatus::Ok);
    }

    #[test]
    fn what_cannot_be_seen_is_said_to_be_unknown() {
        let (status, text) = says(process("node", 1, TERM), "SIGTERM");
        assert_eq!(status, CheckStatus::Unknown);
        assert!(text.contains("process.on('SIGTERM'"), "{text}");
        assert!(text.contains("the kernel drops"), "{text}");
        let (_, text) = says(process("node", 7, TERM), "SIGTERM");
        assert!(text.contains("ends at once"), "{text}");
        let (status, _) = says(process("java", 1, TERM), "SIGTERM");
        assert_eq!(status, CheckStatus::Unknown);
    }
}
