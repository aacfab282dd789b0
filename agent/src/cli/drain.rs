//! `ebb drain POD --dry-run`.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::Result;
use clap::{Args, CommandFactory as _, error::ErrorKind};
use ebb_core::{
    flow::{Direction, FlowState},
    format::duration,
    policy::{IdleFlows, Until},
};
use ebb_protocol::{
    table::{RenderedTable, TableStyle, flows},
    views::{DryRun, Explanation, FlowList, FlowView, PolicyView, SCHEMA},
};

use super::{
    Cli,
    output::{Document, ViewFlags},
};

#[derive(Args)]
pub(super) struct DrainFlags {
    /// The pod: its name, NAMESPACE/NAME or UID, or the beginning of one.
    pub(super) pod: String,
    /// Show what would hold if the pod were deleted now: its policy, its deadline and its connections. Changes nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    pub(super) view: ViewFlags,
}

pub(super) async fn run(flags: &DrainFlags) -> Result<()> {
    if !flags.dry_run {
        let why = "ebb starts no drain: a pod drains when it is deleted (kubectl delete pod, kubectl drain). \
                   `ebb drain POD --dry-run` shows what would hold it now, and `ebb wait POD` waits until it has drained";
        Cli::command()
            .error(ErrorKind::MissingRequiredArgument, why)
            .exit();
    }
    let client = flags.view.agent.client();
    let query = serde_urlencoded::to_string([("pod", flags.view.scope.pod(&flags.pod)?)])?;
    let explanation: Explanation = client.get_json(&format!("/v1/explain?{query}")).await?;
    let query =
        serde_urlencoded::to_string([("pod", explanation.pod.uid.as_str()), ("all", "true")])?;
    let list: FlowList = client.get_json(&format!("/v1/flows?{query}")).await?;
    flags.view.print(&dry_run(explanation, list)?)
}

/// What would hold a pod with this policy and these connections.
fn dry_run(explanation: Explanation, list: FlowList) -> Result<DryRun> {
    let Explanation {
        pod, now, drain, ..
    } = explanation;
    let Some(policy) = now else {
        anyhow::bail!(
            "{pod} is not on this node any more; `ebb explain` shows what happened to it"
        );
    };
    // The agent writes it, so it parses.
    let until: Until = setting(&policy, "until").parse().unwrap_or_default();
    let closes_idle =
        until == Until::Zero && setting(&policy, "idle-flows") == IdleFlows::Close.name();
    let mut holding = Vec::new();
    let mut not_holding = BTreeMap::new();
    let mut idle_closed = 0;
    for flow in list.flows {
        match why_not(&flow, until) {
            // ebb closes nothing of a pod that it does not hold, but idle flows do not count there either
            // (`Policy::for_observation`).
            None if closes_idle && is_closed_if_idle(&flow) => match policy.never_held {
                None => idle_closed += 1,
                Some(_) => *not_holding.entry(flow.state.name().to_owned()).or_insert(0) += 1,
            },
            None => holding.push(flow),
            Some(why) => *not_holding.entry(why.to_owned()).or_insert(0) += 1,
        }
    }
    Ok(DryRun {
        schema: SCHEMA.into(),
        pod,
        policy,
        until,
        is_draining: drain.is_some_and(|r| r.reason.is_none()),
        untracked: list.untracked.into_iter().next().map(|u| u.why),
        holding,
        idle_closed,
        not_holding,
    })
}

/// Whether the flow is one that ebb closes with `idle-flows: close`: it leaves connections that the pod dialled alone.
fn is_closed_if_idle(flow: &FlowView) -> bool {
    flow.state == FlowState::Idle && flow.direction == Direction::Inbound
}

/// Why a drain would not wait for the flow, once settling is over.
fn why_not(flow: &FlowView, until: Until) -> Option<&'static str> {
    match (flow.exempt, until) {
        (Some(exempt), _) => Some(exempt.name()),
        (None, Until::Settled) => Some("until-settled"),
        (None, Until::Idle) if !flow.live => Some(flow.state.name()),
        (None, _) if !flow.holds => Some(flow.state.name()),
        (None, _) => None,
    }
}

fn setting<'a>(policy: &'a PolicyView, name: &str) -> &'a str {
    let found = policy.settings.iter().find(|s| s.name == name);
    found.map_or("?", |s| s.value.as_str())
}

impl Document for DryRun {
    fn names(&self) -> Vec<String> {
        vec![self.pod.to_string()]
    }

    fn text(&self, style: TableStyle) -> RenderedTable {
        RenderedTable {
            table: text(self, style),
            notes: self.policy.warnings.clone(),
        }
    }
}

fn text(d: &DryRun, style: TableStyle) -> String {
    let mut out = format!("{} ({})\n", d.pod, d.pod.uid);
    let p = &d.policy;
    // Writing to a string does not fail.
    let _ = match &p.never_held {
        Some(why) => writeln!(out, "If it were deleted now, ebb would not hold it: {why}."),
        None => writeln!(
            out,
            "If it were deleted now, ebb would hold it for {} at most, and leave the application {} of its grace period{}.",
            duration(p.deadline_ms),
            duration(p.reserve_ms),
            p.grace_ms
                .map_or_else(String::new, |ms| format!(" of {}", duration(ms))),
        ),
    };
    if d.is_draining {
        out.push_str("It is draining already: `ebb drains` shows how far it is.\n");
    }
    let _ = writeln!(
        out,
        "Settling: until no client has connected for a while (quiet {}), {} at most. Then: until {}.",
        setting(p, "quiet"),
        setting(p, "settle-max"),
        d.until,
    );
    if let Some(why) = &d.untracked {
        let _ = writeln!(
            out,
            "ebb can't see its connections ({why}), so it would hold it for the settle time alone."
        );
        return out;
    }
    let _ = match d.holding.len() {
        0 => writeln!(out, "\nNo connection would hold it after settling."),
        1 => writeln!(out, "\n1 connection would hold it:"),
        n => writeln!(out, "\n{n} connections would hold it:"),
    };
    if !d.holding.is_empty() {
        out.push_str(&flows(d.holding.iter().cloned(), &[], style).table);
    }
    let _ = match d.idle_closed {
        0 => Ok(()),
        1 => writeln!(
            out,
            "\n1 connection is idle: ebb would close it after settling."
        ),
        n => writeln!(
            out,
            "\n{n} connections are idle: ebb would close them after settling."
        ),
    };
    let not: Vec<_> = d
        .not_holding
        .iter()
        .map(|(why, n)| format!("{n} {why}"))
        .collect();
    if !not.is_empty() {
        let _ = writeln!(out, "\nThese would not: {}.", not.join(", "));
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use ebb_core::{
        flow::Exempt,
        ids::{PodName, PodUid},
    };
    use ebb_protocol::views::{Setting, SettingSource};

    fn pod() -> PodName {
        PodName {
            uid: PodUid::new("u1"),
            namespace: "shop".into(),
            name: "web".into(),
        }
    }

    fn flow(state: FlowState, exempt: Option<Exempt>) -> FlowView {
        FlowView {
            pod: Arc::new(pod()),
            direction: Direction::Inbound,
            state,
            live: state.is_live(),
            holds: exempt.is_none() && state != FlowState::Lost,
            exempt,
            local: "10.0.0.1:80".parse().unwrap(),
            remote: "10.0.0.7:5000".parse().unwrap(),
            peer: None,
            age_ms: Some(1000),
            age_at_least_ms: None,
            quiet_ms: 10,
            bytes_in: 1,
            bytes_out: 2,
            container: None,
        }
    }

    fn of(until: &str, never_held: Option<&str>) -> DryRun {
        with_idle_flows("keep", until, never_held)
    }

    fn with_idle_flows(idle_flows: &str, until: &str, never_held: Option<&str>) -> DryRun {
        let setting = |name: &str, value: &str| Setting {
            name: name.into(),
            value: value.into(),
            from: SettingSource::Default,
        };
        let explanation = Explanation {
            schema: SCHEMA.into(),
            pod: pod(),
            agent_since: String::new(),
            deleting: None,
            now: Some(PolicyView {
                settings: vec![
                    setting("until", until),
                    setting("idle-flows", idle_flows),
                    setting("quiet", "3s"),
                    setting("settle-max", "15s"),
                ],
                warnings: vec![],
                grace_ms: Some(30_000),
                pre_stop_sleep_ms: None,
                reserve_ms: 5_000,
                deadline_ms: 25_000,
                never_held: never_held.map(Into::into),
            }),
            drain: None,
            stops: vec![],
            lifetimes: vec![],
        };
        let list = FlowList {
            schema: SCHEMA.into(),
            flows: vec![
                flow(FlowState::Active, None),
                flow(FlowState::Idle, None),
                flow(FlowState::Lost, None),
                flow(FlowState::Active, Some(Exempt::Probe)),
                flow(FlowState::Idle, Some(Exempt::Probe)),
            ],
            untracked: vec![],
        };
        dry_run(explanation, list).unwrap()
    }

    #[test]
    fn the_flows_that_would_hold_depend_on_until_and_the_others_are_counted_by_reason() {
        for (until, holding, not) in [
            ("zero", 2, "1 lost, 2 probe."),
            ("idle", 1, "1 idle, 1 lost, 2 probe."),
            ("settled", 0, "2 probe, 3 until-settled."),
        ] {
            let dry = of(until, None);
            assert_eq!(dry.holding.len(), holding, "{until}");
            let said = text(&dry, TableStyle::default());
            assert!(said.trim_end().ends_with(not), "{said}");
            assert!(said.contains("for 25.0s at most"), "{said}");
            assert!(said.contains("of 30.0s"), "{said}");
        }
    }

    #[test]
    fn idle_flows_that_ebb_would_close_are_counted_and_do_not_hold() {
        let dry = with_idle_flows("close", "zero", None);
        assert_eq!((dry.holding.len(), dry.idle_closed), (1, 1));
        let said = text(&dry, TableStyle::default());
        assert!(said.contains("1 connection would hold it"), "{said}");
        assert!(
            said.contains("1 connection is idle: ebb would close it"),
            "{said}"
        );
        // With `until: idle`, an idle flow does not hold anyway.
        let dry = with_idle_flows("close", "idle", None);
        assert_eq!((dry.holding.len(), dry.idle_closed), (1, 0));
        let dry = with_idle_flows("close", "zero", Some("ebb.dev/drain is observe"));
        assert_eq!((dry.holding.len(), dry.idle_closed), (1, 0));
        assert_eq!(dry.not_holding.get("idle"), Some(&1));
    }

    #[test]
    fn a_pod_that_is_never_held_says_why() {
        let said = text(
            &of("zero", Some("ebb.dev/drain is off")),
            TableStyle::default(),
        );
        assert!(
            said.contains("would not hold it: ebb.dev/drain is off."),
            "{said}"
        );
    }
}
