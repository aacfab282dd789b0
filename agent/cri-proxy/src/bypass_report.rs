//! Reports to the agent the calls that the proxy forwarded without its answer, so that `ebb explain` can say why.

use std::time::Duration;

use ebb_core::clock::BootTime;
use ebb_protocol::{
    client::AgentClient,
    hold::{BYPASS_PATH, BypassReason, BypassReport, HeldCall},
};
use tokio::time::sleep;

/// The pauses between attempts while the agent is away. After the last attempt the report is dropped.
const RETRY_AFTER: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(25),
];

/// Sends the report in the background. The call does not wait for it.
pub(crate) fn send(agent: &AgentClient, call: HeldCall, why: BypassReason) {
    let agent = agent.clone();
    let report = BypassReport {
        call,
        why,
        at: BootTime::now(),
    };
    tokio::spawn(async move {
        for pause in RETRY_AFTER.map(Some).into_iter().chain([None]) {
            let sent: Result<(), _> = agent.post_json(BYPASS_PATH, &report).await;
            match (sent, pause) {
                (Err(_), Some(pause)) => sleep(pause).await,
                _ => return,
            }
        }
    });
}
