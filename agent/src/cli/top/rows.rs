//! The rows of each view: which of them, and in which order. Pure.

use std::{cmp::Ordering, net::SocketAddr};

use ebb_core::{
    drain_report::Report,
    flow::{Direction, FlowCounts},
    ids::PodUid,
};
use ebb_protocol::views::{DrainList, FlowList, FlowView, PodList, PodView};

use super::{
    details::{self, TextLine},
    state::{Page, TopState, View},
};

/// What identifies a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FlowId {
    local: SocketAddr,
    remote: SocketAddr,
    direction: Direction,
}

impl FlowId {
    pub(super) const fn of(flow: &FlowView) -> Self {
        Self {
            local: flow.local,
            remote: flow.remote,
            direction: flow.direction,
        }
    }

    pub(super) const fn remote(&self) -> SocketAddr {
        self.remote
    }
}

/// What identifies a row of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RowId {
    Pod(PodUid),
    Drain(PodUid, String),
    Flow(FlowId),
}

/// A pod, and its drain if one is under way.
#[derive(Clone, Copy)]
pub(super) struct PodRow<'a> {
    pub(super) pod: &'a PodView,
    pub(super) drain: Option<&'a Report>,
}

/// What a page shows.
pub(super) enum Rows<'a> {
    Pods(Vec<PodRow<'a>>),
    Drains(Vec<&'a Report>),
    Flows(Vec<&'a FlowView>),
    Text(Vec<TextLine>),
    /// The agent has not answered yet.
    Unknown,
}

impl Rows<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Pods(pods) => pods.len(),
            Self::Drains(drains) => drains.len(),
            Self::Flows(flows) => flows.len(),
            Self::Text(lines) => lines.len(),
            Self::Unknown => 0,
        }
    }

    /// Whether rows can be selected.
    pub(super) const fn are_a_list(&self) -> bool {
        !matches!(self, Self::Text(_))
    }

    pub(super) fn id(&self, index: usize) -> Option<RowId> {
        Some(match self {
            Self::Pods(pods) => RowId::Pod(pods.get(index)?.pod.pod.uid.clone()),
            Self::Drains(drains) => {
                let report = drains.get(index)?;
                RowId::Drain(report.pod.uid.clone(), report.started_at.clone())
            }
            Self::Flows(flows) => RowId::Flow(FlowId::of(flows.get(index)?)),
            Self::Text(_) | Self::Unknown => return None,
        })
    }

    pub(super) fn position(&self, id: &RowId) -> Option<usize> {
        match (self, id) {
            (Self::Pods(pods), RowId::Pod(uid)) => {
                pods.iter().position(|row| row.pod.pod.uid == *uid)
            }
            (Self::Drains(drains), RowId::Drain(uid, started)) => drains
                .iter()
                .position(|r| r.pod.uid == *uid && r.started_at == *started),
            (Self::Flows(flows), RowId::Flow(id)) => {
                flows.iter().position(|flow| FlowId::of(flow) == *id)
            }
            _ => None,
        }
    }
}

/// The agent's last answers.
#[derive(Default)]
pub(super) struct Answers {
    pub(super) pods: Option<PodList>,
    pub(super) drains: Option<DrainList>,
    /// The connections of one pod.
    pub(super) flows: Option<(PodUid, FlowList)>,
}

impl Answers {
    /// The rows of the page that is shown, on a screen of this width.
    pub(super) fn rows(&self, state: &TopState, width: usize) -> Rows<'_> {
        let page = state.page();
        match &page.view {
            View::Pods => self.pods.as_ref().map(|list| {
                let rows = pod_rows(list, self.drains.as_ref());
                let shown = |row: &PodRow<'_>| {
                    (state.empty_pods || !is_empty(row)) && page.accepts(|| pod_text(row.pod))
                };
                Rows::Pods(sorted(rows.filter(shown), page, &pod_orders()))
            }),
            View::Drains => self.drains.as_ref().map(|list| {
                let rows = list
                    .drains
                    .iter()
                    .filter(|r| page.accepts(|| drain_text(r)));
                Rows::Drains(sorted(rows, page, &drain_orders()))
            }),
            View::Flows(pod) => self.flows_of(&pod.uid).map(|list| {
                let rows = list.flows.iter().filter(|f| page.accepts(|| flow_text(f)));
                Rows::Flows(sorted(rows, page, &flow_orders()))
            }),
            View::FlowDetails(pod, id) => self.flows_of(&pod.uid).map(|list| {
                let flow = list.flows.iter().find(|flow| FlowId::of(flow) == *id);
                Rows::Text(details::wrapped(details::flow(pod, id, flow), width))
            }),
            View::DrainReport(pod, started) => self.drains.as_ref().map(|list| {
                // Drains under way come first, then finished ones, newest first.
                let report = list.drains.iter().find(|r| {
                    r.pod.uid == pod.uid && started.as_ref().is_none_or(|at| r.started_at == *at)
                });
                Rows::Text(details::wrapped(details::report(pod, report), width))
            }),
        }
        .unwrap_or(Rows::Unknown)
    }

    /// The connections of this pod, if they are the last that were asked for.
    pub(super) fn flows_of(&self, pod: &PodUid) -> Option<&FlowList> {
        let (of, list) = self.flows.as_ref()?;
        (of == pod).then_some(list)
    }
}

/// The pods, each with its drain under way.
pub(super) fn pod_rows<'a>(
    pods: &'a PodList,
    drains: Option<&'a DrainList>,
) -> impl Iterator<Item = PodRow<'a>> {
    let drains = drains.map_or(&[][..], |list| &list.drains);
    pods.pods.iter().map(|pod| PodRow {
        pod,
        drain: drains
            .iter()
            .find(|r| r.reason.is_none() && r.pod.uid == pod.pod.uid),
    })
}

/// Whether a pod surely has no connection and does not drain.
fn is_empty(row: &PodRow<'_>) -> bool {
    row.drain.is_none() && row.pod.flows.is_some_and(|flows| flows.total() == 0)
}

/// What a filter searches.
fn pod_text(pod: &PodView) -> String {
    let labels = pod.labels.iter().map(|(k, v)| format!(" {k}={v}"));
    format!("{}{}", pod.pod, labels.collect::<String>())
}

fn drain_text(r: &Report) -> String {
    let why = r.reason.map_or("under way", |reason| reason.name());
    format!("{} {why}", r.pod)
}

fn flow_text(flow: &FlowView) -> String {
    let why = flow.exempt.map_or("", |why| why.name());
    let container = flow.container.as_deref().unwrap_or_default();
    let peer = flow.peer.as_deref().unwrap_or_default();
    let (state, remote, local) = (flow.state, flow.remote, flow.local);
    format!("{state} {remote} {peer} {local} {container} {why}")
}

/// An order, and the column that shows it.
type Order<T> = (&'static str, fn(&T, &T) -> Ordering);

/// Draining pods, then the busiest ones. Unknown numbers come last.
pub(super) fn busiest_first(a: &PodRow<'_>, b: &PodRow<'_>) -> Ordering {
    let key = |row: &PodRow<'_>| {
        let flows = row.pod.flows.map(|f| (f.live(), f.idle));
        (row.drain.is_some(), flows)
    };
    key(b).cmp(&key(a))
}

fn pod_orders<'a>() -> [Order<PodRow<'a>>; 8] {
    [
        ("", busiest_first),
        ("NAME", |a, b| by_name(a).cmp(&by_name(b))),
        ("LIVE", |a, b| live(b).cmp(&live(a))),
        ("IDLE", |a, b| idle(b).cmp(&idle(a))),
        ("NEW/S", |a, b| {
            let rate = |row: &PodRow<'_>| row.pod.new_per_second.unwrap_or(-1.0);
            rate(b).total_cmp(&rate(a))
        }),
        ("PEERS", |a, b| b.pod.peers.cmp(&a.pod.peers)),
        ("OLDEST", |a, b| b.pod.oldest_ms.cmp(&a.pod.oldest_ms)),
        ("LEFT", |a, b| {
            let left = |row: &PodRow<'_>| row.drain.map_or(u64::MAX, left_ms);
            left(a).cmp(&left(b))
        }),
    ]
}

fn drain_orders<'a>() -> [Order<&'a Report>; 5] {
    [
        ("", |_, _| Ordering::Equal),
        ("NAME", |a, b| {
            (&a.pod.namespace, &a.pod.name).cmp(&(&b.pod.namespace, &b.pod.name))
        }),
        ("HELD", |a, b| b.held_ms.cmp(&a.held_ms)),
        ("START", |a, b| {
            let at_start = |r: &Report| r.flows_at_start.as_ref().map(FlowCounts::total);
            at_start(b).cmp(&at_start(a))
        }),
        ("CUT", |a, b| b.cut_total.cmp(&a.cut_total)),
    ]
}

fn flow_orders<'a>() -> [Order<&'a FlowView>; 6] {
    [
        ("STATE", |_, _| Ordering::Equal),
        ("PEER", |a, b| a.remote.cmp(&b.remote)),
        ("AGE", |a, b| age(b).cmp(&age(a))),
        ("QUIET", |a, b| b.quiet_ms.cmp(&a.quiet_ms)),
        ("IN", |a, b| b.bytes_in.cmp(&a.bytes_in)),
        ("OUT", |a, b| b.bytes_out.cmp(&a.bytes_out)),
    ]
}

fn by_name<'a>(row: &PodRow<'a>) -> (&'a str, &'a str) {
    (&row.pod.pod.namespace, &row.pod.pod.name)
}

fn live(row: &PodRow<'_>) -> Option<u32> {
    row.pod.flows.map(|f| f.live())
}

fn idle(row: &PodRow<'_>) -> Option<u32> {
    row.pod.flows.map(|f| f.idle)
}

fn age(flow: &FlowView) -> Option<u64> {
    flow.age_ms.or(flow.age_at_least_ms)
}

/// The time until the deadline.
pub(super) const fn left_ms(drain: &Report) -> u64 {
    drain.deadline_ms.saturating_sub(drain.held_ms)
}

/// The columns by which a view can be sorted. An empty name is the order of the view itself.
pub(super) fn sort_columns(view: &View) -> Vec<&'static str> {
    match view {
        View::Pods => pod_orders().iter().map(|(column, _)| *column).collect(),
        View::Drains => drain_orders().iter().map(|(column, _)| *column).collect(),
        View::Flows(_) => flow_orders().iter().map(|(column, _)| *column).collect(),
        View::FlowDetails(..) | View::DrainReport(..) => vec![],
    }
}

/// The rows in the order of the page. Equal rows stay in the agent's order.
fn sorted<T>(rows: impl Iterator<Item = T>, page: &Page, orders: &[Order<T>]) -> Vec<T> {
    let mut rows: Vec<_> = rows.collect();
    if let Some((_, compare)) = orders.get(page.sort) {
        rows.sort_by(compare);
    }
    if page.reversed {
        rows.reverse();
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::{
        super::{state::KeyOutcome, testing::answers},
        *,
    };
    use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

    fn press(state: &mut TopState, answers: &Answers, keys: &str) {
        for key in keys.chars() {
            let key = KeyEvent::new(KeyCode::Char(key), KeyModifiers::NONE);
            let outcome = state.press(key, &answers.rows(state, 80), 20);
            assert_eq!(outcome, KeyOutcome::Continue);
        }
    }

    fn names(state: &TopState, answers: &Answers) -> String {
        match answers.rows(state, 80) {
            Rows::Pods(rows) => {
                let names: Vec<_> = rows.iter().map(|row| row.pod.pod.name.as_str()).collect();
                names.join(" ")
            }
            _ => String::new(),
        }
    }

    #[test]
    fn pods_are_sorted_by_each_column_and_reversed() {
        let answers = answers(0);
        let mut state = TopState::new();
        let mut seen = vec![];
        for _ in sort_columns(&View::Pods) {
            seen.push(names(&state, &answers));
            press(&mut state, &answers, "s");
        }
        assert_eq!(
            seen,
            [
                "going web api cache",
                "api cache going web",
                "web api going cache",
                "api going web cache",
                "api going web cache",
                "api going web cache",
                "api going web cache",
                "going api cache web",
            ]
        );
        press(&mut state, &answers, "r");
        assert_eq!(names(&state, &answers), "cache api web going");
    }

    #[test]
    fn a_filter_finds_names_and_labels_and_empty_pods_can_be_hidden() {
        let mut answers = answers(0);
        let mut state = TopState::new();
        press(&mut state, &answers, "/SHOP app=we");
        assert_eq!(names(&state, &answers), "web");
        let pods = &mut answers.pods.as_mut().unwrap().pods;
        pods[3].flows = Some(FlowCounts::default());
        pods[2].flows = Some(FlowCounts::default());
        let mut state = TopState::new();
        press(&mut state, &answers, "e");
        // One that drains, and one of which nothing is known, stay.
        assert_eq!(names(&state, &answers), "going api cache");
    }
}
