//! Releases the drain of one pod by hand (`POST /v1/release`). That cuts off the clients that are still connected, so the
//! caller must give the pod's full name, and the answer says what was open.

use std::{collections::BTreeMap, sync::Arc};

use ebb_core::{
    drain_report::Report,
    ids::{PodName, PodUid},
};

use super::api::Api;
use crate::pods::table::{FindError, PodTable, is_called};

/// Why nothing was released.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReleaseError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error("{pod} is not draining; `ebb drains` lists the pods that are")]
    NotDraining { pod: PodName },
}

/// Releases the pod that `wanted` names in full. Returns the report of its drain.
///
/// A StatefulSet's new pod has the name of the one that ends. Of these two, the one that drains is meant.
pub(super) async fn release(
    api: &Api,
    table: &PodTable,
    wanted: &str,
) -> Result<Arc<Report>, ReleaseError> {
    let (pod, is_draining) = find(api, table, wanted)?;
    let released = match is_draining {
        true => api.drains.release(&pod.uid).await,
        false => None,
    };
    released.ok_or(ReleaseError::NotDraining { pod })
}

/// The pod that `wanted` names in full, and whether it is draining. Of two pods with this name, the one that drains.
pub(super) fn find(
    api: &Api,
    table: &PodTable,
    wanted: &str,
) -> Result<(PodName, bool), FindError> {
    let view = api.drains.view().borrow().clone();
    // The sandbox of a terminating pod may be gone from the list.
    let draining: BTreeMap<&PodUid, &PodName> =
        view.active.iter().map(|r| (&r.pod.uid, &r.pod)).collect();
    let listed = table.iter().map(|pod| (&pod.name.uid, &pod.name));
    let known: BTreeMap<&PodUid, &PodName> = listed
        .chain(draining.iter().map(|(uid, pod)| (*uid, *pod)))
        .filter(|(_, pod)| is_called(pod, wanted))
        .collect();
    let pods: Vec<&PodName> = known.values().copied().collect();
    let Some(first) = pods.first() else {
        return Err(not_found(wanted));
    };
    let is_same_name =
        |pod: &&PodName| (&pod.namespace, &pod.name) == (&first.namespace, &first.name);
    if !pods.iter().all(is_same_name) {
        return Err(FindError::ambiguous(wanted, &pods));
    }
    let under_way: Vec<&PodName> = pods
        .iter()
        .copied()
        .filter(|pod| draining.contains_key(&pod.uid))
        .collect();
    match (&under_way[..], &pods[..]) {
        ([pod], _) => Ok(((*pod).clone(), true)),
        ([], [pod]) => Ok(((*pod).clone(), false)),
        ([], _) => Err(FindError::ambiguous(wanted, &pods)),
        _ => Err(FindError::ambiguous(wanted, &under_way)),
    }
}

fn not_found(wanted: &str) -> FindError {
    FindError::NotFound {
        wanted: wanted.into(),
    }
}
