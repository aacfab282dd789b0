//! Is a container's preStop hook a wait at ebb's own port? Pure.
//!
//! The kubelet writes the hook and the ports of a container into CRI annotations, as the JSON of
//! `v1.LifecycleHandler` and `[]v1.ContainerPort` (`newContainerAnnotations` in kubelet's
//! `pkg/kubelet/kuberuntime/labels.go`).

use serde::Deserialize;

/// The path of a hook that waits at the pod's own wait port.
pub const WAIT_PATH: &str = "/ebb/wait";

/// A hook that asks for ebb's wait port and can't have it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HookError {
    /// The port has a name that the container has no port for.
    #[error(
        "its preStop hook names the port {0:?}, which the container does not have; give the number, or name a port so"
    )]
    NoSuchPort(String),
    /// Not a port number.
    #[error("its preStop hook names port {0}; write a number from 1 to 65535")]
    NotAPort(i64),
    /// TLS, which ebb does not speak there.
    #[error(
        "its preStop hook asks for HTTPS, and ebb's wait port speaks HTTP; leave out the scheme"
    )]
    Https,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Handler {
    http_get: Option<HttpGet>,
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

/// The port of the pod that this preStop hook waits at; `None` if it is no such hook. `ports` is where a port's
/// name is looked up.
///
/// What is not understood is no such hook: the runtime keeps whatever was written there.
///
/// # Errors
///
/// [`HookError`] if it means ebb's port and will not find it there.
pub fn wait_port(hook: &str, ports: Option<&str>) -> Result<Option<u16>, HookError> {
    let handler = serde_json::from_str::<Handler>(hook).ok();
    let Some(get) = handler.and_then(|h| h.http_get) else {
        return Ok(None);
    };
    let path = get.path.split(['?', '#']).next().unwrap_or_default();
    // With a host it goes elsewhere, to the node port perhaps. The kubelet adds a slash that is missing
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
    fn a_get_of_the_wait_path_is_one_wherever_its_port_is_given() {
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
    fn other_hooks_are_none() {
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
    fn a_hook_that_would_miss_the_port_says_why() {
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
