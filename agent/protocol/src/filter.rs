//! What the lists of pods and flows leave out, and their order: the query of `GET /v1/pods` and `GET /v1/flows`, as the
//! flags of the command line have it.

use std::{collections::BTreeMap, net::IpAddr, str::FromStr};

use ebb_core::ip_network::IpNetwork;
use serde::{Deserialize, Serialize};

/// The query of `GET /v1/pods`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodQuery {
    /// Only the pod of this name, `NAMESPACE/NAME` or UID, or the beginning of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Only pods of this namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Only pods with these labels: a [`LabelSelector`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<String>,
    /// Only pods of this owner: an [`OwnerRef`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

/// The query of `GET /v1/drains`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainQuery {
    /// Answer only when the snapshot has another number than this, or after 8 s. The answer then has the numbers of
    /// flows as each drain last saw them, and costs no dump.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u64>,
}

/// The kind of a pod's owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnerKind {
    /// A Deployment.
    Deployment,
    /// A StatefulSet.
    StatefulSet,
    /// A DaemonSet.
    DaemonSet,
    /// A Job or a CronJob.
    Job,
}

/// The owner of pods, as `kubectl` names it: `deploy/web`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerRef {
    /// Its kind.
    pub kind: OwnerKind,
    /// Its name.
    pub name: String,
}

impl OwnerRef {
    /// `None` if the text is no owner. `deploy/web` is never the pod `web` in a namespace `deploy`.
    pub fn parse(text: &str) -> Option<Self> {
        let (kind, name) = text.split_once('/')?;
        let kind = match kind {
            "deploy" | "deployment" | "deployments" => OwnerKind::Deployment,
            "sts" | "statefulset" | "statefulsets" => OwnerKind::StatefulSet,
            "ds" | "daemonset" | "daemonsets" => OwnerKind::DaemonSet,
            "job" | "jobs" | "cj" | "cronjob" | "cronjobs" => OwnerKind::Job,
            _ => return None,
        };
        let name = name.to_owned();
        (!name.is_empty()).then_some(Self { kind, name })
    }
}

/// The query of `GET /v1/flows`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowQuery {
    /// Only the pod of this name, or the pods of this owner ([`OwnerRef`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Also flows that pods opened themselves.
    #[serde(default)]
    pub all: bool,
    /// Only pods of this namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Only pods with these labels: a [`LabelSelector`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<String>,
    /// Only flows in one of these states, separated by commas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Only flows whose peer is in these [`PeerNetworks`], or is this pod of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// Only flows with this port at the pod's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The order within each pod, or of all flows. By pod, state and address if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sort: Option<FlowSort>,
    /// More columns, in text.
    #[serde(default)]
    pub wide: bool,
    /// No line with the names of the columns, in text.
    #[serde(default)]
    pub no_headers: bool,
}

/// An order of flows. The largest value comes first, except for addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowSort {
    /// By the peer's address.
    Peer,
    /// By the time since they were opened.
    Age,
    /// By the time since the last byte.
    Quiet,
    /// By the bytes from the peer.
    In,
    /// By the bytes to the peer.
    Out,
}

/// A comparison of one label, as in `kubectl -l`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    /// `KEY=VALUE`, `KEY==VALUE` or `KEY in (A,B)`.
    In(String, Vec<String>),
    /// `KEY!=VALUE` or `KEY notin (A,B)`. Also true without the label.
    NotIn(String, Vec<String>),
    /// `KEY`.
    Exists(String),
    /// `!KEY`.
    Missing(String),
}

impl Requirement {
    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        match self {
            Self::In(key, values) => labels.get(key).is_some_and(|v| values.contains(v)),
            Self::NotIn(key, values) => labels.get(key).is_none_or(|v| !values.contains(v)),
            Self::Exists(key) => labels.contains_key(key),
            Self::Missing(key) => !labels.contains_key(key),
        }
    }
}

/// Comparisons of labels that must all be true: `app=web,tier!=cache,canary,!debug,zone in (a,b)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector(Vec<Requirement>);

impl LabelSelector {
    /// Whether a pod with these labels is meant.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|r| r.matches(labels))
    }
}

impl FromStr for LabelSelector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = split_outside_parentheses(text);
        let requirements = parts.into_iter().map(requirement);
        requirements.collect::<Result<_, _>>().map(Self)
    }
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let mut depth = 0_i32;
    text.split(|c| {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        c == ',' && depth == 0
    })
    .collect()
}

fn requirement(text: &str) -> Result<Requirement, String> {
    let text = text.trim();
    let wrong = || {
        format!(
            "{text:?} is no label selector; write KEY=VALUE, KEY!=VALUE, KEY, !KEY or KEY in (A,B)"
        )
    };
    let word = |word: &str| {
        let word = word.trim();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        word.chars().all(plain).then(|| word.to_owned())
    };
    let key = |key: &str| word(key).filter(|key| !key.is_empty()).ok_or_else(wrong);
    let value = |value: &str| word(value).ok_or_else(wrong);
    let values = |list: &str| {
        let list = list
            .trim()
            .strip_prefix('(')
            .and_then(|l| l.strip_suffix(')'));
        let list = list.ok_or_else(wrong)?.split(',').map(value);
        list.collect::<Result<Vec<_>, _>>()
    };
    if let Some((k, v)) = text.split_once("!=") {
        return Ok(Requirement::NotIn(key(k)?, vec![value(v)?]));
    }
    if let Some((k, v)) = text.split_once("==").or_else(|| text.split_once('=')) {
        return Ok(Requirement::In(key(k)?, vec![value(v)?]));
    }
    if let Some((k, list)) = text.split_once(" notin ") {
        return Ok(Requirement::NotIn(key(k)?, values(list)?));
    }
    if let Some((k, list)) = text.split_once(" in ") {
        return Ok(Requirement::In(key(k)?, values(list)?));
    }
    match text.strip_prefix('!') {
        Some(k) => key(k).map(Requirement::Missing),
        None => key(text).map(Requirement::Exists),
    }
}

/// Addresses and networks: `10.0.0.7,fd00::/8`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerNetworks(Vec<IpNetwork>);

impl PeerNetworks {
    /// Whether the address is in one of them.
    pub fn contains(&self, other: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(other))
    }
}

impl FromStr for PeerNetworks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let networks = text.split(',').map(|part| part.trim().parse());
        networks.collect::<Result<_, _>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_selected_as_kubectl_does() {
        let labels: BTreeMap<String, String> = [("app", "web"), ("zone", "b"), ("canary", "")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        let matches = |text: &str| {
            let selector: LabelSelector = text.parse().unwrap();
            selector.matches(&labels)
        };
        for yes in [
            "app=web",
            "app==web,zone!=a",
            "canary",
            "!debug",
            "debug!=x",
            "zone in (a, b),app = web",
            "zone notin (a,c)",
            "canary=",
        ] {
            assert!(matches(yes), "{yes}");
        }
        for no in [
            "app=db",
            "app=web,zone=a",
            "!app",
            "debug",
            "zone in (a,c)",
            "zone notin (b)",
        ] {
            assert!(!matches(no), "{no}");
        }
        for wrong in ["", "=x", "a=b c", "a in b", "a,", "a in (b", "!", "a>1"] {
            let why = wrong.parse::<LabelSelector>().unwrap_err();
            assert!(why.contains("KEY=VALUE"), "{wrong}: {why}");
        }
    }

    #[test]
    fn owners_are_named_as_kubectl_names_them() {
        let of = |text: &str| OwnerRef::parse(text).map(|owner| (owner.kind, owner.name));
        let web = || "web".to_owned();
        assert_eq!(of("deploy/web"), Some((OwnerKind::Deployment, web())));
        assert_eq!(of("statefulset/web"), Some((OwnerKind::StatefulSet, web())));
        assert_eq!(of("ds/web"), Some((OwnerKind::DaemonSet, web())));
        assert_eq!(of("cronjobs/web"), Some((OwnerKind::Job, web())));
        for none in ["web", "shop/web", "deploy/", "", "/web"] {
            assert_eq!(of(none), None, "{none}");
        }
    }

    #[test]
    fn networks_are_separated_by_commas() {
        let networks: PeerNetworks = "10.0.0.7, fd00::/8".parse().unwrap();
        let contains = |text: &str| networks.contains(text.parse().unwrap());
        assert!(contains("10.0.0.7") && contains("fd12::1"));
        assert!(!contains("10.0.0.8") && !contains("fe80::1"));
        for wrong in ["", "10.0.0.7,", "10.0.0.7,web"] {
            assert!(wrong.parse::<PeerNetworks>().is_err(), "{wrong}");
        }
    }
}
