//! Runs the script with grpcio: gRPC's C core, which shares no code with the proxy's own stack.

use std::{path::Path, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use ebb_testkit::parts::Parts;
use tokio::{io::AsyncWriteExt as _, process::Command};

use crate::{client::Recording, script::Step};

/// Runs `script` against `socket`.
pub(crate) async fn run(script: &[Step], socket: &Path) -> Result<Recording> {
    let grpcio = Parts::directory().join("python");
    ensure!(
        grpcio.join("grpc").is_dir(),
        "grpcio is missing in {}: run `cargo xtask setup`",
        grpcio.display()
    );
    let mut child = Command::new("/usr/bin/python3")
        .args(["-c", include_str!("foreign.py")])
        .arg(socket)
        .env("PYTHONPATH", grpcio)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("starting python3")?;
    let mut input = child.stdin.take().context("no standard input")?;
    input.write_all(&serde_json::to_vec(script)?).await?;
    drop(input);
    let out = child.wait_with_output().await?;
    ensure!(out.status.success(), "python3: {}", out.status);
    Ok(serde_json::from_slice(&out.stdout)?)
}
