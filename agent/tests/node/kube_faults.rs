//! With an API server (a stand-in) that is away, behind, or says things twice: what the agent makes of it,
//! and what it asks.

use anyhow::{Result, ensure};
use ebb_node::{
    api_server::{Answer, ApiServer, Away, Faults, Verb},
    kubelet::PodSpec,
};
use libtest_mimic::Trial;
use tokio::time::sleep;

use crate::{
    agent::NODE_NAME,
    kube::Cluster,
    peer::Peer,
    scene::{SECOND, Scene, eventually, free_port, server, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "while_the_api_server_is_away_ends_are_told_by_the_stops_and_nothing_is_lost",
            refused,
        ),
        trial(
            "an_agent_that_starts_before_its_api_server_holds_all_the_same_and_finds_it",
            absent,
        ),
        trial(
            "an_api_server_that_resets_connections_and_forgets_is_listed_once_more",
            forgotten,
        ),
        trial("news_that_come_twice_late_and_torn_change_nothing", muddled),
    ]
}

fn two(name: &str) -> PodSpec {
    PodSpec::new(name)
        .container(server("app", 8080))
        .container(server("side", 8081))
}

async fn refused(scene: Scene) -> Result<()> {
    let c = Cluster::start(scene, &[]).await?;
    let known = c.serve("known-before").await?;
    let one = c.serve("one-while-away").await?;
    let both = c.run(two("two-while-away")).await?;
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
    let before = c.api.asked().len();
    c.api.delete(&one.spec, 30 * SECOND);
    c.api.delete(&both.spec, 30 * SECOND);
    c.api.delete(&later.spec, 30 * SECOND);
    // What was known stays known.
    c.is_held(&known, of_known, "deleting").await?;
    c.passes(&one, "app", "only-container").await?;
    c.is_held(&both, of_both, "all-containers").await?;
    let log = std::fs::read_to_string(c.agent.log())?;
    ensure!(log.matches("lost the API server").count() == 1, "{log}");

    c.api.remove(&both.spec);
    c.api.come_back().await?;
    c.until_deleting("later").await?;
    let asked = c.api.asked().split_off(before);
    // It went on where it was: one watch, and not everything anew.
    ensure!(
        asked.len() == 1 && asked[0].verb == Verb::Watch,
        "{asked:?}"
    );
    ensure!(asked[0].query.contains_key("resourceVersion"), "{asked:?}");
    c.is_held(&later, of_later, "deleting").await?;
    // Events of what was while it was away are in the log; there is no burst of them now.
    let mut events = c.api.events();
    events.retain(|e| e["regarding"]["uid"] != later.spec.uid.as_str());
    ensure!(events.is_empty(), "{events:?}");
    Ok(())
}

async fn absent(scene: Scene) -> Result<()> {
    let api = ApiServer::start(([127, 0, 0, 1], free_port()).into()).await?;
    api.misbehave(Faults {
        lists: Answer::Never,
        gets: Answer::Status(503),
        ..Faults::default()
    });
    let c = Cluster::start_with(scene, api, &[]).await?;
    let both = c.run(two("two-unlisted")).await?;
    let peer = Peer::served(both.v4(8080)?).await?;
    c.api.delete(&both.spec, 30 * SECOND);
    c.is_held(&both, peer, "all-containers").await?;
    ensure!(c.api.count(Verb::Watch) == 0, "{:?}", c.api.asked());

    // Whoever waits for an answer gets none from one that has gone.
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
    let before = c.api.asked().len();
    c.api.remove(&gone);
    c.api.delete(&stays.spec, 30 * SECOND);
    c.api.forget();
    sleep(2 * SECOND).await;
    c.api.come_back().await?;
    c.until_deleting("stays").await?;
    c.until_watched().await?;
    // A watch that is told 410, the list, and the watch from there.
    let asked = c.api.asked().split_off(before);
    let verbs: Vec<_> = asked.iter().map(|a| a.verb).collect();
    ensure!(verbs == [Verb::Watch, Verb::List, Verb::Watch], "{asked:?}");
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
        old_news: true,
        ..Faults::default()
    });
    // After each of these the one before is told once more: at last, that it is not being deleted.
    c.api.delete(&pod.spec, 30 * SECOND);
    let last = PodSpec::new("last").annotation("ebb.dev/quiet", "soon");
    c.api.create(&last, NODE_NAME);
    eventually("all of it was told", async || {
        Ok((!c.api.events().is_empty()).then_some(()))
    })
    .await?;
    ensure!(c.agent.explain("muddled").await?.deleting == Some(true));

    // A pod on another node is none of its business.
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
    ensure!(c.api.count(Verb::List) == 1, "{:?}", c.api.asked());
    c.is_held(&torn, of_torn, "deleting").await?;
    c.is_held(&pod, peer, "deleting").await?;
    ensure!(c.api.count(Verb::Get) == 0, "{:?}", c.api.asked());
    Ok(())
}
