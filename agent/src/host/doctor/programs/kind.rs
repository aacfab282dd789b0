//! Recognises a program by its name and command line.

use super::{
    process::Process,
    servers::{Server, server},
};

/// Inits for containers. They pass signals on to their child. Docker's is tini under another name.
const INITS: [&str; 8] = [
    "tini",
    "tini-static",
    "docker-init",
    "dumb-init",
    "catatonit",
    "s6-svscan",
    "s6-supervise",
    "s6-linux-init",
];

const SHELLS: [&str; 9] = [
    "sh", "bash", "dash", "ash", "zsh", "ksh", "mksh", "rbash", "fish",
];

/// A language runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Runtime {
    Node,
    Java,
    Python,
    Ruby,
    Go,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Init,
    Shell,
    Server(&'static Server),
    Runtime(Runtime),
    Other,
}

/// What this process runs.
pub(super) fn kind(process: &Process) -> Kind {
    let program = process.program.as_str();
    if let Some(server) = server(program, &process.command) {
        return Kind::Server(server);
    }
    if INITS.contains(&program) {
        return Kind::Init;
    }
    if SHELLS.contains(&program) {
        return Kind::Shell;
    }
    // `python3.11`, `ruby3.1`.
    let runtime = match program.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.') {
        "node" | "nodejs" => Runtime::Node,
        "java" => Runtime::Java,
        "python" | "pypy" => Runtime::Python,
        "ruby" => Runtime::Ruby,
        _ if process.is_go => Runtime::Go,
        _ => return Kind::Other,
    };
    Kind::Runtime(runtime)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::doctor::programs::testing::process;

    #[test]
    fn programs_are_known_by_their_names() {
        let of = |program: &str| kind(&process(program, 1, 0));
        assert!(matches!(of("docker-init"), Kind::Init));
        assert!(matches!(of("dash"), Kind::Shell));
        assert!(matches!(of("python3.11"), Kind::Runtime(Runtime::Python)));
        assert!(matches!(of("ruby3.1"), Kind::Runtime(Runtime::Ruby)));
        assert!(matches!(of("nodejs"), Kind::Runtime(Runtime::Node)));
        assert!(matches!(of("nginx"), Kind::Server(s) if s.name == "nginx"));
        assert!(matches!(of("app"), Kind::Other));
        let go = Process {
            is_go: true,
            ..process("app", 1, 0)
        };
        assert!(matches!(kind(&go), Kind::Runtime(Runtime::Go)));
    }
}
