//! With an API server (a stand-in) that is down, lags or repeats itself: what the agent holds and requests.

use anyhow::{Result, ensure};
use ebb_testkit::{
    api_server::{AnswerMode, ApiServer, ApiVerb, Away, Faults},
    kubelet::PodSpec,
};
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    agent::{NODE_NAME, timed},
    kube::Cluster,
    peer::Peer,
    scene::{NODE_V4, SECOND, Scene, eventually, free_port, server, trial},
    track::dial,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "while_the_api_server_is_down_the_stops_show_a_pods_end_and_the_watch_resumes_later",
            refused,
        ),
        trial(
            "an_agent_that_starts_before_its_api_server_holds_pods_and_connects_later",
            absent,
        ),
        trial(
            "after_resets_and_an_expired_resource_version_the_agent_lists_once_more",
            forgotten,
        ),
        trial(
            "a_wait_for_a_restart_ends_and_closes_nothing_although_the_api_server_answers_late",
            waits_for_a_restart,
        ),
        trial(
            "watch_events_that_are_repeated_outdated_or_cut_off_change_nothing",
            muddled,
        ),
    ]
}

fn two_servers(name: &str) -> PodSpec {
    PodSpec::new(name)
        .container(server("app", 8080))
        .container(server("side", 8081))
}

async fn refused(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let known = c.serve("known-before").await?;
    let one = c.serve("one-while-away").await?;
    let both = c.run(two_servers("two-while-away")).await?;
    let later = c.serve("later").await?;
    let peers = [
        Peer::served(known.v4(8080)?).await?,
        Peer::served(one.v4(8080)?).await?,
        Peer::served(both.v4(8080)?).await?,
        Peer::served(later.v4(8080)?).await?,
    ];
    let [of_known, _of_one, of_both, of_later] = peers;
    c.api.delete(&known.spec, 30 * SECOND);
    c.until_deleting("known-before").await?;

    c.api.leave(Away::Refusing).await?;
    let before = c.api.requests().len();
    c.api.delete(&one.spec, 30 * SECOND);
    c.api.delete(&both.spec, 30 * SECOND);
    c.api.delete(&later.spec, 30 * SECOND);
    // The agent keeps what it knew before.
    c.is_held(&known, of_known, "deleting").await?;
    c.is_not_held(&one, "app", "only-container").await?;
    c.is_held(&both, of_both, "all-containers").await?;
    one_warning(&c, "API server unreachable: ", 0)?;

    c.api.remove(&both.spec);
    c.api.come_back().await?;
    c.until_deleting("later").await?;
    one_warning(&c, "API server unreachable: ", 1)?;
    let asked = c.api.requests().split_off(before);
    // The agent resumed its watch and did not list again.
    ensure!(
        asked.len() == 1 && asked[0].verb == ApiVerb::Watch,
        "{asked:?}"
    );
    ensure!(asked[0].query.contains_key("resourceVersion"), "{asked:?}");
    c.is_held(&later, of_later, "deleting").await?;
    // Events from the outage are in the log only: the agent does not send them afterwards.
    let mut events = c.api.events();
    events.retain(|e| e["regarding"]["uid"] != later.spec.uid.as_str());
    ensure!(events.is_empty(), "{events:?}");
    Ok(())
}

/// Requires that the agent has logged one warning, which is about the API server, and how often that it is back.
fn one_warning(c: &Cluster, says: &str, back: usize) -> Result<()> {
    let log = std::fs::read_to_string(c.agent.log())?;
    let is_trouble = |line: &&str| line.contains(" WARN ") || line.contains(" ERROR ");
    let trouble: Vec<_> = log.lines().filter(is_trouble).collect();
    ensure!(
        matches!(trouble[..], [line] if line.contains(says) && line.contains("; using the last known pods")),
        "{log}"
    );
    ensure!(
        log.matches("the API server is back").count() == back,
        "{log}"
    );
    Ok(())
}

async fn absent(scene: Scene) -> Result<()> {
    let api = ApiServer::start(([127, 0, 0, 1], free_port()).into()).await?;
    api.misbehave(Faults {
        lists: AnswerMode::Never,
        gets: AnswerMode::Status(503),
        ..Faults::default()
    });
    let c = Cluster::start_with(scene, api, &[]).await?;
    let both = c.run(two_servers("two-unlisted")).await?;
    let peer = Peer::served(both.v4(8080)?).await?;
    c.api.delete(&both.spec, 30 * SECOND);
    c.is_held(&both, peer, "all-containers").await?;
    ensure!(c.api.count(ApiVerb::Watch) == 0, "{:?}", c.api.requests());

    // The agent's list request is still unanswered when the API server goes down.
    let one = c.serve("one-listed").await?;
    let peer = Peer::served(one.v4(8080)?).await?;
    c.api.delete(&one.spec, 30 * SECOND);
    c.api.leave(Away::Refusing).await?;
    c.api.misbehave(Faults::default());
    c.api.come_back().await?;
    c.until_deleting("one-listed").await?;
    c.is_held(&one, peer, "deleting").await
}

async fn forgotten(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let stays = c.serve("stays").await?;
    let gone = PodSpec::new("gone-meanwhile").annotation("ebb.dev/quiet", "soon");
    c.api.create(&gone, NODE_NAME);
    eventually("the agent knows of it", async || {
        Ok((!c.api.events().is_empty()).then_some(()))
    })
    .await?;
    let peer = Peer::served(stays.v4(8080)?).await?;
    c.api.leave(Away::Resetting).await?;
    let before = c.api.requests().len();
    c.api.remove(&gone);
    c.api.delete(&stays.spec, 30 * SECOND);
    c.api.forget();
    sleep(2 * SECOND).await;
    c.api.come_back().await?;
    c.until_deleting("stays").await?;
    c.until_watched().await?;
    // A watch that is answered with 410, a list, and a watch from that list.
    let asked = c.api.requests().split_off(before);
    let verbs: Vec<_> = asked.iter().map(|a| a.verb).collect();
    ensure!(
        verbs == [ApiVerb::Watch, ApiVerb::List, ApiVerb::Watch],
        "{asked:?}"
    );
    let field = "spec.nodeName=node-1";
    ensure!(
        asked.iter().all(|a| a.query["fieldSelector"] == field),
        "{asked:?}"
    );
    ensure!(asked[1].query["resourceVersion"] == "0", "{asked:?}");
    c.is_held(&stays, peer, "deleting").await
}

async fn muddled(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let pod = c.serve("muddled").await?;
    let peer = Peer::served(pod.v4(8080)?).await?;
    c.api.misbehave(Faults {
        twice: true,
        replay_previous: true,
        ..Faults::default()
    });
    // After each change the stand-in repeats the one before it: in the end, that the pod is not being deleted.
    c.api.delete(&pod.spec, 30 * SECOND);
    let last = PodSpec::new("last").annotation("ebb.dev/quiet", "soon");
    c.api.create(&last, NODE_NAME);
    eventually("the agent has received all changes", async || {
        Ok((!c.api.events().is_empty()).then_some(()))
    })
    .await?;
    ensure!(c.agent.explain("muddled").await?.deleting == Some(true));

    // The agent ignores a pod on another node.
    c.api.create(&PodSpec::new("elsewhere"), "node-2");
    let torn = c.serve("torn").await?;
    let of_torn = Peer::served(torn.v4(8080)?).await?;
    c.api.misbehave(Faults {
        torn: true,
        ..Faults::default()
    });
    c.api.delete(&torn.spec, 30 * SECOND);
    eventually("the watch has broken", async || {
        Ok((c.api.watching() == 0).then_some(()))
    })
    .await?;
    c.api.misbehave(Faults::default());
    c.until_deleting("torn").await?;
    ensure!(c.api.count(ApiVerb::List) == 1, "{:?}", c.api.requests());
    c.is_held(&torn, of_torn, "deleting").await?;
    c.is_held(&pod, peer, "deleting").await?;
    ensure!(c.api.count(ApiVerb::Get) == 0, "{:?}", c.api.requests());
    Ok(())
}

async fn waits_for_a_restart(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &["--idle-flows", "close", "--idle-after", "100ms"]).await?;
    let url = format!("http://{NODE_V4}:{}/v1/wait", c.agent.port);
    let pod = c.serve("unanswered").await?;
    let mut idle = Peer::served(pod.v4(8080)?).await?;
    c.api.misbehave(Faults {
        gets: AnswerMode::Never,
        ..Faults::default()
    });
    let before = c.api.count(ApiVerb::Get);
    let wait = dial(&c.scene.kubelet()?, &pod.containers[0], url);
    eventually("the agent has asked twice", async || {
        Ok((c.api.count(ApiVerb::Get) >= before + 2).then_some(()))
    })
    .await?;
    sleep(SECOND).await;
    ensure!(c.api.count(ApiVerb::Get) == before + 2, "no pause");
    let report = c.agent.drain("unanswered").await?;
    ensure!(report.idle_closed == 0 && !wait.is_finished(), "{report:?}");
    c.api.misbehave(Faults::default());
    let (out, took) = timed(wait).await;
    ensure!(out??.status == 0);
    ensure!(took < 10 * SECOND, "{took:?}");
    c.lives_on("unanswered", &mut idle).await
}
