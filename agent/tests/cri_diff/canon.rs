//! Two replies to the same request may differ in values that the runtime generates or measures, and in nothing else.
//!
//! Messages are compared in their wire format, without their schema, so that fields unknown to these tests count too.

use std::{collections::BTreeMap, sync::LazyLock};

use anyhow::Result;
use regex::Regex;

use crate::{
    client::{Fields, Outcome, Recording, unhex},
    script::Step,
};

/// Values that differ in any two replies, and their placeholders. The ids of the pod and its containers are replaced
/// too.
static GENERATED: LazyLock<Vec<(Regex, &'static str)>> = LazyLock::new(|| {
    let patterns = [
        (r"\d{4}-\d\d-\d\dT[\d:.]+(Z|[+-][\d:]+)", "<time>"),
        // A single digit is a namespace mode.
        (r#""pid":\d{2,}"#, "<pid>"),
        (r"/proc/\d+/ns/", "/proc/<pid>/ns/"),
        // The URLs that Exec, Attach and PortForward answer with.
        (
            r"http://127\.0\.0\.1:\d+/(\w+)/[\w-]+",
            "http://<port>/$1/<token>",
        ),
        (r"10\.88\.0\.\d+", "<IPv4>"),
        (r"fd00:ebb::[0-9a-f]+", "<IPv6>"),
        (r"netns/cni-[0-9a-f-]+", "netns/<netns>"),
        (r"veth[0-9a-f]{8}", "<veth>"),
        (r"([0-9a-f]{2}:){5}[0-9a-f]{2}", "<mac>"),
        // The id that ExecSync gives its command, in errors.
        (r#"exec "[0-9a-f]{64}""#, r#"exec "<exec>""#),
        // The number of a snapshot in containerd's overlay file system.
        (r"snapshots/\d+/", "snapshots/<n>/"),
    ];
    patterns
        .into_iter()
        .map(|(pattern, with)| (Regex::new(pattern).expect("a pattern"), with))
        .collect()
});

/// Calls whose replies contain measured figures.
const MEASURED: [&str; 6] = [
    "ImageFsInfo",
    "ContainerStats",
    "ListContainerStats",
    "PodSandboxStats",
    "ListPodSandboxStats",
    "ListPodSandboxMetrics",
];

/// Times from 2017 on, in nanoseconds since 1970. Except for limits, no other number of the CRI is as large.
const TIMES: std::ops::Range<u64> = 1_500_000_000_000_000_000..4_000_000_000_000_000_000;

/// One line for each step and part of its outcome.
pub(crate) fn canonical(script: &[Step], recording: &Recording) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (number, (step, outcome)) in script.iter().zip(&recording.outcomes).enumerate() {
        for line in outcome_lines(step, outcome, &recording.ids.iter().collect())? {
            lines.push(format!("{number} {}: {line}", step.method));
        }
    }
    Ok(lines)
}

fn outcome_lines(
    step: &Step,
    outcome: &Outcome,
    ids: &BTreeMap<&String, &String>,
) -> Result<Vec<String>> {
    let method = step.method.rsplit('/').next().unwrap_or_default();
    let canon = Canon {
        ids,
        measured: MEASURED.contains(&method),
        // An event contains the pod's state at that moment, which a later call may already have changed. Its container
        // and its kind do not change.
        only: (method == "GetContainerEvents").then_some(&[1, 2]),
    };
    let fields = |what, fields: &Fields| {
        let fields = fields.iter();
        let fields: Vec<_> = fields
            .map(|(name, value)| format!("{name}={}", canon.text(value)))
            .collect();
        format!("{what} {}", fields.join(" "))
    };
    let mut lines = vec![
        format!("status {}", canon.text(&outcome.status)),
        fields("headers", &outcome.headers),
    ];
    let mut messages = Vec::new();
    for message in &outcome.messages {
        let message = unhex(message)?;
        let message = canon.message(&message, true);
        messages.push(message.unwrap_or_else(|| "not a message".into()));
    }
    if step.streams {
        messages.sort();
    }
    lines.extend(messages);
    if let Some(trailers) = &outcome.trailers {
        lines.push(fields("trailers", trailers));
    }
    Ok(lines)
}

struct Canon<'a> {
    ids: &'a BTreeMap<&'a String, &'a String>,
    measured: bool,
    /// The only fields of the outermost message that count.
    only: Option<&'static [u64]>,
}

impl Canon<'_> {
    fn text(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (placeholder, id) in self.ids {
            text = text.replace(
                id.as_str(),
                &format!("<{}>", placeholder.trim_end_matches('-')),
            );
        }
        for (pattern, with) in GENERATED.iter() {
            text = pattern.replace_all(&text, *with).into_owned();
        }
        text
    }

    /// A message with its fields sorted by number and value, because Go's maps have no order.
    fn message(&self, mut bytes: &[u8], outermost: bool) -> Option<String> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes)?;
            let (number, value) = (key >> 3, self.value(key & 7, &mut bytes)?);
            if number == 0 {
                return None;
            }
            if !(outermost && self.only.is_some_and(|only| !only.contains(&number))) {
                fields.push((number, value));
            }
        }
        fields.sort();
        if self.measured {
            // A figure of 0 is not encoded at all.
            fields.retain(|(_, value)| value != "<figure>" && value != "{}");
        }
        let fields: Vec<_> = fields.iter().map(|(n, v)| format!("{n}: {v}")).collect();
        Some(format!("{{{}}}", fields.join(", ")))
    }

    fn value(&self, kind: u64, bytes: &mut &[u8]) -> Option<String> {
        match kind {
            0 => {
                let number = varint(bytes)?;
                Some(match number {
                    _ if self.measured => "<figure>".into(),
                    number if TIMES.contains(&number) => "<time>".into(),
                    number => number.to_string(),
                })
            }
            1 => bytes.split_off(..8).map(|fixed| format!("{fixed:?}")),
            5 => bytes.split_off(..4).map(|fixed| format!("{fixed:?}")),
            2 => {
                let length = usize::try_from(varint(bytes)?).ok()?;
                let value = bytes.split_off(..length)?;
                let text = std::str::from_utf8(value).ok();
                let text =
                    text.filter(|t| !t.chars().any(|c| c.is_control() && !"\n\t".contains(c)));
                Some(match text {
                    Some(text) if !text.is_empty() => format!("{:?}", self.text(text)),
                    _ => self
                        .message(value, false)
                        .unwrap_or_else(|| format!("{value:?}")),
                })
            }
            _ => None,
        }
    }
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.split_off_first()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
