//! The deadlines of holds and waits, by the grace periods of the API server's deletes.

use anyhow::{Result, ensure};
use ebb_core::drain_report::{DeadlineCause, ReleaseReason};
use ebb_testkit::api_server::{AnswerMode, ApiVerb, Delivery, Faults};
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    agent::timed,
    hold::stop,
    kube::Cluster,
    peer::Peer,
    scene::{NODE_V4, SECOND, Scene, eventually, trial},
    track::dial,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_second_delete_with_a_shorter_grace_shortens_the_hold",
            shortened,
        ),
        trial("a_wait_ends_before_the_grace_period_of_the_delete", waits),
        trial(
            "a_wait_that_starts_before_the_watch_shows_the_delete_ends_in_time",
            waits_early,
        ),
        trial("a_late_wait_gets_the_remaining_grace_period", waits_late),
        trial(
            "a_forced_delete_ends_a_hold_although_the_api_server_does_not_answer_at_first",
            removed_while_busy,
        ),
    ]
}

async fn removed_while_busy(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("removed-while-busy").await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    c.api.delete(&pod.spec, 60 * SECOND);
    let stopping = stop(c.kubelet()?, &pod, 60 * SECOND);
    c.agent.until_draining("removed-while-busy").await?;
    c.api.misbehave(Faults {
        gets: AnswerMode::Status(503),
        ..Faults::default()
    });
    let before = c.api.count(ApiVerb::Get);
    c.api.remove(&pod.spec);
    eventually("the agent asks about the pod", async || {
        Ok((c.api.count(ApiVerb::Get) > before).then_some(()))
    })
    .await?;
    // No other pod changes, so nothing but the next question ends the hold.
    c.api.misbehave(Faults::default());
    let (stop, took) = timed(stopping).await;
    ensure!(stop?.error().is_none() && took < 10 * SECOND, "{took:?}");
    let report = c.agent.drain("removed-while-busy").await?;
    ensure!(
        report.deadline_cause == DeadlineCause::Removed,
        "{report:?}"
    );
    Ok(())
}

async fn shortened(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("shortened").await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    c.api.delete(&pod.spec, 40 * SECOND);
    let stopping = stop(c.kubelet()?, &pod, 40 * SECOND);
    let begun = c.agent.until_draining("shortened").await?;
    ensure!(begun.deadline_ms > 30_000, "{begun:?}");
    // The kubelet neither cancels its call nor makes another: only the watch shows it.
    c.api.delete(&pod.spec, 9 * SECOND);
    let (stop, took) = timed(stopping).await;
    let stop = stop?;
    ensure!(stop.error().is_none(), "{stop:?}");
    ensure!(took < 25 * SECOND, "held for {took:?}");
    let report = c.agent.drain("shortened").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    ensure!(
        report.deadline_cause == DeadlineCause::ShorterGrace,
        "{report:?}"
    );
    ensure!(report.cut_total == Some(1), "{report:?}");
    Ok(())
}

async fn waits(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("short-wait").await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    c.api.delete(&pod.spec, 40 * SECOND);
    // Longer than the grace period in its spec.
    c.until_grace("short-wait", 40_000).await?;
    let url = format!("http://{NODE_V4}:{}/v1/wait", c.agent.port);
    let kubelet = c.scene.kubelet()?;
    let first = dial(&kubelet, &pod.containers[0], url.clone());
    let begun = c.agent.until_draining("short-wait").await?;
    ensure!((31_000..=35_000).contains(&begun.deadline_ms), "{begun:?}");
    // The kubelet starts over with the new grace period, and runs the hook again.
    c.api.delete(&pod.spec, 9 * SECOND);
    c.until_grace("short-wait", 9_000).await?;
    let second = dial(&kubelet, &pod.containers[0], url);
    let (both, took) = timed(async { (first.await, second.await) }).await;
    let (first, second) = (both.0??, both.1??);
    ensure!(
        first.status == 0 && second.status == 0,
        "{first:?} {second:?}"
    );
    // The hold is 9 s less the reserve of 3 s. The kubelet waits for 9 s; the rest is slack for a slow machine.
    ensure!(took < 9 * SECOND, "{took:?}");
    let report = c.agent.drain("short-wait").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    ensure!(report.deadline_ms < 25_000, "{report:?}");
    Ok(())
}

async fn waits_early(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("early-wait").await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    c.api.misbehave(Faults {
        // Longer than a wait waits for the watch.
        delivery: Delivery::After(3 * SECOND),
        ..Faults::default()
    });
    // The grace period in its spec is 30 s.
    c.api.delete(&pod.spec, 15 * SECOND);
    let url = format!("http://{NODE_V4}:{}/v1/wait", c.agent.port);
    let wait = dial(&c.scene.kubelet()?, &pod.containers[0], url);
    let begun = c.agent.until_draining("early-wait").await?;
    ensure!(begun.deadline_ms > 20_000, "known at once: {begun:?}");
    let (out, took) = timed(wait).await;
    ensure!(out??.status == 0);
    ensure!(took < 15 * SECOND, "{took:?}");
    let report = c.agent.drain("early-wait").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    ensure!(
        report.deadline_cause == DeadlineCause::ShorterGrace,
        "{report:?}"
    );
    Ok(())
}

async fn waits_late(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("late-wait").await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    c.api.delete(&pod.spec, 12 * SECOND);
    c.until_grace("late-wait", 12_000).await?;
    // The hook does something else first.
    sleep(6 * SECOND).await;
    let url = format!("http://{NODE_V4}:{}/v1/wait", c.agent.port);
    let (out, took) = timed(dial(&c.scene.kubelet()?, &pod.containers[0], url)).await;
    ensure!(out??.status == 0);
    ensure!(took < 6 * SECOND, "{took:?}");
    let report = c.agent.drain("late-wait").await?;
    ensure!(report.reason == Some(ReleaseReason::Deadline), "{report:?}");
    // 6 s less the reserve of a third.
    ensure!(report.deadline_ms <= 4000, "{report:?}");
    Ok(())
}
