//! The kubelet's probes: they hold nothing and prolong nothing. The same from any other cgroup does both.

use std::{fs, os::unix::fs::symlink, path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use ebb::{
    drain::report::{ReleaseReason, Report},
    flow::Exempt,
};
use ebb_node::helpers;
use libtest_mimic::Trial;
use tokio::process::{Child, Command};

use crate::scene::{KUBELET, NODE_V4, SECOND, Scene, eventually, trial};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_pod_that_the_kubelet_probes_settles_and_drains_as_if_it_did_not",
            of_the_kubelet,
        ),
        trial(
            "a_pod_that_somebody_else_probes_settles_at_the_maximum",
            of_somebody_else,
        ),
        trial("flows_shows_a_probe_for_what_it_is", shown),
    ]
}

const SETTLE_MAX: Duration = Duration::from_secs(8);

/// Somebody who gets a URL again and again, each time on a new connection.
struct Prober {
    _child: Child,
    answers: PathBuf,
}

impl Prober {
    /// Starts one in this cgroup of the sandbox.
    fn start(scene: &Scene, cgroup: &str, url: &str) -> Result<Self> {
        const PROBE: &str = r#"echo 0 > "$1/cgroup.procs" || exit 1
            while :; do "$2" get "$3" >> "$4"; sleep 0.5; done"#;
        let cgroup = scene.node.place().cgroup(cgroup);
        fs::create_dir_all(&cgroup)?;
        let directory = scene.directory("prober")?;
        let (get, answers) = (directory.join(helpers::FIXTURE), directory.join("answers"));
        symlink(std::env::current_exe()?, &get)?;
        let mut command = Command::new("sh");
        command.args(["-c", PROBE, "sh"]);
        command.args([&cgroup, &get]).arg(url).arg(&answers);
        let command = command.stdin(Stdio::null()).stderr(Stdio::null());
        let child = command.kill_on_drop(true).spawn();
        Ok(Self {
            _child: child.context("starting sh")?,
            answers,
        })
    }

    /// How many answers it has had.
    fn served(&self) -> Result<usize> {
        Ok(fs::read_to_string(&self.answers)?.lines().count())
    }
}

/// Stops a pod that is probed from this cgroup twice a second; returns the report and how many probes were answered
/// meanwhile.
async fn stop_probed(scene: &Scene, name: &str, cgroup: &str) -> Result<(Report, usize)> {
    let pod = scene.serve(name).await?;
    let prober = Prober::start(scene, cgroup, &format!("http://{}/", pod.v4(8080)?))?;
    eventually("the pod is probed", async || {
        Ok((prober.served().unwrap_or(0) > 1).then_some(()))
    })
    .await?;
    let settle_max = format!("{}s", SETTLE_MAX.as_secs());
    let flags = [
        "--hold-unknown",
        "--quiet",
        "2s",
        "--settle-max",
        &settle_max,
    ];
    let agent = scene.agent(&flags).await?;
    let proxy = scene.proxy(&agent).await?;
    let before = prober.served()?;
    let stop = scene.kubelet_at(&proxy)?.stop(&pod, 60 * SECOND).await;
    ensure!(stop.error().is_none(), "{stop:?}");
    let probes = prober.served()? - before;
    Ok((agent.drain(name).await?, probes))
}

async fn of_the_kubelet(scene: Scene) -> Result<()> {
    let (report, probes) = stop_probed(&scene, "probed", KUBELET).await?;
    ensure!(probes > 1, "only {probes} probes");
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        (2000..SETTLE_MAX.as_millis()).contains(&report.held_ms.into()),
        "{report:?}"
    );
    ensure!(report.arrived == Some(0), "{report:?}");
    ensure!(report.late_peers.is_empty(), "{report:?}");
    ensure!(!report.still_arriving, "{report:?}");
    Ok(())
}

async fn of_somebody_else(scene: Scene) -> Result<()> {
    let (report, probes) = stop_probed(&scene, "watched", "no-kubelet").await?;
    ensure!(report.reason == Some(ReleaseReason::Drained), "{report:?}");
    ensure!(
        u128::from(report.held_ms) >= SETTLE_MAX.as_millis(),
        "{report:?}"
    );
    let [late] = report.late_peers.as_slice() else {
        anyhow::bail!("{report:?}")
    };
    ensure!(late.address.to_string() == NODE_V4, "{report:?}");
    ensure!(report.still_arriving, "{report:?}");
    ensure!(Some(late.flows) == report.arrived, "{report:?}");
    // One may be under way at the beginning, and one at the end.
    ensure!(
        late.flows > 3 && probes.abs_diff(late.flows as usize) <= 2,
        "{probes} probes: {report:?}"
    );
    Ok(())
}

async fn shown(scene: Scene) -> Result<()> {
    let pod = scene.serve("slowly-probed").await?;
    let agent = scene.agent(&[]).await?;
    let url = format!("http://{}/slow?ms=60000", pod.v4(8080)?);
    let _prober = Prober::start(&scene, KUBELET, &url)?;
    let flow = eventually("the probe is there", async || {
        Ok(agent.flows("slowly-probed").await?.pop())
    })
    .await?;
    ensure!(
        flow.exempt == Some(Exempt::Probe) && !flow.holds,
        "{flow:?}"
    );
    ensure!(flow.pod.name == "slowly-probed", "{flow:?}");
    let table = agent.query(&["flows", "slowly-probed"]).await?;
    ensure!(table.contains("no: probe"), "{table}");
    Ok(())
}
