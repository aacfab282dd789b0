//! Which pods and flows a list contains.

use std::net::IpAddr;

use ebb_core::flow::{Direction, Flow, FlowState};
use ebb_protocol::filter::{FlowQuery, FlowSort, LabelSelector, OwnerRef, PeerNetworks};

use super::api::by_address;
use crate::pods::{Pod, table::PodTable};

/// Selects pods.
pub(super) struct PodFilter {
    namespace: Option<String>,
    labels: LabelSelector,
    owner: Option<OwnerRef>,
}

impl PodFilter {
    /// # Errors
    ///
    /// What is wrong with the selector.
    pub(super) fn new(
        namespace: Option<String>,
        labels: Option<&str>,
        owner: Option<OwnerRef>,
    ) -> Result<Self, String> {
        let labels = labels.map_or(Ok(LabelSelector::default()), str::parse)?;
        Ok(Self {
            namespace,
            labels,
            owner,
        })
    }

    pub(super) fn matches(&self, pod: &Pod) -> bool {
        let is_in = |namespace: &String| pod.name.namespace == *namespace;
        self.namespace.as_ref().is_none_or(is_in)
            && self.labels.matches(&pod.labels)
            && self
                .owner
                .as_ref()
                .is_none_or(|owner| pod.is_owned_by(owner))
    }
}

/// Selects flows.
pub(super) struct FlowFilter {
    all: bool,
    states: Option<Vec<FlowState>>,
    peer: Option<Peer>,
    port: Option<u16>,
}

enum Peer {
    Networks(PeerNetworks),
    Pod(Vec<IpAddr>),
}

impl FlowFilter {
    /// # Errors
    ///
    /// What is wrong with the query.
    pub(super) fn new(query: &FlowQuery, table: &PodTable) -> Result<Self, String> {
        let states = query.state.as_deref().map(states).transpose()?;
        Ok(Self {
            all: query.all,
            states,
            peer: query.peer.as_deref().map(|p| peer(p, table)).transpose()?,
            port: query.port,
        })
    }

    pub(super) fn matches(&self, flow: &Flow) -> bool {
        let peer = flow.remote.ip().to_canonical();
        let is_from = |wanted: &Peer| match wanted {
            Peer::Networks(networks) => networks.contains(peer),
            Peer::Pod(ips) => ips.contains(&peer),
        };
        (self.all || flow.direction == Direction::Inbound)
            && self.states.as_ref().is_none_or(|s| s.contains(&flow.state))
            && self.peer.as_ref().is_none_or(is_from)
            && self.port.is_none_or(|port| flow.local.port() == port)
    }
}

/// Parses `active,idle`.
fn states(list: &str) -> Result<Vec<FlowState>, String> {
    let state = |name: &str| {
        let state = FlowState::ALL.into_iter().find(|s| s.name() == name);
        state.ok_or_else(|| {
            let names = FlowState::ALL.map(FlowState::name).join(", ");
            format!("{name:?} is no state of a flow; the states are {names}")
        })
    };
    list.split(',').map(|name| state(name.trim())).collect()
}

fn peer(text: &str, table: &PodTable) -> Result<Peer, String> {
    if let Ok(networks) = text.parse() {
        return Ok(Peer::Networks(networks));
    }
    let pod = table.find(text).map_err(|e| {
        let candidates = e.clone().candidates();
        let named = match candidates.is_empty() {
            true => String::new(),
            false => format!(": {}", candidates.join(", ")),
        };
        format!("--peer {text}: no address, no network such as 10.0.0.0/8, and {e}{named}")
    })?;
    if pod.ips.is_empty() {
        return Err(format!("--peer {text}: the pod has no address"));
    }
    Ok(Peer::Pod(pod.ips.clone()))
}

/// The key of the order `sort`: the smallest first.
pub(super) fn flow_key(sort: FlowSort, flow: &Flow) -> (bool, u128, u16) {
    let largest_first = |n: u128| (false, u128::MAX - n, 0);
    match sort {
        FlowSort::Peer => by_address(flow.remote),
        FlowSort::Age => largest_first(flow.age_to_show().at_least().as_nanos()),
        FlowSort::Quiet => largest_first(flow.quiet_for.as_nanos()),
        FlowSort::In => largest_first(flow.bytes_in.into()),
        FlowSort::Out => largest_first(flow.bytes_out.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::table::tests::pod;

    #[test]
    fn a_wrong_filter_says_what_is_known() {
        let why = states("idle,busy").unwrap_err();
        assert!(why.contains("busy") && why.contains("half-closed"), "{why}");
        assert_eq!(states("idle, active").unwrap().len(), 2);
        let table = PodTable::new([pod("u1", "web-0", &[]), pod("u2", "web-1", &[])]);
        assert!(matches!(peer("10.0.0.0/8", &table), Ok(Peer::Networks(_))));
        let two = peer("10.0.0.7,fd00::7", &table);
        assert!(matches!(two, Ok(Peer::Networks(_))));
        assert!(matches!(peer("shop/web-0", &table), Ok(Peer::Pod(_))));
        let why = peer("web", &table).err().unwrap();
        assert!(why.contains("shop/web-0, shop/web-1"), "{why}");
        assert!(peer("db", &table).err().unwrap().contains("no network"));
    }
}
