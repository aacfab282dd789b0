//! What a container's preStop hook does: whether it waits at ebb's port in the pod, and how long it sleeps. Pure.
//!
//! The kubelet writes the hook and the ports of a container into CRI annotations, as the JSON of
//! `v1.LifecycleHandler` and `[]v1.ContainerPort` (`newContainerAnnotations` in kubelet's
//! `pkg/kubelet/kuberuntime/labels.go`).

use std::time::Duration;

use serde::Deserialize;

/// The path that a hook requests to wait at ebb's port in the pod.
pub const WAIT_PATH: &str = "/ebb/wait";

/// A hook that requests ebb's wait path in a way that can't work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HookError {
    /// The container declares no port of this name.
    #[error(
        "its preStop hook names port {0:?}, which the container does not declare; give a number or declare the name"
    )]
    NoSuchPort(String),
    /// Not a port number.
    #[error("its preStop hook names port {0}; give a number from 1 to 65535")]
    NotAPort(i64),
    /// ebb's wait port serves no TLS.
    #[error(
        "its preStop hook uses HTTPS, but ebb's wait port serves HTTP only; leave out the scheme"
    )]
    Https,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LifecycleHandler {
    http_get: Option<HttpGet>,
    exec: Option<Exec>,
    sleep: Option<Sleep>,
}

#[derive(Deserialize)]
struct Exec {
    #[serde(default)]
    command: Vec<String>,
}

#[derive(Deserialize)]
struct Sleep {
    seconds: u64,
}

#[derive(Deserialize)]
struct HttpGet {
    #[serde(default)]
    path: String,
    port: PortRef,
    #[serde(default)]
    host: String,
    #[serde(default)]
    scheme: String,
}

/// `intstr.IntOrString`.
#[derive(Deserialize)]
#[serde(untagged)]
enum PortRef {
    Number(i64),
    Name(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    #[serde(default)]
    name: String,
    container_port: i64,
}

/// The port of the pod that this preStop hook waits at; `None` if it requests another path or host, or can't be
/// parsed, because the annotation may hold any text. `ports` resolves a port's name.
///
/// # Errors
///
/// [`HookError`] if it requests ebb's path, but with a port or a scheme that can't work.
pub fn wait_port(hook: &str, ports: Option<&str>) -> Result<Option<u16>, HookError> {
    let handler = serde_json::from_str::<LifecycleHandler>(hook).ok();
    let Some(get) = handler.and_then(|h| h.http_get) else {
        return Ok(None);
    };
    let path = get.path.split(['?', '#']).next().unwrap_or_default();
    // With a host it goes elsewhere, perhaps to the node port. The kubelet adds a missing slash
    // (`formatURL` in `pkg/probe/http/request.go`).
    if !get.host.is_empty() || path.trim_start_matches('/') != WAIT_PATH.trim_start_matches('/') {
        return Ok(None);
    }
    if get.scheme.eq_ignore_ascii_case("https") {
        return Err(HookError::Https);
    }
    let port = match get.port {
        PortRef::Number(n) => n,
        // A number in quotes is a number (`resolvePort` in `pkg/kubelet/lifecycle/handlers.go`).
        PortRef::Name(name) => match name.parse() {
            Ok(n) => n,
            Err(_) => named(&name, ports).ok_or(HookError::NoSuchPort(name))?,
        },
    };
    match u16::try_from(port) {
        Ok(0) | Err(_) => Err(HookError::NotAPort(port)),
        Ok(port) => Ok(Some(port)),
    }
}

/// The path that a hook requests from the pod; `None` for any other hook.
pub(crate) fn requested_path(hook: &str) -> Option<String> {
    let get = serde_json::from_str::<LifecycleHandler>(hook)
        .ok()?
        .http_get;
    get.filter(|get| get.host.is_empty()).map(|get| get.path)
}

/// The commands of an exec hook, each with its words: those of the script if it runs a shell (`sh -c SCRIPT`). The
/// shell itself comes first.
pub(crate) fn commands(hook: &str) -> Vec<Vec<String>> {
    let handler = serde_json::from_str::<LifecycleHandler>(hook).ok();
    let Some(exec) = handler.and_then(|h| h.exec) else {
        return vec![];
    };
    let mut commands = vec![exec.command.clone()];
    if let [shell, flags, script, ..] = &exec.command[..]
        && shell.ends_with("sh")
        && flags.starts_with('-')
        && flags.ends_with('c')
    {
        let parts = script.split([';', '&', '|', '\n', '(', ')', '{', '}']);
        let words = parts.map(|part| {
            let words = part.split_ascii_whitespace();
            words
                .map(|w| w.trim_matches(['"', '\'']).to_owned())
                .collect()
        });
        commands[0].truncate(1);
        commands.extend(words.filter(|words: &Vec<_>| !words.is_empty()));
    }
    commands
}

/// How long a hook sleeps: a sleep hook, or the `sleep` commands of an exec hook.
pub(crate) fn sleeps(hook: &str) -> Duration {
    let handler = serde_json::from_str::<LifecycleHandler>(hook).ok();
    if let Some(sleep) = handler.and_then(|h| h.sleep) {
        return Duration::from_secs(sleep.seconds);
    }
    let commands = commands(hook);
    let slept = commands.iter().filter_map(|command| {
        let (program, arguments) = command.split_first()?;
        let is_sleep = program == "sleep" || program.ends_with("/sleep");
        is_sleep.then(|| {
            arguments
                .iter()
                .filter_map(|a| sleep_argument(a))
                .sum::<Duration>()
        })
    });
    slept.sum()
}

/// An argument of sleep(1): `15`, `0.5`, `1m`.
fn sleep_argument(text: &str) -> Option<Duration> {
    let number = text.trim_end_matches(['s', 'm', 'h', 'd']);
    let unit = match &text[number.len()..] {
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number.parse::<f64>().ok()? * unit).ok()
}

fn named(name: &str, ports: Option<&str>) -> Option<i64> {
    let ports: Vec<ContainerPort> = serde_json::from_str(ports?).ok()?;
    let found = ports.into_iter().find(|p| p.name == name);
    found.map(|p| p.container_port)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(hook: &str) -> Result<Option<u16>, HookError> {
        let ports = r#"[{"name":"http","containerPort":8080,"protocol":"TCP"},
                        {"name":"drain","hostPort":1,"containerPort":9691}]"#;
        wait_port(hook, Some(ports))
    }

    #[test]
    fn a_get_of_the_wait_path_waits_at_its_port_by_number_or_name() {
        for (get, expected) in [
            (r#""path":"/ebb/wait","port":9690,"scheme":"HTTP""#, 9690),
            (
                r#""path":"/ebb/wait?timeout=30s&until=idle","port":9690"#,
                9690,
            ),
            (r#""path":"ebb/wait","port":"9690""#, 9690),
            (r#""path":"/ebb/wait","port":"drain""#, 9691),
        ] {
            let hook = format!(r#"{{"httpGet":{{{get}}}}}"#);
            assert_eq!(port(&hook), Ok(Some(expected)), "{hook}");
        }
    }

    #[test]
    fn the_sleeps_of_a_hook_are_added() {
        let of = |hook: &str| sleeps(hook).as_millis();
        let exec = |words: &[&str]| {
            sleeps(&serde_json::json!({ "exec": { "command": words } }).to_string()).as_millis()
        };
        assert_eq!(of(r#"{"sleep":{"seconds":5}}"#), 5_000);
        assert_eq!(exec(&["sleep", "15"]), 15_000);
        assert_eq!(exec(&["/bin/sleep", "0.5"]), 500);
        assert_eq!(
            exec(&["sh", "-c", "sleep 5 && nginx -s quit; sleep 1m"]),
            65_000
        );
        assert_eq!(exec(&["/bin/bash", "-ec", "\"sleep\" '10s'"]), 10_000);
        assert_eq!(exec(&["sh", "-c", "echo sleep 5"]), 0);
        assert_eq!(exec(&["sleep", "infinity"]), 0);
        assert_eq!(of("[]"), 0);
        assert_eq!(of(r#"{"httpGet":{"path":"/","port":1}}"#), 0);
    }

    #[test]
    fn a_script_has_commands() {
        let hook = r#"{"exec":{"command":["/bin/sh","-c","nginx -s quit; while pgrep nginx; do sleep 1; done"]}}"#;
        let commands = commands(hook);
        assert_eq!(commands[0], ["/bin/sh"]);
        assert_eq!(commands[1], ["nginx", "-s", "quit"]);
        assert_eq!(commands[3], ["do", "sleep", "1"]);
        let plain = super::commands(r#"{"exec":{"command":["/app","--stop"]}}"#);
        assert_eq!(plain, [["/app", "--stop"]]);
    }

    #[test]
    fn other_hooks_do_not_wait() {
        for hook in [
            r#"{"exec":{"command":["sleep","15"]}}"#,
            r#"{"sleep":{"seconds":5}}"#,
            r#"{"httpGet":{"path":"/quit","port":9690}}"#,
            r#"{"httpGet":{"path":"/ebb/wait/more","port":9690}}"#,
            r#"{"httpGet":{"path":"/ebb/wait","port":9690,"host":"192.0.2.10"}}"#,
            r#"{"httpGet":{"path":"/ebb/wait","port":null}}"#,
            "{}",
            "",
            "[]",
        ] {
            assert_eq!(port(hook), Ok(None), "{hook}");
        }
    }

    #[test]
    fn a_hook_that_cannot_work_is_an_error_with_the_reason() {
        let of = |get: &str| port(&format!(r#"{{"httpGet":{{"path":"/ebb/wait",{get}}}}}"#));
        assert_eq!(
            of(r#""port":"dran""#),
            Err(HookError::NoSuchPort("dran".into()))
        );
        assert_eq!(of(r#""port":0"#), Err(HookError::NotAPort(0)));
        assert_eq!(of(r#""port":65536"#), Err(HookError::NotAPort(65536)));
        assert_eq!(of(r#""port":443,"scheme":"HTTPS""#), Err(HookError::Https));
        let without_ports = wait_port(r#"{"httpGet":{"path":"/ebb/wait","port":"drain"}}"#, None);
        assert_eq!(without_ports, Err(HookError::NoSuchPort("drain".into())));
    }
}
