//! `deploy/components/monitoring`: the alerts and the dashboard use metrics and labels that exist, and `promtool` accepts
//! and tests the rules.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use ebb::telemetry::reference::{self, MetricReference};
use ebb_testkit::parts::Parts;
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::{Value, json};

use crate::{
    manifest::{documents, read},
    strict::{PodMonitor, PrometheusRule, strictly},
};

const FOLDER: &str = "deploy/components/monitoring";

/// The groups of rules, as Prometheus reads them.
fn rules() -> Value {
    let rule: PrometheusRule = strictly(&documents(&format!("{FOLDER}/rules.yaml"))[0]).unwrap();
    assert_eq!(rule.metadata.namespace.as_deref(), Some("ebb-system"));
    rule.spec
}

fn alerts() -> Vec<Value> {
    rules()["groups"][0]["rules"].as_array().unwrap().clone()
}

fn dashboard() -> Value {
    let map = &documents(&format!("{FOLDER}/dashboard.yaml"))[0];
    let map: ConfigMap = strictly(map).unwrap();
    let labels = map.metadata.labels.unwrap();
    assert_eq!(labels["grafana_dashboard"], "1");
    serde_json::from_str(&map.data.unwrap()["ebb.json"]).unwrap()
}

/// The queries of the dashboard, with values in place of Grafana's variables.
fn dashboard_queries() -> Vec<String> {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|p| p["targets"].as_array().unwrap());
    targets
        .map(|target| {
            let query = target["expr"].as_str().unwrap();
            let query = query
                .replace("$__rate_interval", "5m")
                .replace("$__range", "1h");
            query.replace("$node", ".*").replace("$namespace", ".*")
        })
        .collect()
}

/// The metrics of a query with the labels that it selects by, and the labels of its groupings.
#[derive(Debug, Default, PartialEq, Eq)]
struct QueryNames {
    metrics: Vec<(String, Vec<String>)>,
    groupings: Vec<String>,
}

/// Words that are followed by a list of labels.
const GROUPINGS: [&str; 6] = [
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
];

impl QueryNames {
    /// Reads a query without comments, whose syntax promtool has checked.
    fn of(query: &str) -> Self {
        let mut found = Self::default();
        let mut rest = query;
        while let Some(c) = rest.chars().next() {
            if c == '"' {
                rest = rest[1..].split_once('"').unwrap().1;
            } else if c == '[' {
                rest = rest.split_once(']').unwrap().1;
            } else if c.is_ascii_alphabetic() || c == '_' {
                let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
                let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
                rest = after.trim_start();
                if let Some(inside) = rest.strip_prefix('(') {
                    // A function's arguments are read as the rest of the query.
                    rest = inside;
                    if GROUPINGS.contains(&word) {
                        let (labels, after) = inside.split_once(')').unwrap();
                        let labels = labels.split(',').map(|l| l.trim().to_owned());
                        found.groupings.extend(labels);
                        rest = after;
                    }
                } else if !["and", "or", "unless", "bool", "offset", "sum", "count"].contains(&word)
                    && !GROUPINGS.contains(&word)
                {
                    let mut labels = vec![];
                    if let Some(inside) = rest.strip_prefix('{') {
                        let (matchers, after) = inside.split_once('}').unwrap();
                        let names = matchers
                            .split(',')
                            .map(|m| m.split(['=', '!']).next().unwrap());
                        labels.extend(names.map(|name| name.trim().to_owned()));
                        rest = after;
                    }
                    found.metrics.push((word.to_owned(), labels));
                }
            } else {
                let digits = rest
                    .find(|c: char| !(c.is_ascii_digit() || c == '.'))
                    .unwrap_or(rest.len());
                rest = &rest[digits.max(c.len_utf8())..];
            }
        }
        found
    }
}

#[test]
fn the_names_in_a_query_are_found() {
    let query = "sum by (a, le) (rate(x_bucket{b=~\"(c|d)\", e!=\"y{z}\"}[5m])) / on (f) up > 0.5 or vector(0)";
    let query = query.replace("y{z}", "y");
    let names = QueryNames::of(&query);
    let x = ("x_bucket".to_owned(), vec!["b".to_owned(), "e".to_owned()]);
    assert_eq!(names.metrics, [x, ("up".to_owned(), vec![])]);
    assert_eq!(names.groupings, ["a", "le", "f"]);
}

/// The labels that Prometheus gives to each series of a target of the PodMonitor.
const TARGET_LABELS: [&str; 3] = ["job", "instance", "node"];

/// The labels of a series; `None` if there is no such series.
fn labels_of(series: &str, metrics: &[MetricReference]) -> Option<BTreeSet<String>> {
    let of_target = TARGET_LABELS.map(str::to_owned);
    if series == "up" {
        return Some(of_target.into());
    }
    let ends = ["_bucket", "_count", "_sum"];
    let end = ends.iter().find(|end| {
        let stem = series.strip_suffix(**end);
        metrics
            .iter()
            .any(|m| m.kind == "histogram" && Some(m.name.as_str()) == stem)
    });
    let name = end.map_or(series, |end| &series[..series.len() - end.len()]);
    let metric = metrics.iter().find(|m| m.name == name)?;
    // A histogram itself is no series.
    if (metric.kind == "histogram") != end.is_some() {
        return None;
    }
    let le = (end == Some(&"_bucket")).then(|| "le".to_owned());
    Some(
        metric
            .labels
            .iter()
            .cloned()
            .chain(le)
            .chain(of_target)
            .collect(),
    )
}

#[test]
fn alerts_and_dashboard_use_metrics_and_labels_that_exist() {
    let metrics = reference::metrics().unwrap();
    let alerts = alerts();
    let of_alerts = alerts
        .iter()
        .map(|a| a["expr"].as_str().unwrap().to_owned());
    let queries: Vec<String> = of_alerts.chain(dashboard_queries()).collect();
    assert!(queries.len() > 30, "{}", queries.len());
    let mut used = BTreeSet::new();
    for query in &queries {
        let names = QueryNames::of(query);
        assert!(!names.metrics.is_empty(), "{query}");
        let mut all = BTreeSet::new();
        for (metric, labels) in names.metrics {
            let known = labels_of(&metric, &metrics);
            let known = known.unwrap_or_else(|| panic!("{query}: no metric {metric}"));
            for label in labels {
                assert!(
                    known.contains(&label),
                    "{query}: {metric} has no label {label}"
                );
            }
            all.extend(known);
            used.insert(metric);
        }
        for label in names.groupings {
            assert!(all.contains(&label), "{query}: no label {label}");
        }
    }
    for wanted in [
        "up",
        "ebb_flows_cut_total",
        "ebb_untracked_pods",
        "ebb_kubelet_uses_proxy",
    ] {
        assert!(used.contains(wanted), "{wanted} is not used");
    }
    // The PodMonitor makes these.
    let monitor = documents(&format!("{FOLDER}/podmonitor.yaml")).remove(0);
    let made = monitor["spec"]["podMetricsEndpoints"][0]["relabelings"][0]["targetLabel"].clone();
    assert_eq!(made, "node");
    let monitor: PodMonitor = strictly(&monitor).unwrap();
    let job = format!(
        "{}/{}",
        monitor.metadata.namespace.unwrap(),
        monitor.metadata.name.unwrap()
    );
    let of_job = |query: &&String| query.contains("job=");
    assert!(
        queries
            .iter()
            .filter(of_job)
            .all(|q| q.contains(&format!("job=\"{job}\"")))
    );
}

#[test]
fn the_dashboards_variables_and_panels_are_complete() {
    let metrics = reference::metrics().unwrap();
    let dashboard = dashboard();
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        let Some(query) = variable["definition"].as_str() else {
            continue;
        };
        let inside = query
            .strip_prefix("label_values(")
            .unwrap()
            .strip_suffix(')')
            .unwrap();
        let (metric, label) = inside.split_once(", ").unwrap();
        let labels = labels_of(metric, &metrics).unwrap();
        assert!(labels.contains(label), "{query}");
    }
    let mut ids = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
        assert!(!panel["title"].as_str().unwrap().is_empty());
        let grid = &panel["gridPos"];
        assert!(
            grid["x"].as_u64().unwrap() + grid["w"].as_u64().unwrap() <= 24,
            "{panel}"
        );
        // What a legend names must be left of the labels.
        for target in panel["targets"].as_array().unwrap() {
            let query = target["expr"].as_str().unwrap();
            let legend = target["legendFormat"].as_str().unwrap();
            for label in legend
                .split("{{")
                .skip(1)
                .map(|rest| rest.split("}}").next().unwrap())
            {
                let names = QueryNames::of(query);
                let kept = names.groupings.iter().any(|g| g == label)
                    || (names.groupings.is_empty() && TARGET_LABELS.contains(&label));
                assert!(kept, "{query}: {legend}");
            }
        }
    }
}

fn promtool(directory: &Path, arguments: &[&str]) {
    let program = Parts::directory().join("usr/bin/promtool");
    let out = Command::new(&program)
        .args(arguments)
        .current_dir(directory)
        .output();
    let out = out.unwrap_or_else(|e| panic!("{}: {e}: run `cargo xtask setup`", program.display()));
    let (stdout, stderr) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    assert!(
        out.status.success(),
        "promtool {arguments:?}: {stdout}{stderr}"
    );
}

#[test]
fn promtool_accepts_the_rules_and_the_queries_of_the_dashboard() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, rules: &Value| {
        fs::write(directory.path().join(name), rules.to_string()).unwrap();
    };
    write("rules.yaml", &rules());
    let queries = dashboard_queries().into_iter().enumerate();
    let recorded: Vec<Value> = queries
        .map(|(n, query)| json!({"record": format!("ebb:query:{n}"), "expr": query}))
        .collect();
    write(
        "queries.yaml",
        &json!({"groups": [{"name": "dashboard", "rules": recorded}]}),
    );
    promtool(
        directory.path(),
        &[
            "check",
            "rules",
            "--lint=all",
            "--lint-fatal",
            "rules.yaml",
            "queries.yaml",
        ],
    );
}

#[test]
fn the_alerts_fire_when_they_should() {
    let directory = tempfile::tempdir().unwrap();
    let mut rules = rules();
    let mut tested = read("agent/tests/deploy/rules_test.yaml");
    for rule in rules["groups"][0]["rules"].as_array_mut().unwrap() {
        let name = rule["alert"].as_str().unwrap();
        assert!(
            tested.contains(&format!("alertname: {name}\n")),
            "{name} is not tested"
        );
        // The test file has the summaries alone.
        assert!(
            rule["annotations"]
                .as_object_mut()
                .unwrap()
                .remove("description")
                .is_some()
        );
    }
    let path = |name: &str| directory.path().join(name);
    fs::write(path("rules.yaml"), rules.to_string()).unwrap();
    fs::write(path("test.yaml"), &tested).unwrap();
    promtool(directory.path(), &["test", "rules", "test.yaml"]);
    // The test can fail.
    tested = tested.replace(
        "eval_time: 10m, alertname: EbbUntrackedPods",
        "eval_time: 20m, alertname: EbbUntrackedPods",
    );
    fs::write(path("test.yaml"), tested).unwrap();
    let failed =
        std::panic::catch_unwind(|| promtool(directory.path(), &["test", "rules", "test.yaml"]));
    assert!(failed.is_err());
}
