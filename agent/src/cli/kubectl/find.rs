//! Which node has a pod that the API server does not know by the given name: its name is only the beginning, or a UID, or
//! the pod is gone.

use ebb_core::ids::PodName;
use ebb_protocol::views::Explanation;
use futures_util::future::join_all;

use super::{
    super::output::print_notes,
    NO_MATCH,
    agents::{Agents, RemoteAgent},
    list::{NodeAnswer, ask},
};
use crate::pods::table::is_called;

/// The agent that knows the pod. If there is none, or more than one, prints why and returns the exit status.
pub(super) async fn by_agents<'a>(agents: &'a Agents, pod: &str) -> Result<&'a RemoteAgent, u8> {
    let args = ["explain".to_owned(), pod.to_owned()];
    let asked = agents.all().iter().map(|agent| ask(agent, &args));
    let answers = agents.all().iter().zip(join_all(asked).await);
    let (chosen, said) = choose(pod, answers, |agent| &agent.node);
    print_notes(&said);
    chosen
}

/// Chooses the agent with the pod that `wanted` names. As on one node, the whole name of a pod goes before the beginning of
/// others. Returns also what to print: what to choose from, or which agents did not answer.
fn choose<'a, A>(
    wanted: &str,
    answers: impl Iterator<Item = (&'a A, NodeAnswer<Explanation>)>,
    node: fn(&A) -> &str,
) -> (Result<&'a A, u8>, Vec<String>) {
    let mut found: Vec<(&A, PodName)> = Vec::new();
    let mut candidates = Vec::new();
    let (mut unknown, mut no_answer) = (Vec::new(), Vec::new());
    let mut status = NO_MATCH;
    for (agent, answer) in answers {
        let node = node(agent);
        match answer.document {
            Ok(explanation) => {
                candidates.push(format!("  {} on node {node}", explanation.pod));
                found.push((agent, explanation.pod));
            }
            Err(why) if answer.status == NO_MATCH => {
                // Of several pods of its node, an agent names each on an indented line.
                let pods = why.lines().filter_map(|line| line.strip_prefix("  "));
                candidates.extend(pods.map(|pod| format!("  {pod} on node {node}")));
                unknown.push(format!("{node}: {why}"));
            }
            Err(why) => {
                status = answer.status;
                no_answer.push(format!("{node}: {why}"));
            }
        }
    }
    let whole: Vec<_> = found
        .iter()
        .filter(|(_, pod)| is_called(pod, wanted))
        .collect();
    match (&whole[..], &found[..]) {
        ([(agent, _)], _) => return (Ok(*agent), no_answer),
        ([], [(agent, _)]) if candidates.len() == 1 => return (Ok(*agent), no_answer),
        _ => {}
    }
    if candidates.is_empty() {
        no_answer.extend(unknown);
        return (Err(status), no_answer);
    }
    let first = format!(
        "ebb: more than one pod matches {wanted}; give the whole name of one of them, or --node:"
    );
    let said = [vec![first], candidates, no_answer].concat();
    (Err(NO_MATCH), said)
}

#[cfg(test)]
mod tests {
    use ebb_core::ids::PodUid;
    use ebb_protocol::views::SCHEMA;

    use super::*;
    use crate::cli::kubectl::NO_ANSWER;

    fn knows(name: &str) -> NodeAnswer<Explanation> {
        let explanation = Explanation {
            schema: SCHEMA.into(),
            pod: PodName {
                uid: PodUid::new(name),
                namespace: "shop".into(),
                name: name.into(),
            },
            agent_since: String::new(),
            deleting: None,
            now: None,
            drain: None,
            stops: vec![],
            lifetimes: vec![],
        };
        NodeAnswer::of(Ok(explanation), 0)
    }

    fn fails(why: &str, status: u8) -> NodeAnswer<Explanation> {
        NodeAnswer::of(Err(why.into()), status)
    }

    fn chosen(
        wanted: &str,
        answers: [NodeAnswer<Explanation>; 2],
    ) -> (Result<&'static str, u8>, String) {
        let nodes = [&"node-a", &"node-b"];
        let (chosen, said) = choose(wanted, nodes.into_iter().zip(answers), |node| node);
        (chosen.copied(), said.join("\n"))
    }

    fn unknown() -> NodeAnswer<Explanation> {
        fails("ebb: no pod matches", NO_MATCH)
    }

    #[test]
    fn the_only_pod_that_matches_is_chosen_and_a_silent_agent_is_named() {
        let quiet = String::new();
        assert_eq!(
            chosen("we", [unknown(), knows("web")]),
            (Ok("node-b"), quiet)
        );
        let (agent, said) = chosen("we", [knows("web"), fails("no agent", NO_ANSWER)]);
        assert_eq!((agent, said.as_str()), (Ok("node-a"), "node-b: no agent"));
    }

    #[test]
    fn a_name_that_matches_pods_of_two_nodes_is_an_error_that_names_both() {
        let (agent, said) = chosen("we", [knows("web"), knows("weather")]);
        assert_eq!(agent, Err(NO_MATCH));
        assert!(
            said.ends_with("--node:\n  shop/web on node node-a\n  shop/weather on node node-b"),
            "{said}"
        );
        let several = "ebb: several match\n  shop/wes\n  shop/wet";
        let (agent, said) = chosen("we", [knows("web"), fails(several, NO_MATCH)]);
        assert_eq!(agent, Err(NO_MATCH));
        assert!(said.contains("  shop/wet on node node-b"), "{said}");
        let (agent, said) = chosen("web", [knows("web"), knows("web")]);
        assert_eq!((agent, said.lines().count()), (Err(NO_MATCH), 3));
    }

    #[test]
    fn the_whole_name_goes_before_the_beginning_of_another() {
        for wanted in ["web", "shop/web"] {
            let (agent, _) = chosen(wanted, [knows("web-0"), knows("web")]);
            assert_eq!(agent, Ok("node-b"), "{wanted}");
        }
        let several = fails("ebb: several match\n  shop/web-1\n  shop/web-2", NO_MATCH);
        assert_eq!(chosen("web", [several, knows("web")]).0, Ok("node-b"));
    }

    #[test]
    fn without_the_pod_each_agent_says_why() {
        let (agent, said) = chosen("we", [unknown(), unknown()]);
        assert_eq!((agent, said.lines().count()), (Err(NO_MATCH), 2));
        let (agent, said) = chosen("we", [unknown(), fails("no agent", NO_ANSWER)]);
        assert_eq!((agent, said.lines().count()), (Err(NO_ANSWER), 2));
    }
}
