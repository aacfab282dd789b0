//! `ebb top`, into a pipe and on a terminal.

use std::{
    fs::File,
    io::{BufReader, Read as _},
    process::Stdio,
    sync::mpsc,
};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use rustix::{
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{process::Command, time::timeout};

use crate::{
    agent::EBB,
    hold::stop,
    peer::Peer,
    scene::{SECOND, SOON, Scene, eventually, trial},
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("top_shows_what_drains_first_again_and_again", piped),
        trial("top_gives_a_terminal_back_and_outlives_an_agent", terminal),
    ]
}

async fn piped(scene: Scene) -> Result<()> {
    let agent = scene.agent(&["--hold-unknown"]).await?;
    let proxy = scene.proxy(&agent).await?;
    let pod = scene.serve("top-going").await?;
    let _peer = Peer::asking(pod.v4(8080)?, "/slow?ms=60000").await?;
    let stopping = stop(scene.kubelet_at(&proxy)?, &pod, 30 * SECOND);
    agent.until_draining("top-going").await?;
    let text = agent.query(&["top", "-n", "2", "-i", "100ms"]).await?;
    let pictures: Vec<_> = text.split_terminator("\n\n").collect();
    ensure!(pictures.len() == 2 && !text.contains('\x1b'), "{text}");
    for picture in pictures {
        let lines: Vec<_> = picture.lines().collect();
        // Pods of other trials end meanwhile, and are untracked for a moment.
        ensure!(lines[0].contains(", 1 draining, "), "{text}");
        let first = lines[2].split_whitespace().collect::<Vec<_>>();
        ensure!(first[..2] == ["default", "top-going"], "{text}");
        ensure!(first[2..5] == ["1", "0", "1"], "live, idle, peers: {text}");
        ensure!(["settling,", "draining,"].contains(&first[6]), "{text}");
    }
    agent.query(&["release", "top-going"]).await?;
    stopping.await?;
    Ok(())
}

/// A terminal of four lines, and what is written to it.
struct Terminal {
    written: mpsc::Receiver<u8>,
    so_far: Vec<u8>,
}

impl Terminal {
    fn open() -> Result<(Self, Stdio)> {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&ours)?;
        unlockpt(&ours)?;
        let name = ptsname(&ours, Vec::new())?;
        let theirs = File::options().write(true).open(name.to_str()?)?;
        let size = Winsize {
            ws_row: 4,
            ws_col: 60,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&theirs, size)?;
        let (tell, written) = mpsc::channel();
        // Reading ends with an error when nobody has the other side any more.
        std::thread::spawn(move || {
            for byte in BufReader::new(File::from(ours))
                .bytes()
                .map_while(Result::ok)
            {
                let _ = tell.send(byte);
            }
        });
        let so_far = Vec::new();
        Ok((Self { written, so_far }, theirs.into()))
    }

    /// All that has been written so far.
    fn text(&mut self) -> String {
        self.so_far.extend(self.written.try_iter());
        String::from_utf8_lossy(&self.so_far).into_owned()
    }
}

async fn terminal(scene: Scene) -> Result<()> {
    let agent = scene.agent(&[]).await?;
    let pods = ["top-a", "top-b", "top-c"];
    for pod in pods {
        scene.serve(pod).await?;
    }
    let (mut terminal, stdout) = Terminal::open()?;
    let mut top = Command::new(EBB)
        .args(["top", "-i", "100ms", "--agent"])
        .arg(agent.socket())
        .stdout(stdout)
        .kill_on_drop(true)
        .spawn()?;
    eventually("there are pictures", async || {
        Ok((terminal.text().matches("\x1b[H").count() > 2).then_some(()))
    })
    .await?;
    let text = terminal.text();
    ensure!(text.starts_with("\x1b[?1049h\x1b[?25l\x1b[H"), "{text:?}");
    let picture = text.split("\x1b[H").nth(1).context("no picture")?;
    ensure!(
        picture.lines().count() == 4 && !picture.ends_with('\n'),
        "{picture:?}"
    );
    let last = picture.lines().last().unwrap_or_default();
    ensure!(last.starts_with("… and "), "{picture:?}");

    agent.stop().await?;
    eventually("it says that the agent is gone", async || {
        let text = terminal.text();
        Ok(text.contains("the ebb agent is not running").then_some(()))
    })
    .await?;
    let pid = top.id().context("it has ended")?;
    let pid = Pid::from_raw(pid.cast_signed()).context("no pid")?;
    kill_process(pid, Signal::INT)?;
    let status = timeout(SOON, top.wait()).await??;
    ensure!(status.success(), "{status}");
    eventually("the terminal is given back", async || {
        let text = terminal.text();
        Ok(text.ends_with("\x1b[?25h\x1b[?1049l").then_some(()))
    })
    .await
}
