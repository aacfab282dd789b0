//! The kubelet's probes neither hold a pod nor prolong its settle phase. The same requests from another cgroup do.

use std::{fs, os::unix::fs::symlink, path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use ebb_core::{
    drain_report::{ReleaseReason, Report},
    flow::Exempt,
};
use ebb_testkit::helpers;
use libtest_mimic::Trial;
use tokio::process::{Child, Command};

use crate::scene::{KUBELET, NODE_V4, SECOND, Scene, eventually, trial};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "the_kubelets_probes_prolong_neither_the_settle_phase_nor_the_drain",
            from_the_kubelet,
        ),
        trial(
            "requests_from_another_cgroup_prolong_the_settle_phase_to_its_maximum",
            from_another_cgroup,
        ),
        trial("ebb_flows_shows_that_a_probe_does_not_hold", shown),
    ]
}

const SETTLE_MAX: Duration = Duration::from_secs(8);

/// A process that sends GETs to a URL, each on a new connection.
struct Prober {
    _child: Child,
    answers: PathBuf,
}

impl Prober {
    /// Starts one in this cgroup of the sandbox.
    fn start(scene: &Scene, cgroup: &str, url: &str) -> Result<Self> {
        const PROBE: &str = r#"echo 0 > "$1/cgroup.procs" || exit 1
            while :; do "$2" get "$3" >> "$4"; sleep 0.5; done"#;
        let cgroup = scene.node.paths().cgroup(cgroup);
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

    /// The number of answers so far.
    fn served(&self) -> Result<usize> {
        Ok(fs::read_to_string(&self.answers)?.lines().count())
    }
}

/// Stops a pod while a process in this cgroup probes it twice a second. Returns the report and the number of probes
/// that were answered meanwhile.
async fn stop_probed(scene: &Scene, name: &str, cgroup: &str) -> Result<(Report, usize)> {
    let pod = scene.serve(name).await?;
    // Slow enough that the agent, even on a busy machine, resolves the peer before it closes.
    let url = format!("http://{}/slow?ms=200", pod.v4(8080)?);
    let prober = Prober::start(scene, cgroup, &url)?;
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

async fn from_the_kubelet(scene: Scene) -> Result<()> {
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

async fn from_another_cgroup(scene: Scene) -> Result<()> {
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
    // One probe may be in progress at the start, and one at the end.
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
