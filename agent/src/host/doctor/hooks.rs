//! The checks of a container's preStop hook. Pure, except for [`missing_program`].

use std::{collections::HashMap, path::Path, time::Duration};

use ebb_core::{clock::millis, format::duration};
use serde::Deserialize;

use super::{
    Check,
    CheckStatus::{Ok as Fine, Warn},
};
use crate::{
    linux::files::resolve_in,
    pods::hook::{WAIT_PATH, commands, requested_path, sleeps, wait_port},
};

/// Requests of ebb's node port that wait.
const WAIT_PATHS: [&str; 2] = [WAIT_PATH, "/v1/wait"];

/// Commands of a shell that need no program, and words that begin a compound command.
const SHELL_WORDS: [&str; 36] = [
    ":", ".", "[", "[[", "!", "alias", "break", "case", "cd", "command", "continue", "do", "done",
    "echo", "elif", "else", "esac", "eval", "exec", "exit", "export", "false", "fi", "for", "if",
    "kill", "local", "printf", "read", "return", "set", "then", "trap", "true", "wait", "while",
];

/// `PATH` in a container whose environment has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where Istio's injector sends preStop requests of a container (`FormatProberURL` in `pilot/cmd/pilot-agent/status`).
const ISTIO_PREFIX: &str = "/app-lifecycle/";

#[derive(Clone, Debug, Default)]
pub(super) struct HookFacts {
    pub(super) container: String,
    /// The hook, and the container's ports, as the kubelet's annotations have them.
    pub(super) hook: String,
    pub(super) ports: Option<String>,
    pub(super) grace: Option<Duration>,
    /// A program that the hook runs and the image does not have.
    pub(super) missing: Option<String>,
    /// The requests that Istio's injector has replaced: `ISTIO_KUBE_APP_PROBERS` of its sidecar.
    pub(super) istio_probers: Option<String>,
}

pub(super) fn checks(facts: &HookFacts) -> Vec<Check> {
    let name = format!("preStop {}", facts.container);
    let new = |status, what: String| Check::new(&name, status, what);
    let mut checks = Vec::new();
    match wait_port(&facts.hook, facts.ports.as_deref()) {
        Ok(Some(port)) => checks.push(new(
            Fine,
            format!("waits at ebb's port {port} in the pod until the pod has drained"),
        )),
        Ok(None) => {}
        Err(e) => checks.push(new(Warn, e.to_string())),
    }
    if let Some(path) = requested_path(&facts.hook)
        && path.starts_with(ISTIO_PREFIX)
    {
        checks.push(rewritten(&name, &path, facts.istio_probers.as_deref()));
    }
    if let Some(program) = &facts.missing {
        let what = format!("runs {program}, which the image does not have");
        let why =
            "the hook fails at once (Event FailedPreStopHook), and the stop goes on without it";
        checks.push(new(Warn, what).because(why).change(
            "remove the hook, or use preStop.httpGet of /ebb/wait at port 9690, which needs no program in the image",
        ));
        return checks;
    }
    let commands = commands(&facts.hook);
    if commands
        .iter()
        .flatten()
        .any(|w| WAIT_PATHS.iter().any(|path| w.contains(path)))
    {
        checks.push(new(
            Fine,
            "waits at ebb's node port until the pod has drained".into(),
        ));
    }
    checks.extend(commands.iter().filter_map(|command| nginx(&name, command)));
    let sleep = sleeps(&facts.hook);
    if !sleep.is_zero() {
        checks.push(slept(&name, sleep, facts.grace));
    }
    checks
}

/// `nginx -s quit` and `nginx -s stop`.
fn nginx(name: &str, command: &[String]) -> Option<Check> {
    let program = command
        .iter()
        .position(|w| w.rsplit('/').next() == Some("nginx"))?;
    let flag = command[program..].iter().position(|w| w == "-s")? + program;
    let signal = command.get(flag + 1)?;
    match signal.as_str() {
        "quit" => Some(Check::new(
            name,
            Fine,
            "nginx -s quit lets nginx finish its requests. It refuses new connections from then on; with \
             ebb.dev/stop-signal: SIGQUIT instead, ebb does the same after settling",
        )),
        "stop" => {
            let what = "nginx -s stop closes its connections at once";
            let why = "requests under way are cut before ebb can hold the stop";
            Some(
                Check::new(name, Warn, what)
                    .because(why)
                    .change("use nginx -s quit"),
            )
        }
        _ => None,
    }
}

fn slept(name: &str, sleep: Duration, grace: Option<Duration>) -> Check {
    let text = duration(millis(sleep));
    let what = format!("sleeps {text}, which the kubelet takes off the grace period");
    let left = grace.map(|grace| grace.saturating_sub(sleep));
    let why = match left {
        Some(left) if left <= Duration::from_secs(2) => {
            "2 s are left for the stop, and ebb holds no such stop".to_owned()
        }
        Some(left) => format!(
            "{} of {} are left for ebb's hold and the application",
            duration(millis(left)),
            duration(grace.map_or(0, millis))
        ),
        None => "less is left for ebb's hold and the application".to_owned(),
    };
    Check::new(name, Warn, what).because(why).change(
        "remove the sleep: ebb holds the stop until no new connections arrive, which is what the sleep is for",
    )
}

/// An HTTP request that Istio's agent makes in the kubelet's place.
fn rewritten(name: &str, path: &str, probers: Option<&str>) -> Check {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Prober {
        http_get: Option<HookGet>,
    }
    #[derive(Deserialize)]
    struct HookGet {
        #[serde(default)]
        path: String,
        port: u16,
    }
    let probers =
        probers.and_then(|text| serde_json::from_str::<HashMap<String, Prober>>(text).ok());
    let original = probers.and_then(|mut all| all.remove(path)?.http_get);
    match original {
        Some(get) if get.path.starts_with(WAIT_PATH) => {
            let what = format!(
                "Istio's injector has rewritten the request of {WAIT_PATH} at port {} to its own port",
                get.port
            );
            let why = "ebb does not recognise the hook, so it does not listen, and the hook fails";
            let change = format!("annotate the pod with ebb.dev/wait-port: \"{}\"", get.port);
            Check::new(name, Warn, what).because(why).change(change)
        }
        Some(get) => Check::new(
            name,
            Fine,
            format!(
                "Istio's agent makes its request of {} at port {}",
                get.path, get.port
            ),
        ),
        None => {
            let what = "Istio's injector has rewritten its request to its own port";
            let why = "if it was ebb's wait, ebb does not recognise the hook and does not listen";
            Check::new(name, Warn, what)
                .because(why)
                .change("if it was, annotate the pod with ebb.dev/wait-port: \"9690\"")
        }
    }
}

/// The first program that a hook runs and a container's root file system does not have. `path` is its `PATH`.
pub(super) fn missing_program(root: &Path, path: Option<&str>, hook: &str) -> Option<String> {
    let commands = commands(hook);
    let in_script = commands.len() > 1;
    let programs = commands.iter().filter_map(|words| words.first());
    programs
        .enumerate()
        .filter(|(i, program)| {
            // The script's own variables, functions and quotes are not followed.
            let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._+-".contains(c);
            let may_be_other =
                SHELL_WORDS.contains(&program.as_str()) || !program.chars().all(is_plain);
            !(in_script && *i > 0 && may_be_other)
        })
        .map(|(_, program)| program)
        .find(|program| !exists(root, path.unwrap_or(DEFAULT_PATH), program))
        .cloned()
}

fn exists(root: &Path, path: &str, program: &str) -> bool {
    let is_file = |at: &Path| resolve_in(root, at).is_ok_and(|found| found.is_file());
    // A relative path starts at the working directory, which the hook shares with the container.
    if program.contains('/') && !program.starts_with('/') {
        return true;
    }
    if program.starts_with('/') {
        return is_file(Path::new(program));
    }
    path.split(':')
        .any(|directory| is_file(&Path::new(directory).join(program)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::host::doctor::CheckStatus;

    fn exec(words: &[&str]) -> String {
        serde_json::json!({ "exec": { "command": words } }).to_string()
    }

    fn says(hook: &str, change: impl FnOnce(&mut HookFacts)) -> Vec<(CheckStatus, String)> {
        let mut facts = HookFacts {
            container: "app".into(),
            hook: hook.into(),
            grace: Some(Duration::from_secs(30)),
            ..HookFacts::default()
        };
        change(&mut facts);
        let checks = checks(&facts).into_iter();
        let text = |c: Check| {
            let parts = [Some(c.detail), c.why, c.change].into_iter().flatten();
            (c.status, parts.collect::<Vec<_>>().join("; "))
        };
        checks.map(text).collect()
    }

    fn one(hook: &str) -> (CheckStatus, String) {
        let mut all = says(hook, |_| ());
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    #[test]
    fn a_wait_is_confirmed() {
        let (status, text) = one(r#"{"httpGet":{"path":"/ebb/wait","port":9690}}"#);
        assert_eq!(status, Fine);
        assert!(text.contains("9690"), "{text}");
        let (status, text) = one(r#"{"httpGet":{"path":"/ebb/wait","port":"nowhere"}}"#);
        assert_eq!(status, Warn, "{text}");
        let (status, text) = one(&exec(&["sh", "-c", "curl -s http://$NODE_IP:9690/v1/wait"]));
        assert_eq!(status, Fine, "{text}");
        assert_eq!(says(r#"{"httpGet":{"path":"/quit","port":1}}"#, |_| ()), []);
    }

    #[test]
    fn a_sleep_is_superfluous_and_takes_time() {
        let (status, text) = one(&exec(&["sleep", "15"]));
        assert_eq!(status, Warn);
        assert!(text.contains("15.0s of 30.0s are left"), "{text}");
        let (_, text) = one(r#"{"sleep":{"seconds":29}}"#);
        assert!(text.contains("ebb holds no such stop"), "{text}");
    }

    #[test]
    fn nginx_quits_gracefully_and_stops_at_once() {
        let all = says(&exec(&["/bin/sh", "-c", "nginx -s quit; sleep 5"]), |_| ());
        let statuses: Vec<_> = all.iter().map(|(status, _)| *status).collect();
        assert_eq!(statuses, [Fine, Warn], "{all:?}");
        let (status, text) = one(&exec(&["/usr/sbin/nginx", "-s", "stop"]));
        assert_eq!(status, Warn, "{text}");
    }

    #[test]
    fn a_mesh_that_rewrites_the_wait_is_named() {
        let hook = r#"{"httpGet":{"path":"/app-lifecycle/app/prestopz","port":15020}}"#;
        let probers = |path: &str| {
            let get = serde_json::json!({ "httpGet": { "path": path, "port": 9691 } });
            Some(serde_json::json!({ "/app-lifecycle/app/prestopz": get }).to_string())
        };
        let wait = says(hook, |f| f.istio_probers = probers("/ebb/wait"));
        assert_eq!(wait[0].0, Warn);
        assert!(
            wait[0].1.contains("ebb.dev/wait-port: \"9691\""),
            "{wait:?}"
        );
        let other = says(hook, |f| f.istio_probers = probers("/quit"));
        assert_eq!(other[0].0, Fine, "{other:?}");
        assert_eq!(says(hook, |_| ())[0].0, Warn);
    }

    #[test]
    fn a_program_that_the_image_lacks_is_named() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        std::os::unix::fs::symlink("/usr/bin", root.join("bin")).unwrap();
        fs::write(root.join("usr/bin/sh"), "").unwrap();
        let missing = |words: &[&str]| missing_program(root, None, &exec(words));
        assert_eq!(missing(&["/bin/sh", "-c", "exit 0"]), None);
        assert_eq!(missing(&["sh", "-c", "kill 1; $CMD; X=1 y"]), None);
        assert_eq!(missing(&["sh", "-c", "while true; do sleep 1; done"]), None);
        assert_eq!(
            missing(&["sh", "-c", "curl http://x"]).as_deref(),
            Some("curl")
        );
        assert_eq!(missing(&["sleep", "15"]).as_deref(), Some("sleep"));
        assert_eq!(
            missing(&["/bin/bash", "-c", "true"]).as_deref(),
            Some("/bin/bash")
        );
        assert_eq!(
            missing_program(root, Some("/opt"), &exec(&["sh"])).as_deref(),
            Some("sh")
        );
        assert_eq!(
            missing_program(root, None, r#"{"sleep":{"seconds":1}}"#),
            None
        );
        let checks = says(&exec(&["sleep", "15"]), |f| {
            f.missing = Some("sleep".into())
        });
        assert!(
            checks[0].1.contains("does not have") && checks.len() == 1,
            "{checks:?}"
        );
    }
}
