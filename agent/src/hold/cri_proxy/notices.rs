//! Telling the agent of calls that were passed without its say, so that `ebb explain` knows of them.

use std::time::Duration;

use tokio::time::sleep;

use super::stop::StopCall;
use crate::{
    api::client::AgentClient,
    clock::BootTime,
    hold::wire::{PASSED_PATH, PassedNotice},
};

/// When it is tried again while the agent is away. It is worth no more than that.
const AGAIN: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(25),
];

/// Tells it in the background. Nobody waits for that, and nothing depends on it.
pub(super) fn passed(agent: &AgentClient, call: &StopCall, why: &str) {
    let agent = agent.clone();
    let notice = PassedNotice {
        call: call.to_wire(),
        why: why.into(),
        at: BootTime::now(),
    };
    tokio::spawn(async move {
        for pause in AGAIN.map(Some).into_iter().chain([None]) {
            let told: Result<(), _> = agent.post_json(PASSED_PATH, &notice).await;
            match (told, pause) {
                (Err(_), Some(pause)) => sleep(pause).await,
                _ => return,
            }
        }
    });
}
