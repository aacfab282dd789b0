//! `ebb top`.

use std::{
    io::{self, IsTerminal as _, Write as _},
    num::NonZeroU32,
    ops::RangeInclusive,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use clap::Args;
use rustix::termios::tcgetwinsize;
use tokio::time::sleep;

use super::{
    AgentFlags,
    agent::{stop_on_signal, within},
};
use crate::{
    api::client::{AgentClient, AgentError},
    report::{
        text::one_line,
        top::{Size, picture},
        view::{DrainList, PodList},
    },
};

const INTERVAL: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(3600);

#[derive(Args)]
pub(super) struct Flags {
    /// How long to wait between two pictures. Each costs what `ebb pods` costs: a walk of the node's connections for
    /// each pod.
    #[arg(short, long, default_value = "2s", value_parser = within(INTERVAL), value_name = "DURATION")]
    interval: Duration,
    /// End after so many pictures, instead of by Ctrl-C.
    #[arg(short = 'n', long, value_name = "N")]
    times: Option<NonZeroU32>,
    #[command(flatten)]
    agent: AgentFlags,
}

pub(super) async fn run(flags: &Flags) -> Result<()> {
    let client = flags.agent.client();
    // Where there is nothing to show yet, it is an error as in other verbs.
    let mut lists = ask(&client).await?;
    let mut problem = None;
    let stop = stop_on_signal()?;
    let screen = Screen::open()?;
    let mut left = flags.times.map(NonZeroU32::get);
    loop {
        let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let (pods, drains) = &lists;
        let picture = picture(&now, problem.as_deref(), pods, drains, screen.size());
        match screen.show(&picture) {
            // The reader has seen enough.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            shown => shown?,
        }
        left = left.map(|n| n - 1);
        if left == Some(0) {
            return Ok(());
        }
        let next = async {
            sleep(flags.interval).await;
            ask(&client).await
        };
        match stop.run_until_cancelled(next).await {
            None => return Ok(()),
            Some(Ok(new)) => (lists, problem) = (new, None),
            // It may be back soon, as after an upgrade. Until then, what it said last is worth looking at.
            Some(Err(e)) => problem = Some(format!("as it was before: {}", one_line(&e.into()))),
        }
    }
}

async fn ask(client: &AgentClient) -> Result<(PodList, DrainList), AgentError> {
    tokio::try_join!(client.get_json("/v1/pods"), client.get_json("/v1/drains"))
}

/// Standard output: a terminal, whose picture is replaced and which gets back what was there before, or anything
/// else, which gets one picture after the other.
struct Screen {
    is_terminal: bool,
}

/// xterm's alternate screen, without a cursor, and the way back (ctlseqs: DECSET 1049 and DECTCEM).
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// To the upper left corner; from here to the end of the line, and of the screen, nothing (CUP, EL, ED).
const HOME: &str = "\x1b[H";
const REST_OF_LINE: &str = "\x1b[K";
const REST_OF_SCREEN: &str = "\x1b[J";

impl Screen {
    fn open() -> io::Result<Self> {
        let is_terminal = io::stdout().is_terminal();
        if is_terminal {
            put(ENTER)?;
        }
        Ok(Self { is_terminal })
    }

    /// Of a terminal that has one.
    fn size(&self) -> Option<Size> {
        let size = tcgetwinsize(io::stdout())
            .ok()
            .filter(|_| self.is_terminal)?;
        (size.ws_col > 0 && size.ws_row > 0).then(|| Size {
            columns: size.ws_col.into(),
            rows: size.ws_row.into(),
        })
    }

    fn show(&self, picture: &str) -> io::Result<()> {
        if !self.is_terminal {
            return put(&format!("{picture}\n"));
        }
        // All at once, and over what is there: nothing flickers. No end of a line follows the last one, which would
        // scroll.
        let lines: Vec<_> = picture.lines().collect();
        let lines = lines.join(&format!("{REST_OF_LINE}\r\n"));
        put(&format!("{HOME}{lines}{REST_OF_LINE}{REST_OF_SCREEN}"))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.is_terminal {
            let _ = put(LEAVE);
        }
    }
}

fn put(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
