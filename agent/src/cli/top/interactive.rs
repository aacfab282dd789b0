//! `ebb top` on a terminal: keys, requests to the agent, and drawing.

use std::{future, io, num::NonZeroU32, time::SystemTime};

use anyhow::Result;
use ebb_core::ids::PodUid;
use ebb_protocol::{
    client::AgentError,
    filter::FlowQuery,
    service::stop_on_signal,
    views::{DrainList, FlowList, PodList},
};
use ratatui::crossterm::event::Event;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Source, TopFlags,
    draw::{Picture, Theme, visible_rows},
    not_refreshed,
    rows::Answers,
    screen::{Screen, is_gone},
    state::{DataRequest, KeyOutcome, TopState},
};

/// The agent's answer to a [`DataRequest`].
enum FetchedData {
    Pods(PodList, DrainList),
    Drains(DrainList),
    Flows(PodUid, FlowList),
}

/// A request under way. It has a task of its own, so that keys need not wait until a long answer is parsed.
type Fetch = AbortOnDropHandle<Result<FetchedData, AgentError>>;

/// What ends a wait.
enum Wakeup {
    Event(io::Result<Event>),
    Fetched(Result<FetchedData, AgentError>),
    Refresh,
    Stop,
}

pub(super) async fn run(flags: &TopFlags) -> Result<()> {
    let source = Source::new(flags);
    let state = TopState::new();
    let mut answers = Answers::default();
    // If the first request fails, the command does. Later failures are shown.
    accept(&mut answers, ask(&source, state.request()).await?);
    match show(flags, source, state, answers).await {
        Err(e) if e.downcast_ref().is_some_and(is_gone) => Ok(()),
        ended => ended,
    }
}

async fn show(
    flags: &TopFlags,
    source: Source,
    mut state: TopState,
    mut answers: Answers,
) -> Result<()> {
    let stop = stop_on_signal()?;
    let mut hangup = signal(SignalKind::hangup())?;
    let theme = Theme::from_environment();
    let mut screen = Screen::open()?;
    let mut asked = state.request();
    let mut fetch: Option<Fetch> = None;
    let mut refresh_at = Instant::now() + flags.interval;
    let mut at = now();
    let mut problem: Option<String> = None;
    let mut left = flags.times.map(|n| NonZeroU32::get(n) - 1);
    loop {
        let size = screen.size()?;
        let height = visible_rows(size.height);
        let rows = answers.rows(&state, size.width.into());
        state.settle(&rows, height);
        screen.draw(&Picture {
            state: &state,
            answers: &answers,
            rows: &rows,
            at: &at,
            problem: problem.as_deref(),
            theme,
        })?;
        if left == Some(0) {
            return Ok(());
        }
        let wakeup = tokio::select! {
            event = screen.next_event() => Wakeup::Event(event),
            answer = answer_of(&mut fetch) => Wakeup::Fetched(answer?),
            () = sleep_until(refresh_at), if fetch.is_none() => Wakeup::Refresh,
            () = stop.cancelled() => Wakeup::Stop,
            _ = hangup.recv() => Wakeup::Stop,
        };
        match wakeup {
            Wakeup::Event(event) => {
                if let Event::Key(key) = event? {
                    match state.press(key, &rows, height) {
                        KeyOutcome::Continue => {}
                        KeyOutcome::Redraw => screen.forget()?,
                        KeyOutcome::Quit => return Ok(()),
                    }
                }
            }
            Wakeup::Fetched(answer) => {
                fetch = None;
                refresh_at = Instant::now() + flags.interval;
                left = left.map(|n| n - 1);
                match answer {
                    Ok(answer) => {
                        accept(&mut answers, answer);
                        (at, problem) = (now(), None);
                    }
                    // The agent may be back soon, as after an upgrade. Until then, its last answer stays.
                    Err(e) => problem = Some(not_refreshed(&e)),
                }
            }
            Wakeup::Refresh => fetch = Some(spawn(&source, &asked)),
            Wakeup::Stop => return Ok(()),
        }
        let request = state.request();
        if request != asked {
            problem = None;
            fetch = Some(spawn(&source, &request));
            asked = request;
        }
    }
}

/// The answer to the request under way. Without one, this waits forever.
async fn answer_of(
    fetch: &mut Option<Fetch>,
) -> Result<Result<FetchedData, AgentError>, tokio::task::JoinError> {
    match fetch {
        Some(fetch) => fetch.await,
        None => future::pending().await,
    }
}

fn spawn(source: &Source, request: &DataRequest) -> Fetch {
    let (source, request) = (source.clone(), request.clone());
    AbortOnDropHandle::new(tokio::spawn(async move { ask(&source, request).await }))
}

async fn ask(source: &Source, request: DataRequest) -> Result<FetchedData, AgentError> {
    match request {
        DataRequest::Pods => {
            let (pods, drains) = source.lists().await?;
            Ok(FetchedData::Pods(pods, drains))
        }
        DataRequest::Drains => source.drains().await.map(FetchedData::Drains),
        DataRequest::Flows { pod, outbound } => {
            let query = FlowQuery {
                pod: Some(pod.uid.to_string()),
                all: outbound,
                ..FlowQuery::default()
            };
            // Two plain values always have this form.
            let query = serde_urlencoded::to_string(query).unwrap_or_default();
            let flows = source
                .client
                .get_json(&format!("/v1/flows?{query}"))
                .await?;
            Ok(FetchedData::Flows(pod.uid, flows))
        }
    }
}

fn accept(answers: &mut Answers, answer: FetchedData) {
    match answer {
        FetchedData::Pods(pods, drains) => {
            answers.pods = Some(pods);
            answers.drains = Some(drains);
        }
        FetchedData::Drains(drains) => answers.drains = Some(drains),
        FetchedData::Flows(pod, flows) => answers.flows = Some((pod, flows)),
    }
}

/// The time of day, in UTC as in reports.
fn now() -> String {
    let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    now.split_once('T')
        .map_or_else(String::new, |(_, time)| time.to_owned())
}
