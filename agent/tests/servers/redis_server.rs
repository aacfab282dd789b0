//! Redis: commands that wait, subscriptions, transactions.

use anyhow::{Context as _, Result, ensure};
use ebb::flow::FlowState::{Awaiting, Idle};
use ebb_node::parts::Parts;
use futures_util::StreamExt as _;
use redis::{AsyncCommands as _, Client};
use tokio::time::timeout;

use crate::support::{
    drains::{IDLE_AFTER, PATIENCE, closing, until_idle},
    pod::Pod,
    readme::{self, Fate},
};

trials![
    redis_a_command_that_waits_is_awaiting,
    redis_a_subscriber_looks_idle,
];

fn serving() -> Result<Pod> {
    let mut pod = Pod::new()?;
    let redis = Parts::find()?.redis().display().to_string();
    let open = ["--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""];
    let mut line = vec![redis.as_str(), "--port", "8080"];
    line.extend(open);
    pod.start(&line, 8080)?;
    Ok(pod)
}

fn client(pod: &Pod) -> Result<Client> {
    Ok(Client::open(format!("redis://{}/", pod.at(8080)))?)
}

fn redis_a_command_that_waits_is_awaiting() -> Result<()> {
    serving()?.meet(async |pod| {
        let mut connection = client(pod)?.get_multiplexed_async_connection().await?;
        let () = connection.set("k", "v").await?;
        pod.becomes(Idle).await?;
        readme::says(
            "PostgreSQL, Redis: nothing under way",
            Idle,
            &Fate::CutHarmlessly,
        )?;
        let received = pod.received().await?;
        let waiting = tokio::spawn(async move {
            // The client gives up after half a second, if not told otherwise.
            connection.set_response_timeout(PATIENCE);
            let popped: Option<(String, String)> = connection.blpop("queue", 4.0).await?;
            anyhow::Ok(popped)
        });
        pod.is_asked(received).await?;
        pod.becomes(Awaiting).await?;
        let drain = pod.drain(until_idle()).await;
        pod.stays(Awaiting, 2 * IDLE_AFTER).await?;
        drain.is_held().await?;
        ensure!(timeout(PATIENCE, waiting).await???.is_none());
        readme::says(
            "PostgreSQL, Redis: a query or command unanswered (`BLPOP`)",
            Awaiting,
            &Fate::Held,
        )
    })
}

fn redis_a_subscriber_looks_idle() -> Result<()> {
    serving()?.meet(async |pod| {
        let mut subscriber = client(pod)?.get_async_pubsub().await?;
        subscriber.subscribe("news").await?;
        pod.is_active().await?;
        pod.becomes(Idle).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        // It is closed, too, where that is asked for.
        pod.drain(closing()).await.drained(0).await?;
        let end = timeout(PATIENCE, subscriber.on_message().next()).await;
        ensure!(end.context("still subscribed")?.is_none());
        readme::says(
            "PostgreSQL `LISTEN`, Redis `SUBSCRIBE`: between notices",
            Idle,
            &Fate::Lost("`idle-after` above the longest silence, or clients that come back"),
        )
    })
}
