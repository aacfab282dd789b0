//! Ends drains that are only observed when the containers of their pods have exited.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use ebb_core::{clock::BootTime, ids::PodUid};
use tokio::{task::JoinSet, time::sleep};

use crate::{
    drains::driver::DrainHandle,
    pods::{Pod, store::Pods, table::PodTable},
};

/// How long all containers of a pod must be gone. By then a stop that was for the restart of a container has been
/// recognised, and has ended its drain.
const GONE_FOR: Duration = Duration::from_secs(2);

/// Follows the lists of pods. Ends with the drain driver.
pub(crate) async fn follow(pods: Arc<Pods>, drains: DrainHandle) {
    let mut view = drains.view();
    let mut tables = pods.subscribe();
    // The observed pods, as they were last listed.
    let mut known: HashMap<PodUid, Arc<Pod>> = HashMap::new();
    let mut ending = HashSet::new();
    let mut tasks = JoinSet::new();
    loop {
        let table = Arc::clone(&tables.borrow_and_update());
        let observed: HashSet<PodUid> = {
            let view = view.borrow_and_update();
            let observed = view.active.iter().filter(|r| r.observed);
            observed.map(|r| r.pod.uid.clone()).collect()
        };
        known.retain(|uid, _| observed.contains(uid));
        for uid in &observed {
            if let Some(pod) = table.by_uid(uid) {
                known.insert(uid.clone(), Arc::clone(pod));
            }
            if !runs(&table, uid) && ending.insert(uid.clone()) {
                let (pods, pod) = (Arc::clone(&pods), known.get(uid).cloned());
                let (drains, uid) = (drains.clone(), uid.clone());
                tasks.spawn(async move {
                    // The runtime soon forgets containers of a pod that is gone.
                    let exits = exits(&pods, pod.as_deref()).await;
                    sleep(GONE_FOR).await;
                    if !runs(&pods.latest(), &uid) {
                        drains.exited(&uid, exits);
                    }
                    uid
                });
            }
        }
        let is_new = |uid: &PodUid| !observed.contains(uid);
        tokio::select! {
            Ok(_) = view.wait_for(|v| v.active.iter().any(|r| r.observed && is_new(&r.pod.uid))) => {}
            Ok(()) = tables.changed(), if !observed.is_empty() => {}
            Some(ended) = tasks.join_next() => {
                if let Ok(uid) = ended {
                    ending.remove(&uid);
                }
            }
            () = drains.stopping() => return,
        }
    }
}

fn runs(table: &PodTable, uid: &PodUid) -> bool {
    let pod = table.by_uid(uid);
    pod.is_some_and(|pod| pod.containers.iter().any(|c| c.running))
}

/// When the containers have exited, by the runtime; now if it does not know.
async fn exits(pods: &Pods, pod: Option<&Pod>) -> Vec<BootTime> {
    let now = BootTime::now();
    let mut exits = Vec::new();
    for container in pod.into_iter().flat_map(|pod| &pod.containers) {
        exits.extend(pods.exited_at(&container.id).await);
    }
    if exits.is_empty() { vec![now] } else { exits }
}
