//! `deploy/` and README.md say what the code does.
//!
//! Manifests are read strictly: each document becomes the API's own type, is written out again, and must be
//! what it was, so that a field the API does not have (a misspelt one, say) is found. No cluster is asked.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Json, Router, body::Body, extract::RawQuery, http::StatusCode, routing::get};
use clap::{CommandFactory as _, Parser as _};
use ebb::{
    cli::Cli,
    drain::{
        policy::{Policy, annotations},
        report::PodName,
    },
    exit,
    ids::{PodUid, SandboxId},
    pods::{Pod, Scope, kube::Kube},
};
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Container, Namespace, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    let path = repository().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The documents of a YAML file.
fn documents(path: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(&read(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// A document as the API has it.
fn strictly<T: Serialize + DeserializeOwned>(document: &Value) -> Result<T, String> {
    let typed: T = serde_json::from_value(document.clone()).map_err(|e| e.to_string())?;
    let again = serde_json::to_value(&typed).map_err(|e| e.to_string())?;
    let mut lost = Vec::new();
    difference("", document, &again, &mut lost);
    if lost.is_empty() {
        Ok(typed)
    } else {
        Err(format!("not in the API: {}", lost.join(", ")))
    }
}

/// Where `again` is not `document`.
fn difference(path: &str, document: &Value, again: &Value, lost: &mut Vec<String>) {
    match (document, again) {
        (Value::Object(a), Value::Object(b)) => {
            for (key, value) in a {
                let path = format!("{path}.{key}");
                match b.get(key) {
                    Some(other) => difference(&path, value, other, lost),
                    None => lost.push(path),
                }
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                difference(&format!("{path}[{i}]"), a, b, lost);
            }
        }
        _ if document != again => lost.push(format!("{path} ({document} became {again})")),
        _ => {}
    }
}

fn check(document: &Value) -> Result<(), String> {
    match document["kind"].as_str() {
        Some("Namespace") => strictly::<Namespace>(document).map(drop),
        Some("ServiceAccount") => strictly::<ServiceAccount>(document).map(drop),
        Some("ClusterRole") => strictly::<ClusterRole>(document).map(drop),
        Some("ClusterRoleBinding") => strictly::<ClusterRoleBinding>(document).map(drop),
        Some("DaemonSet") => strictly::<DaemonSet>(document).map(drop),
        kind => Err(format!("no type for kind {kind:?}")),
    }
}

fn daemonset() -> DaemonSet {
    strictly(&documents("deploy/daemonset.yaml")[0]).unwrap()
}

fn agent_container() -> Container {
    let pod = daemonset().spec.unwrap().template.spec.unwrap();
    assert_eq!(pod.containers.len(), 1);
    pod.containers.into_iter().next().unwrap()
}

#[test]
fn every_manifest_has_only_fields_that_the_api_has_and_kustomization_lists_them_all() {
    let kustomization = &documents("deploy/kustomization.yaml")[0];
    assert_eq!(kustomization["kind"], "Kustomization");
    let listed: BTreeSet<&str> = kustomization["resources"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r.as_str().unwrap())
        .collect();
    let there: BTreeSet<String> = fs::read_dir(repository().join("deploy"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".yaml") && name != "kustomization.yaml")
        .collect();
    assert!(there.iter().map(String::as_str).eq(listed));
    for name in there {
        for document in documents(&format!("deploy/{name}")) {
            check(&document).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
}

#[test]
fn a_misspelt_field_is_found() {
    let mut document = documents("deploy/daemonset.yaml").remove(0);
    let pod = document
        .pointer_mut("/spec/template/spec")
        .unwrap()
        .as_object_mut()
        .unwrap();
    let host_pid = pod.remove("hostPID").unwrap();
    pod.insert("hostPid".into(), host_pid);
    let error = check(&document).unwrap_err();
    assert_eq!(error, "not in the API: .spec.template.spec.hostPid");
}

#[test]
fn names_and_labels_agree_across_the_manifests() {
    let rbac = documents("deploy/rbac.yaml");
    let role: ClusterRole = strictly(&rbac[0]).unwrap();
    let binding: ClusterRoleBinding = strictly(&rbac[1]).unwrap();
    let account: ServiceAccount = strictly(&documents("deploy/serviceaccount.yaml")[0]).unwrap();
    let namespace: Namespace = strictly(&documents("deploy/namespace.yaml")[0]).unwrap();
    let daemonset = daemonset();
    assert_eq!(binding.role_ref.name, role.metadata.name.unwrap());
    let subject = &binding.subjects.unwrap()[0];
    assert_eq!(Some(&subject.name), account.metadata.name.as_ref());
    assert_eq!(subject.namespace, account.metadata.namespace);
    assert_eq!(account.metadata.namespace, namespace.metadata.name);
    assert_eq!(daemonset.metadata.namespace, namespace.metadata.name);
    let spec = daemonset.spec.unwrap();
    let template = spec.template.metadata.unwrap();
    assert_eq!(spec.selector.match_labels, template.labels);
    let pod = spec.template.spec.unwrap();
    assert_eq!(pod.service_account_name, account.metadata.name);
    let (policy, warnings) = Policy::default().from_annotations(&template.annotations.unwrap());
    assert!(!policy.enabled, "the agent's own stop must not be held");
    assert_eq!(warnings, Vec::<String>::new());
}

/// An API server that answers with empty lists, and notes which verbs on which resources were used.
async fn noting_server() -> (kube::Client, Arc<Mutex<BTreeSet<String>>>) {
    let used = Arc::new(Mutex::new(BTreeSet::new()));
    let note = |verb: &str, used: &Mutex<BTreeSet<String>>| {
        used.lock().unwrap().insert(format!("{verb} pods"));
    };
    let (of_all, of_one, of_others) = (used.clone(), used.clone(), used.clone());
    let pods = move |RawQuery(query): RawQuery| {
        let watch =
            query.is_some_and(|q| q.split('&').any(|p| p == "watch=true" || p == "watch=1"));
        note(if watch { "watch" } else { "list" }, &of_all);
        async move {
            if watch {
                return Body::from_stream(
                    futures_util::stream::pending::<Result<Vec<u8>, String>>(),
                );
            }
            let list = json!({
                "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadataList",
                "metadata": {"resourceVersion": "1"}, "items": [],
            });
            Body::from(list.to_string())
        }
    };
    let pod = move || {
        note("get", &of_one);
        let status = json!({
            "apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": "NotFound",
            "message": "", "code": 404,
        });
        async move { (StatusCode::NOT_FOUND, Json(status)) }
    };
    let other = move |request: axum::extract::Request| {
        let line = format!("{} {}", request.method(), request.uri());
        of_others.lock().unwrap().insert(line);
        async { StatusCode::NOT_FOUND }
    };
    let app = Router::new()
        .route("/api/v1/pods", get(pods))
        .route("/api/v1/namespaces/{namespace}/pods/{name}", get(pod))
        .fallback(other);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    let config = kube::Config::new(format!("http://{address}").parse().unwrap());
    (kube::Client::try_from(config).unwrap(), used)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_role_allows_what_the_agent_asks_of_the_api_server_and_no_more() {
    let (client, used) = noting_server().await;
    let api = Kube::watch(client, "node");
    let pod = Pod {
        name: PodName {
            uid: PodUid::new("u"),
            namespace: "shop".into(),
            name: "web".into(),
        },
        sandbox: SandboxId::new("s"),
        scope: Scope::Untracked("not asked".into()),
        ips: vec![],
        annotations: BTreeMap::new(),
        containers: vec![],
    };
    assert_eq!(api.is_deleting(&pod, Duration::ZERO).await, Some(true));
    tokio::time::timeout(Duration::from_secs(10), async {
        while used.lock().unwrap().len() < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();

    let role: ClusterRole = strictly(&documents("deploy/rbac.yaml")[0]).unwrap();
    let mut allowed = BTreeSet::new();
    for rule in role.rules.unwrap() {
        assert_eq!(rule.api_groups.unwrap(), [""]);
        for resource in rule.resources.unwrap() {
            allowed.extend(rule.verbs.iter().map(|verb| format!("{verb} {resource}")));
        }
    }
    assert_eq!(*used.lock().unwrap(), allowed);
}

/// `$(NAME)` as the kubelet replaces it, with something to stand for each field.
fn expanded(container: &Container) -> Vec<String> {
    let values: HashMap<&str, &str> = container
        .env
        .iter()
        .flatten()
        .map(|env| {
            let field = env.value_from.as_ref().unwrap().field_ref.as_ref().unwrap();
            let value = match field.field_path.as_str() {
                "spec.nodeName" => "node-1",
                "status.hostIP" => "192.0.2.10",
                other => panic!("no value to stand for {other}"),
            };
            (env.name.as_str(), value)
        })
        .collect();
    let replace = |arg: &String| {
        values.iter().fold(arg.clone(), |arg, (name, value)| {
            arg.replace(&format!("$({name})"), value)
        })
    };
    container.args.iter().flatten().map(replace).collect()
}

#[test]
fn the_agent_accepts_the_arguments_and_knows_the_variables_that_it_is_started_with() {
    let container = agent_container();
    let args = expanded(&container);
    assert!(!args.iter().any(|a| a.contains("$(")), "{args:?}");
    Cli::try_parse_from(std::iter::once("ebb".into()).chain(args.clone()))
        .map(drop)
        .unwrap();
    let command = Cli::command();
    let agent = command.find_subcommand(&args[0]).unwrap();
    for env in container.env.unwrap() {
        let read_by_ebb = agent
            .get_arguments()
            .any(|a| a.get_env().is_some_and(|name| name == env.name.as_str()));
        let in_args = container
            .args
            .iter()
            .flatten()
            .any(|a| a.contains(&format!("$({})", env.name)));
        assert!(read_by_ebb || in_args, "{} is of no use", env.name);
    }
}

#[test]
fn what_the_arguments_name_is_mounted_and_the_probes_ask_where_it_listens() {
    let container = agent_container();
    let args = expanded(&container);
    let flag = |name: &str| {
        let found = args.iter().find_map(|a| a.strip_prefix(name));
        found.unwrap_or_else(|| panic!("no {name}"))
    };
    let mounts = container.volume_mounts.unwrap();
    for (path, written) in [
        (flag("--cri-socket="), false),
        (flag("--run-dir="), true),
        (flag("--cgroup-root="), false),
    ] {
        let mount = mounts
            .iter()
            .find(|m| Path::new(path).starts_with(&m.mount_path))
            .unwrap_or_else(|| panic!("{path} is not mounted"));
        assert_eq!(mount.read_only != Some(true), written, "{path}");
    }
    let http: Vec<&str> = flag("--http=").split(',').collect();
    for (probe, path) in [
        (container.liveness_probe, "/healthz"),
        (container.readiness_probe, "/readyz"),
    ] {
        let ask = probe.unwrap().http_get.unwrap();
        let k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::Int(port) = ask.port else {
            panic!("a port by name");
        };
        let address = format!("{}:{port}", ask.host.unwrap());
        assert!(http.contains(&address.as_str()), "{address} in {http:?}");
        assert_eq!(ask.path.as_deref(), Some(path));
    }
    let port = container.ports.unwrap()[0].container_port;
    assert!(http.iter().all(|a| a.ends_with(&format!(":{port}"))));
}

/// The values of `key` in a systemd unit.
fn unit<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    text.lines()
        .filter_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        .collect()
}

#[test]
fn the_units_start_the_proxy_that_there_is_on_the_socket_that_it_expects() {
    let service = read("deploy/systemd/ebb-cri.service");
    let command: Vec<&str> = unit(&service, "ExecStart")[0].split(' ').collect();
    assert_eq!(command[0], "/usr/local/bin/ebb");
    Cli::try_parse_from(&command).map(drop).unwrap();
    let socket = read("deploy/systemd/ebb-cri.socket");
    assert_eq!(
        unit(&socket, "ListenStream"),
        [default("cri-proxy", "listen")]
    );
    assert_eq!(unit(&service, "Requires"), ["ebb-cri.socket"]);
    assert_eq!(unit(&service, "Restart"), ["always"]);
    for text in [&service, &socket] {
        assert_eq!(unit(text, "Before"), ["kubelet.service"]);
    }
}

/// The default of a flag, as `--help` has it.
fn default(verb: &str, flag: &str) -> String {
    let command = Cli::command();
    let verb = command.find_subcommand(verb).unwrap();
    let mut args = verb.get_arguments();
    let arg = args.find(|a| a.get_long() == Some(flag));
    let arg = arg.unwrap_or_else(|| panic!("no flag --{flag}"));
    let values: Vec<_> = arg.get_default_values().iter().collect();
    values
        .iter()
        .map(|v| v.to_str().unwrap())
        .collect::<Vec<_>>()
        .join(",")
}

/// The cells of README's policy table: annotation, flag, default; without back-ticks.
fn policy_table() -> Vec<[String; 3]> {
    let readme = read("README.md");
    let rows = readme
        .lines()
        .skip_while(|line| !line.starts_with("| annotation |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let cells: Vec<String> = row.split('|').map(|c| c.trim().replace('`', "")).collect();
        [cells[1].clone(), cells[2].clone(), cells[3].clone()]
    })
    .collect()
}

#[test]
fn the_readme_names_every_annotation_and_no_other() {
    let known: BTreeSet<String> = annotations::KEYS
        .iter()
        .map(|key| format!("{}{key}", annotations::PREFIX))
        .collect();
    let table: BTreeSet<String> = policy_table()
        .into_iter()
        .map(|[annotation, ..]| annotation)
        .filter(|annotation| !annotation.is_empty())
        .collect();
    assert_eq!(table, known);

    // Elsewhere in the text, too. `ebb.dev/v1` is the name of the JSON schema.
    for document in ["README.md", "ARCHITECTURE.md", "deploy/README.md"] {
        for (at, _) in read(document).match_indices(annotations::PREFIX) {
            let text = read(document);
            let rest = &text[at..];
            let end = rest
                .find(|c: char| !(c.is_ascii_alphanumeric() || "./-".contains(c)))
                .unwrap_or(rest.len());
            let name = rest[..end].trim_end_matches(['.', '/']);
            assert!(
                name == ebb::report::view::SCHEMA || known.contains(name),
                "{document}: {name}"
            );
        }
    }
}

#[test]
fn the_readme_names_every_policy_flag_with_its_default() {
    let command = Cli::command();
    let agent = command.find_subcommand("agent").unwrap();
    let flags: BTreeSet<String> = agent
        .get_arguments()
        .filter(|a| a.get_help_heading().is_some())
        .filter_map(|a| a.get_long().map(str::to_owned))
        .collect();
    let mut named = BTreeSet::new();
    for [_, flag, value] in policy_table() {
        let Some(flag) = flag.strip_prefix("--") else {
            continue;
        };
        let of_clap = default("agent", flag);
        let shown = if of_clap.is_empty() { "none" } else { &of_clap };
        assert_eq!(value, shown, "--{flag}");
        named.insert(flag.to_owned());
    }
    assert_eq!(named, flags);
}

#[test]
fn the_readmes_exit_statuses_are_those_of_help() {
    let readme = read("README.md");
    assert!(
        readme.contains(&format!("```text\n{}\n```", exit::HELP)),
        "README.md has not this block:\n{}",
        exit::HELP
    );
}

#[test]
fn every_ebb_command_in_the_readme_is_accepted() {
    let readme = read("README.md");
    let commands: Vec<&str> = readme
        .split("```sh\n")
        .skip(1)
        .flat_map(|rest| rest.split("```").next().unwrap_or_default().lines())
        .filter(|line| line.starts_with("ebb "))
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .collect();
    assert!(commands.len() >= 6, "{commands:?}");
    for command in commands {
        Cli::try_parse_from(command.split_whitespace())
            .map(drop)
            .unwrap_or_else(|e| panic!("{command}: {e}"));
    }
}
