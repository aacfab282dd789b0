//! `ebb top`, into a pipe and on a terminal.

use anyhow::{Context as _, Result, ensure};
use ebb_testkit::terminal::{Terminal, vt100};
use libtest_mimic::Trial;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command},
    time::timeout,
};

use crate::{
    agent::{Agent, EBB},
    hold::stop,
    peer::Peer,
    scene::{SECOND, SOON, Scene, eventually, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("top_shows_draining_pods_first_in_every_update", piped),
        trial("top_goes_from_the_node_to_a_report_at_80_by_24", drilled),
        trial("top_leaves_the_terminal_as_it_was_however_it_ends", ended),
        trial("top_outlives_an_agent", outlived),
        trial("top_and_help_have_colours_unless_no_color_is_set", colours),
    ]
}

async fn piped(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("top-going").await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining("top-going").await?;
    let text = agent.query(&["top", "--times", "2", "-i", "100ms"]).await?;
    let frames: Vec<_> = text.split_terminator("\n\n").collect();
    ensure!(frames.len() == 2 && !text.contains('\x1b'), "{text}");
    for frame in frames {
        let lines: Vec<_> = frame.lines().collect();
        // Pods of other trials end meanwhile, and are untracked for a moment.
        ensure!(lines[0].contains(", 1 draining, "), "{text}");
        let first = lines[2].split_whitespace().collect::<Vec<_>>();
        ensure!(first[..2] == ["default", "top-going"], "{text}");
        ensure!(
            first[2..4] == ["1", "0"] && first[5] == "1",
            "live, idle, peers: {text}"
        );
        ensure!(["settling,", "draining,"].contains(&first[7]), "{text}");
    }
    agent.query(&["release", "top-going"]).await?;
    stopping.await?;
    Ok(())
}

/// Waits until the screen has all these texts, and returns it.
async fn until_shown(terminal: &Terminal, texts: &[&str]) -> Result<String> {
    eventually(&format!("the screen shows {texts:?}"), async || {
        let screen = terminal.text();
        Ok(texts
            .iter()
            .all(|text| screen.contains(text))
            .then_some(screen))
    })
    .await
    .with_context(|| terminal.text())
}

/// `ebb top` as the child of a shell in a terminal.
struct TopInShell {
    terminal: Terminal,
    modes_before: String,
    shell: Child,
}

impl TopInShell {
    async fn start(agent: &Agent) -> Result<Self> {
        const SCRIPT: &str = "echo before; \"$0\" \"$@\"; echo status $?; read line";
        let terminal = Terminal::open(80, 24)?;
        let modes_before = modes(&terminal)?;
        let mut shell = Command::from(terminal.controlled("sh")?);
        shell.args(["-c", SCRIPT, EBB, "top", "-i", "100ms"]);
        shell.env("EBB_AGENT", agent.socket()).kill_on_drop(true);
        let top = Self {
            shell: shell.spawn()?,
            terminal,
            modes_before,
        };
        top.until_shown(&["ebb top", "? help  q quit"]).await?;
        ensure!(top.terminal.screen().alternate_screen());
        ensure!(modes(&top.terminal)? != top.modes_before);
        Ok(top)
    }

    async fn until_shown(&self, texts: &[&str]) -> Result<String> {
        until_shown(&self.terminal, texts).await
    }

    fn send(&self, keys: &str) -> Result<()> {
        self.terminal.send(keys)
    }

    fn pid(&self) -> Result<Pid> {
        let shell = self.shell.id().context("the shell has ended")?;
        let children = std::fs::read_to_string(format!("/proc/{shell}/task/{shell}/children"))?;
        let pid = children.trim().parse().context(children)?;
        Pid::from_raw(pid).context("no pid")
    }

    /// Requires that `ebb top` ends without an error and leaves the terminal as it was.
    async fn ends_well(self) -> Result<()> {
        eventually("the earlier screen is back", async || {
            let screen = self.terminal.screen();
            let is_back = !screen.alternate_screen() && !screen.hide_cursor();
            Ok((is_back && screen.contents() == "before\nstatus 0").then_some(()))
        })
        .await
        .with_context(|| format!("{:?}", self.terminal.text()))?;
        ensure!(modes(&self.terminal)? == self.modes_before);
        Ok(())
    }
}

/// The terminal's modes, as text that can be compared.
fn modes(terminal: &Terminal) -> Result<String> {
    Ok(format!("{:?}", terminal.modes()?))
}

/// `ebb top` as the only program of a terminal, as `kubectl exec -it` runs it.
fn top(terminal: &Terminal, agent: &Agent) -> Result<Command> {
    let mut command = Command::from(terminal.controlled(EBB)?);
    command.args(["top", "-i", "100ms"]);
    command.env("EBB_AGENT", agent.socket()).kill_on_drop(true);
    Ok(command)
}

async fn drilled(scene: Scene) -> Result<()> {
    const ESC: &str = "\x1b";
    const ENTER: &str = "\r";
    let agent = scene
        .agent(&["--hold-unknown", "--idle-after", "1s"])
        .await?;
    let proxy = scene.proxy(&agent).await?;
    let name = "top-drilled-with-a-name-as-long-as-those-of-deployments-are";
    let pod = scene.serve(name).await?;
    scene.serve("top-other").await?;
    let _slow = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    let idle = Peer::served(pod.v4(8080)?).await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 100 * SECOND);
    agent.until_draining(name).await?;

    let top = TopInShell::start(&agent).await?;
    let screen = top.until_shown(&["ments-are"]).await?;
    let columns = ["LIVE", "IDLE", "NEW/S", "PEERS", "OLDEST", "DRAIN", "LEFT"];
    let header = screen.lines().nth(2).unwrap_or_default();
    ensure!(columns.iter().all(|c| header.contains(c)), "{screen}");
    let row = screen.lines().nth(3).unwrap_or_default();
    let cells: Vec<_> = row.split_whitespace().collect();
    ensure!(cells.len() >= 9 && cells[0] == "default", "{screen}");
    ensure!(
        cells[1].starts_with("top-dril")
            && cells[1].contains('…')
            && cells[1].ends_with("ments-are"),
        "{screen}"
    );
    // One of the two connections becomes idle meanwhile.
    let flows = [["2", "0"], ["1", "1"]];
    ensure!(
        flows.iter().any(|counts| cells[2..4] == *counts) && cells[8].ends_with('s'),
        "{screen}"
    );

    top.send("?")?;
    top.until_shown(&["any key closes this", "sort by the next column"])
        .await?;
    top.send("q")?;
    // The filter hides the other pod, and takes any letter.
    top.send("/TOP-oth")?;
    let screen = top.until_shown(&["filter: TOP-oth", "top-other"]).await?;
    ensure!(!screen.contains("top-drill"), "{screen}");
    top.send(ESC)?;
    // It stays selected, so it is on the screen among the pods of all trials.
    top.until_shown(&["top-other", "q quit"]).await?;
    top.send("/drilled\r")?;
    top.until_shown(&["node  filter: drilled"]).await?;

    top.send(ENTER)?;
    let peer = idle.address.to_string();
    let screen = top
        .until_shown(&["2 flows, ", "STATE", &peer, "awaiting", "idle"])
        .await?;
    ensure!(
        screen.contains("awaiting") && screen.contains("yes"),
        "{screen}"
    );
    top.send("/idle\r")?;
    top.until_shown(&["filter: idle", &peer]).await?;
    top.send(ENTER)?;
    top.until_shown(&["holds a drain         yes", &peer])
        .await?;
    top.send(ENTER)?;
    top.until_shown(&["open at the start     2", "calls that wait       1"])
        .await?;
    top.send(ESC)?;
    top.until_shown(&["holds a drain"]).await?;

    // The connection ends while its page is shown.
    drop(idle);
    top.until_shown(&["has ended."]).await?;
    top.terminal.resize(100, 30)?;
    // A key that arrives together with the signal of the new size is read with the next key.
    eventually("the screen is wider", async || {
        let first = top.terminal.text().lines().next().map(str::len);
        Ok(first.filter(|columns| *columns > 80))
    })
    .await?;
    top.until_shown(&["has ended.", "Enter drain"]).await?;
    top.send("q")?;
    top.ends_well().await?;
    agent.query(&["release", name]).await?;
    stopping.await?;
    Ok(())
}

async fn ended(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        let top = TopInShell::start(&agent).await?;
        kill_process(top.pid()?, signal)?;
        top.ends_well().await?;
    }
    // Ctrl-C is a key, because the terminal sends no signals meanwhile.
    let interrupted = TopInShell::start(&agent).await?;
    interrupted.send("\x03")?;
    interrupted.ends_well().await?;

    let terminal = Terminal::open(80, 24)?;
    let mut lost = top(&terminal, &agent)?.spawn()?;
    until_shown(&terminal, &["ebb top", "q quit"]).await?;
    drop(terminal);
    let status = timeout(SOON, lost.wait()).await??;
    ensure!(status.success(), "after the loss of its terminal: {status}");
    Ok(())
}

async fn outlived(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    scene.serve("top-b").await?;
    let terminal = Terminal::open(80, 24)?;
    let mut top = top(&terminal, &agent)?.spawn()?;
    until_shown(&terminal, &["ebb top", "q quit"]).await?;
    // Pods of other trials may fill the screen.
    terminal.send("/top-b\r")?;
    until_shown(&terminal, &["default   top-b "]).await?;
    agent.stop().await?;
    until_shown(&terminal, &["the ebb agent is not running", "top-b"]).await?;
    let agent = scene.agent(&[]).await?;
    eventually("top goes on", async || {
        Ok((!terminal.text().contains("not running")).then_some(()))
    })
    .await?;
    terminal.send("q")?;
    ensure!(timeout(SOON, top.wait()).await??.success());
    agent.stop().await
}

/// Whether any cell of the screen has a colour, and whether any is bold.
fn colour_and_bold(terminal: &Terminal) -> (bool, bool) {
    let screen = terminal.screen();
    let (rows, columns) = screen.size();
    let cells = (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c)));
    let cells: Vec<_> = cells.filter_map(|(r, c)| screen.cell(r, c)).collect();
    let plain = vt100::Color::Default;
    let is_coloured = |c: &&vt100::Cell| c.fgcolor() != plain || c.bgcolor() != plain;
    (
        cells.iter().any(is_coloured),
        cells.iter().any(|c| c.bold() || c.underline()),
    )
}

async fn colours(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let pod = scene.serve("top-coloured").await?;
    // The selected row has no colours, so there are two.
    let other = scene.serve("top-coloured-too").await?;
    let _peers = [
        Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?,
        Peer::asking(other.v4(8080)?, "/slow?ms=60000").await?,
    ];
    for (no_color, has_colours) in [(None, true), (Some(""), true), (Some("1"), false)] {
        let terminal = Terminal::open(100, 30)?;
        let mut command = top(&terminal, &agent)?;
        command.envs(no_color.map(|value| ("NO_COLOR", value)));
        let mut child = command.spawn()?;
        until_shown(&terminal, &["top-coloured-too", "q quit"]).await?;
        // A refresh may be half drawn.
        eventually("the screen's colours are right", async || {
            Ok((colour_and_bold(&terminal) == (has_colours, true)).then_some(()))
        })
        .await
        .with_context(|| format!("NO_COLOR={no_color:?}: {}", terminal.text()))?;
        terminal.send("q")?;
        ensure!(timeout(SOON, child.wait()).await??.success());

        // clap takes an empty NO_COLOR as set.
        let terminal = Terminal::open(100, 100)?;
        let mut command = Command::from(terminal.command(EBB)?);
        command.args(["top", "--help"]);
        command.envs(no_color.map(|value| ("NO_COLOR", value)));
        let status = command.status().await?;
        let help = until_shown(&terminal, &["NEW/S", "NO_COLOR turns"]).await?;
        ensure!(status.success() && help.contains("Usage"), "{help}");
        let (coloured, bold) = colour_and_bold(&terminal);
        if no_color != Some("") {
            ensure!((coloured || bold) == has_colours, "NO_COLOR={no_color:?}");
        }
    }
    Ok(())
}
