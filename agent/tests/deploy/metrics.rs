//! docs/metrics.md, and the names of metrics in all documents.

use std::{collections::BTreeSet, fs};

use ebb::telemetry::reference;

use crate::manifest::{read, repository};

const DOCUMENT: &str = "docs/metrics.md";

#[test]
fn the_reference_of_metrics_is_the_registrys() {
    let document = reference::document().unwrap();
    if std::env::var_os("EBB_WRITE_DOCS").is_some() {
        fs::write(repository().join(DOCUMENT), &document).unwrap();
    }
    assert!(
        read(DOCUMENT) == document,
        "{DOCUMENT} is not up to date: write it with EBB_WRITE_DOCS=1 cargo test -p ebb --test deploy metrics"
    );
}

#[test]
fn every_metric_has_help_labels_of_a_bounded_set_and_a_name_that_follows_the_rules() {
    let metrics = reference::metrics().unwrap();
    assert!(metrics.len() > 35, "{}", metrics.len());
    let labels = [
        "evidence",
        "kind",
        "method",
        "namespace",
        "outcome",
        "reason",
        "state",
        "version",
        "workload",
    ];
    let mut names = BTreeSet::new();
    for metric in &metrics {
        let name = &metric.name;
        assert!(names.insert(name), "{name} twice");
        assert!(
            metric.help.ends_with('.') && metric.help.len() > 10,
            "{metric:?}"
        );
        assert!(
            metric.labels.iter().all(|l| labels.contains(&l.as_str())),
            "{metric:?}"
        );
        assert_eq!(
            metric.kind == "counter",
            name.ends_with("_total"),
            "{metric:?}"
        );
        let stem = name.strip_suffix("_total").unwrap_or(name);
        assert!(
            metric.unit.is_empty() || stem.ends_with(&format!("_{}", metric.unit)),
            "{metric:?}"
        );
        let is_time = stem.ends_with("_seconds");
        assert!(metric.kind != "histogram" || is_time, "{metric:?}");
        assert_eq!(is_time, metric.unit == "seconds", "{metric:?}");
    }
}

#[test]
fn the_documents_name_only_metrics_that_exist() {
    let metrics = reference::metrics().unwrap();
    let exists = |name: &str| {
        let mut series = metrics.iter().flat_map(|m| {
            let more = ["_bucket", "_count", "_sum"].map(|end| format!("{}{end}", m.name));
            let more = more.into_iter().filter(|_| m.kind == "histogram");
            more.chain([m.name.clone()])
        });
        series.any(|n| n == name)
    };
    let mut named = 0;
    for document in crate::readme::documents().iter().filter(|d| *d != DOCUMENT) {
        let text = read(document);
        // In code, with its labels or alone.
        for code in text
            .split('`')
            .skip(1)
            .step_by(2)
            .filter(|c| c.starts_with("ebb_"))
        {
            let end = code.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
            let (name, rest) = code.split_at(end.unwrap_or(code.len()));
            if rest.is_empty() || rest.starts_with('{') {
                assert!(exists(name), "{document}: {name}");
                named += 1;
            }
        }
    }
    assert!(named >= 5, "{named}");
}
