//! Redis: commands that wait, subscriptions, transactions.

use anyhow::{Context as _, Result, ensure};
use ebb_core::flow::FlowState::{Awaiting, Idle};
use ebb_testkit::parts::Parts;
use futures_util::StreamExt as _;
use redis::{AsyncCommands as _, Client};
use tokio::time::timeout;

use crate::support::{
    drains::{IDLE_AFTER, TIMEOUT, closing, until_idle},
    pod::Pod,
    until_table::{Effect, has_row},
};

ebb_testkit::trials![
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
    serving()?.with_clients(async |pod| {
        let mut connection = client(pod)?.get_multiplexed_async_connection().await?;
        let () = connection.set("k", "v").await?;
        pod.becomes(Idle).await?;
        has_row(
            "PostgreSQL, Redis: nothing under way",
            Idle,
            &Effect::CutHarmlessly,
        )?;
        let received = pod.received().await?;
        let waiting = tokio::spawn(async move {
            // The client's default is half a second.
            connection.set_response_timeout(TIMEOUT);
            let popped: Option<(String, String)> = connection.blpop("queue", 4.0).await?;
            anyhow::Ok(popped)
        });
        pod.receives_more_than(received).await?;
        pod.becomes(Awaiting).await?;
        let drain = pod.drain(until_idle()).await;
        pod.stays(Awaiting, 2 * IDLE_AFTER).await?;
        drain.is_held().await?;
        ensure!(timeout(TIMEOUT, waiting).await???.is_none());
        has_row(
            "PostgreSQL, Redis: a query or command unanswered (`BLPOP`)",
            Awaiting,
            &Effect::Held,
        )
    })
}

fn redis_a_subscriber_looks_idle() -> Result<()> {
    serving()?.with_clients(async |pod| {
        let mut subscriber = client(pod)?.get_async_pubsub().await?;
        subscriber.subscribe("news").await?;
        pod.is_active().await?;
        pod.becomes(Idle).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        // With `idle-flows: close` the drain closes it, too.
        pod.drain(closing()).await.drained(0).await?;
        let end = timeout(TIMEOUT, subscriber.on_message().next()).await;
        ensure!(end.context("still subscribed")?.is_none());
        has_row(
            "PostgreSQL `LISTEN`, Redis `SUBSCRIBE`: between notices",
            Idle,
            &Effect::Lost("`idle-after` above the longest silence, or clients that come back"),
        )
    })
}
