//! What known servers do on signals. docs/images.md has the same table, which a test compares.
//!
//! `agent/tests/node/images.rs` runs the programs and sends the signals.

use std::path::PathBuf;

use ebb_core::notification::StopSignal::{self, Hup, Int, Quit, Term, Usr1, Usr2, Winch};

use super::process::Process;

/// What a server does on a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reaction {
    /// It finishes the requests under way, then exits.
    Drains,
    /// It closes its connections at once, and exits.
    Drops,
    /// It waits until its clients have left, also the idle ones, then exits.
    WaitsForClients,
    /// It restarts or reloads, and runs on.
    Restarts,
}

/// A server, and its reactions to signals.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) name: &'static str,
    /// The names of its executable. A version may follow, such as `8.2`.
    executables: &'static [&'static str],
    /// A part of its command line, if the executable runs other programs, too.
    word: Option<&'static str>,
    /// Its start script, if that is a shell which stays the main process and passes its signals on by traps.
    start_script: Option<&'static str>,
    reactions: &'static [(StopSignal, Reaction)],
    /// A setting that [`Reaction::Drains`] needs.
    needs: Option<Need>,
    /// What helps if no signal drains it.
    pub(super) instead: Option<&'static str>,
}

/// A setting without which a server does not drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// PHP-FPM kills its workers at once if `process_control_timeout` is 0, its default (`fpm_pctl_action_next` in
    /// `sapi/fpm/fpm/fpm_process_ctl.c`).
    ProcessControlTimeout,
    /// uWSGI finishes requests only if its master has this hook for SIGTERM.
    GracefulHook,
}

/// The hook's action. `hook-master-start = unix_signal:15 gracefully_kill_them_all` binds it to SIGTERM.
const GRACEFUL_HOOK: &str = "unix_signal:15 gracefully_kill_them_all";

impl Need {
    pub(super) const fn change(self) -> &'static str {
        match self {
            Self::ProcessControlTimeout => {
                "set process_control_timeout in its section [global], to less than the grace period"
            }
            Self::GracefulHook => {
                "start it with --hook-master-start \"unix_signal:15 gracefully_kill_them_all\""
            }
        }
    }

    fn is_met(self, process: &Process) -> bool {
        match self {
            Self::ProcessControlTimeout => process.config.lines().any(|line| {
                let (name, value) = line.split_once('=').unwrap_or_default();
                let digits = value.trim().trim_start_matches('0');
                name.trim() == "process_control_timeout"
                    && digits.starts_with(|c: char| c.is_ascii_digit())
            }),
            Self::GracefulHook => {
                let is_hook = |text: &str| text.contains(GRACEFUL_HOOK);
                is_hook(&process.config) || process.command.iter().any(|word| is_hook(word))
            }
        }
    }
}

use Reaction::{Drains, Drops, Restarts, WaitsForClients};

#[rustfmt::skip]
pub(super) const SERVERS: [Server; 9] = [
    Server {
        name: "nginx",
        executables: &["nginx", "openresty"],
        word: None,
        start_script: None,
        reactions: &[(Quit, Drains), (Term, Drops), (Int, Drops), (Hup, Restarts)],
        needs: None,
        instead: None,
    },
    Server {
        name: "PHP-FPM",
        executables: &["php-fpm"],
        word: None,
        start_script: None,
        reactions: &[(Quit, Drains), (Term, Drops), (Int, Drops), (Usr2, Restarts)],
        needs: Some(Need::ProcessControlTimeout),
        instead: None,
    },
    Server {
        name: "Apache httpd",
        executables: &["apache2", "httpd"],
        word: None,
        start_script: None,
        reactions: &[(Winch, Drains), (Term, Drops), (Usr1, Restarts), (Hup, Restarts)],
        needs: None,
        instead: None,
    },
    Server {
        name: "HAProxy",
        executables: &["haproxy"],
        word: None,
        start_script: None,
        reactions: &[(Usr1, Drains), (Term, Drops), (Int, Drops), (Usr2, Restarts)],
        needs: None,
        instead: None,
    },
    Server {
        name: "uWSGI",
        executables: &["uwsgi", "uwsgi-core"],
        word: None,
        start_script: None,
        reactions: &[(Term, Drains), (Int, Drops), (Quit, Drops), (Hup, Restarts)],
        needs: Some(Need::GracefulHook),
        instead: None,
    },
    Server {
        name: "gunicorn",
        executables: &["gunicorn", "python", "pypy"],
        word: Some("gunicorn"),
        start_script: None,
        reactions: &[(Term, Drains), (Int, Drops), (Quit, Drops), (Hup, Restarts)],
        needs: None,
        instead: None,
    },
    Server {
        name: "PostgreSQL",
        executables: &["postgres", "postmaster"],
        word: None,
        start_script: None,
        reactions: &[(Term, WaitsForClients), (Int, Drops), (Quit, Drops), (Hup, Restarts)],
        needs: None,
        instead: Some(
            "limit the lifetime of connections in its clients' pools, so that they have left before the stop; of its \
             signals, SIGINT aborts open transactions at once and does not cost the whole grace period",
        ),
    },
    Server {
        name: "RabbitMQ",
        executables: &["beam.smp", "beam"],
        word: Some("rabbit"),
        start_script: Some("rabbitmq-server"),
        reactions: &[(Term, Drops)],
        needs: None,
        instead: Some("run rabbitmq-upgrade drain in a preStop hook: it moves the clients to other nodes"),
    },
    Server {
        name: "Envoy",
        executables: &["envoy"],
        word: None,
        start_script: None,
        reactions: &[(Term, Drops), (Int, Drops)],
        needs: None,
        // By default it tells only some of its clients, more of them over ten minutes (--drain-time-s).
        instead: Some(
            "start it with --drain-strategy immediate, and let ebb tell it to drain: \
             ebb.dev/on-drain: \"POST :ADMIN_PORT/drain_listeners?graceful\"",
        ),
    },
];

/// The server that this program is, if it is a known one.
pub(super) fn server(program: &str, command: &[String]) -> Option<&'static Server> {
    let without_version = program.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
    SERVERS.iter().find(|server| {
        let names = server.executables;
        let has_word = |word: &str| command.iter().any(|w| w.contains(word));
        (names.contains(&program) || names.contains(&without_version))
            && server.word.is_none_or(has_word)
    })
}

impl Server {
    /// Whether a shell with this command line is the server's start script.
    pub(super) fn is_start_script(&self, command: &[String]) -> bool {
        let script = command.get(1).and_then(|path| path.rsplit('/').next());
        self.start_script.is_some() && script == self.start_script
    }

    /// What the server does on this signal; `None` if that is not known.
    pub(super) fn reaction(&self, signal: u32, process: &Process) -> Option<Reaction> {
        let mut reactions = self.reactions.iter();
        let (_, reaction) = reactions.find(|(s, _)| s.number() == signal)?;
        if *reaction != Drains || self.needs.is_none_or(|need| need.is_met(process)) {
            return Some(*reaction);
        }
        let dies_on_term = || {
            let is_option = |text: &str| text.contains("die-on-term");
            is_option(&process.config) || process.command.iter().any(|word| is_option(word))
        };
        match self.needs {
            // SIGTERM is a reload by default, which also cuts requests.
            Some(Need::GracefulHook) if !dies_on_term() => Some(Restarts),
            _ => Some(Drops),
        }
    }

    /// The signal that drains this server, and the setting that it lacks for that.
    pub(super) fn draining(&self, process: &Process) -> Option<(StopSignal, Option<Need>)> {
        let mut reactions = self.reactions.iter();
        let (signal, _) = reactions.find(|(_, reaction)| *reaction == Drains)?;
        let lacks = self.needs.filter(|need| !need.is_met(process));
        Some((*signal, lacks))
    }

    /// The files with the settings that matter, as the command line names them.
    pub(super) fn config_files(&self, command: &[String]) -> Vec<PathBuf> {
        match self.needs {
            None => vec![],
            // `php-fpm: master process (/etc/php/8.2/fpm/php-fpm.conf)`
            Some(Need::ProcessControlTimeout) => {
                let title = command.first().map_or("", String::as_str);
                let path = title
                    .split_once('(')
                    .and_then(|(_, rest)| rest.split_once(')'));
                path.map(|(path, _)| path.into()).into_iter().collect()
            }
            Some(Need::GracefulHook) => {
                let files = command.iter().filter_map(|word| {
                    let value = word
                        .rsplit_once('=')
                        .map_or(word.as_str(), |(_, value)| value);
                    // `app.ini:SECTION`
                    let path = value.split_once(':').map_or(value, |(path, _)| path);
                    let kinds = [".ini", ".yaml", ".yml", ".xml", ".json"];
                    kinds
                        .iter()
                        .any(|kind| path.ends_with(kind))
                        .then(|| path.into())
                });
                files.collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::doctor::programs::testing::process;

    #[test]
    fn a_server_is_known_by_its_executable_and_its_command_line() {
        let of = |program: &str, words: &[&str]| {
            let words: Vec<_> = words.iter().map(ToString::to_string).collect();
            server(program, &words).map(|s| s.name)
        };
        assert_eq!(of("php-fpm8.2", &[]), Some("PHP-FPM"));
        assert_eq!(of("uwsgi-core", &[]), Some("uWSGI"));
        let words = ["/usr/bin/python3", "-m", "gunicorn", "app:app"];
        assert_eq!(of("python3.11", &words), Some("gunicorn"));
        assert_eq!(
            of("python3.11", &["gunicorn: master [app:app]"]),
            Some("gunicorn")
        );
        assert_eq!(of("python3.11", &["app.py"]), None);
        assert_eq!(of("beam.smp", &["-sname", "rabbit@web"]), Some("RabbitMQ"));
        assert_eq!(of("beam.smp", &["-sname", "ejabberd@web"]), None);
        assert_eq!(of("nginx-exporter", &[]), None);
    }

    #[test]
    fn php_fpm_drains_only_with_a_process_control_timeout() {
        let fpm = |config: &str| {
            let process = Process {
                config: config.into(),
                ..process("php-fpm8.2", 1, 0)
            };
            server("php-fpm8.2", &[]).unwrap().reaction(3, &process)
        };
        assert_eq!(fpm("process_control_timeout = 10s"), Some(Drains));
        assert_eq!(fpm("process_control_timeout = 0"), Some(Drops));
        assert_eq!(fpm("; process_control_timeout = 10s"), Some(Drops));
        assert_eq!(fpm(""), Some(Drops));
        let title = ["php-fpm: master process (/etc/php-fpm.conf)".to_owned()];
        let files = server("php-fpm8.2", &[]).unwrap().config_files(&title);
        assert_eq!(files, [PathBuf::from("/etc/php-fpm.conf")]);
    }

    #[test]
    fn uwsgi_reloads_on_sigterm_unless_it_is_told_otherwise() {
        let uwsgi = |words: &[&str]| {
            let process = process("uwsgi", 1, 0).with_command(words);
            server("uwsgi", &[]).unwrap().reaction(15, &process)
        };
        assert_eq!(uwsgi(&["--master"]), Some(Restarts));
        assert_eq!(uwsgi(&["--die-on-term"]), Some(Drops));
        let hook = "unix_signal:15 gracefully_kill_them_all";
        assert_eq!(uwsgi(&["--hook-master-start", hook]), Some(Drains));
        let words = ["--ini=/etc/app.ini:web", "--yaml", "b.yaml"].map(str::to_owned);
        let files = server("uwsgi", &[]).unwrap().config_files(&words);
        assert_eq!(files, ["/etc/app.ini", "b.yaml"].map(PathBuf::from));
    }

    /// The rows of docs/images.md.
    fn rows() -> String {
        SERVERS
            .iter()
            .map(|server| {
                let on = |wanted: Reaction| {
                    let reactions = server.reactions.iter().filter(|(_, r)| *r == wanted);
                    let names: Vec<_> = reactions.map(|(s, _)| format!("`{s}`")).collect();
                    names.join(", ")
                };
                let remark = server
                    .needs
                    .map(Need::change)
                    .or(server.instead)
                    .unwrap_or_default();
                format!(
                    "| {} | {} | {} | {} | {} | {remark} |\n",
                    server.name,
                    on(Drains),
                    on(Drops),
                    on(WaitsForClients),
                    on(Restarts),
                )
            })
            .collect()
    }

    #[test]
    fn the_documents_table_is_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/images.md");
        let document = std::fs::read_to_string(path).unwrap();
        let rows = rows();
        assert!(
            document.contains(&rows),
            "docs/images.md needs these rows:\n{rows}"
        );
    }
}
