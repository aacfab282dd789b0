//! Names for the peers of flows.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use ebb_core::scope::Scope;

use super::table::PodTable;

/// The owner of each address: a pod of the node, or the node itself.
pub(crate) type PeerNames = HashMap<IpAddr, Arc<str>>;

/// The owners of the addresses of these pods and of the node.
pub(crate) fn of(table: &PodTable) -> PeerNames {
    // Without them, the node's addresses have no name.
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let node = Arc::<str>::from("node");
    let own = interfaces.iter().map(|i| (i.ip(), Arc::clone(&node)));
    // In a pod, loopback is the pod itself.
    let mut names: HashMap<_, _> = own.filter(|(ip, _)| !ip.is_loopback()).collect();
    let pods = table
        .iter()
        .filter(|pod| matches!(pod.scope, Scope::Netns { .. }));
    for pod in pods {
        let name = Arc::<str>::from(pod.name.to_string());
        names.extend(pod.ips.iter().map(|ip| (*ip, Arc::clone(&name))));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::table::tests::pod;

    #[test]
    fn addresses_of_pods_have_their_names_and_loopback_has_none() {
        let mut on_host = pod("u2", "on-host", &[]);
        on_host.scope = Scope::HostNetwork(vec![]);
        on_host.ips = vec!["192.0.2.77".parse().unwrap()];
        let names = of(&PodTable::new([pod("u1", "web-0", &[]), on_host]));
        let name = |ip: &str| names.get(&ip.parse().unwrap()).map(AsRef::as_ref);
        assert_eq!(name("10.88.0.7"), Some("shop/web-0"));
        // The node's address is no pod's.
        assert_eq!(name("192.0.2.77"), None);
        assert_eq!(name("127.0.0.1"), None);
    }
}
