//! The annotations of namespaces: a pod's namespace may say whether its stops are held.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use ebb_core::policy::annotations::PREFIX;
use futures_util::StreamExt as _;
use k8s_openapi::{api::core::v1 as core, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Client,
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt as _,
        watcher::{Event, watcher},
    },
};
use tokio::sync::watch;
use tracing::{debug, warn};

use super::{from_cache, refusal};

/// ebb's annotations of each namespace that has some.
pub type NamespaceAnnotations = HashMap<String, BTreeMap<String, String>>;

/// Keeps `sender` current. If the API server refuses, warns once.
pub(super) async fn follow(client: Client, sender: watch::Sender<Arc<NamespaceAnnotations>>) {
    let api: Api<PartialObjectMeta<core::Namespace>> = Api::all(client);
    let mut events = std::pin::pin!(watcher(api, from_cache()).default_backoff());
    let mut listing = NamespaceAnnotations::new();
    let mut is_refused = false;
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => listing.clear(),
            Ok(Event::InitApply(namespace)) => listing.extend(reduce(namespace.metadata)),
            Ok(Event::InitDone) => {
                sender.send_replace(Arc::new(std::mem::take(&mut listing)));
            }
            Ok(Event::Apply(namespace)) => {
                let name = namespace.metadata.name.clone().unwrap_or_default();
                let reduced = reduce(namespace.metadata).map(|(_, annotations)| annotations);
                sender.send_if_modified(|all| {
                    let is_changed = all.get(&name) != reduced.as_ref();
                    if is_changed {
                        let all = Arc::make_mut(all);
                        match reduced {
                            Some(annotations) => drop(all.insert(name, annotations)),
                            None => drop(all.remove(&name)),
                        }
                    }
                    is_changed
                });
            }
            Ok(Event::Delete(namespace)) => {
                let name = namespace.metadata.name.unwrap_or_default();
                sender.send_if_modified(|all| Arc::make_mut(all).remove(&name).is_some());
            }
            Err(e) => match refusal(&e).filter(|status| status.code == 403) {
                Some(status) if !is_refused => {
                    is_refused = true;
                    warn!(
                        "the API server refuses to list or watch namespaces: {status}; ebb ignores {PREFIX}drain on \
                         namespaces"
                    );
                }
                // The watch on pods reports a server that is away.
                _ => debug!("the watch on namespaces has failed: {e}"),
            },
        }
    }
}

/// The namespace's name and ebb's annotations, if it has any.
fn reduce(meta: ObjectMeta) -> Option<(String, BTreeMap<String, String>)> {
    let mut annotations = meta.annotations.unwrap_or_default();
    annotations.retain(|name, _| name.starts_with(PREFIX));
    (!annotations.is_empty()).then_some((meta.name?, annotations))
}
