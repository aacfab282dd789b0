//! PostgreSQL: a query under way, and an open transaction.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ebb_core::flow::FlowState::{Awaiting, Idle};
use ebb_testkit::parts::Parts;
use rustix::mount::mount_bind;
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls};

use crate::support::{
    drains::{IDLE_AFTER, TIMEOUT, closing, until_idle},
    pod::Pod,
    until_table::{Effect, has_row},
};

ebb_testkit::trials![postgres_a_query_is_awaiting_and_an_open_transaction_or_a_listener_looks_idle];

/// `nobody`: PostgreSQL refuses to run as root.
const NOBODY: u32 = 65534;
const AS_NOBODY: &[&str] = &[
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
];

/// PostgreSQL's programs in a directory that `nobody` can read, because the repository may be in a home directory.
static PROGRAMS: LazyLock<Result<PathBuf, String>> = LazyLock::new(|| {
    let find = || {
        let programs = Parts::find()?.postgresql();
        // All of `usr`, because the programs find their files relative to themselves.
        let prefix = programs.ancestors().nth(4).context("no prefix")?;
        let target = Path::new("/run/ebb-servers/usr");
        fs::create_dir_all(target)?;
        mount_bind(prefix, target).context("can't mount")?;
        anyhow::Ok(target.join("lib/postgresql/15/bin"))
    };
    find().map_err(|error| format!("{error:#}"))
});

fn serving() -> Result<Pod> {
    let mut pod = Pod::new()?;
    let programs = PROGRAMS.clone().map_err(anyhow::Error::msg)?;
    let data = pod.directory().join("data");
    fs::create_dir(&data)?;
    chown(&data, Some(NOBODY), Some(NOBODY))?;
    let out = Command::new(AS_NOBODY[0])
        .args(&AS_NOBODY[1..])
        .arg(programs.join("initdb"))
        .args([
            "--no-sync",
            "--no-locale",
            "--auth=trust",
            "--username=nobody",
            "-D",
        ])
        .arg(&data)
        .current_dir("/")
        .output()?;
    ensure!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    fs::write(data.join("pg_hba.conf"), "host all all 0.0.0.0/0 trust\n")?;
    let (postgres, data) = (programs.join("postgres"), data.display().to_string());
    let postgres = postgres.display().to_string();
    let mut line = AS_NOBODY.to_vec();
    line.extend([&postgres, "-D", &data, "-p", "8080", "-h", "0.0.0.0", "-F"]);
    line.extend(["-c", "unix_socket_directories="]);
    pod.start(&line, 8080)?;
    Ok(pod)
}

async fn connect(pod: &Pod) -> Result<Client> {
    let (address, port) = (pod.at(8080).ip(), pod.at(8080).port());
    let config = format!("host={address} port={port} user=nobody dbname=postgres");
    let until = Instant::now() + TIMEOUT;
    loop {
        match tokio_postgres::connect(&config, NoTls).await {
            Ok((client, connection)) => {
                tokio::spawn(connection);
                return Ok(client);
            }
            // It listens before it is ready.
            Err(error) => ensure!(Instant::now() < until, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn postgres_a_query_is_awaiting_and_an_open_transaction_or_a_listener_looks_idle() -> Result<()> {
    serving()?.with_clients(async |pod| {
        let client = connect(pod).await?;
        pod.is_active().await?;
        pod.becomes(Idle).await?;
        has_row(
            "PostgreSQL, Redis: nothing under way",
            Idle,
            &Effect::CutHarmlessly,
        )?;

        let received = pod.received().await?;
        let drain = {
            let query = client.batch_execute("SELECT pg_sleep(4)");
            let look = async {
                pod.receives_more_than(received).await?;
                pod.becomes(Awaiting).await?;
                let drain = pod.drain(until_idle()).await;
                pod.stays(Awaiting, 2 * IDLE_AFTER).await?;
                drain.is_held().await?;
                anyhow::Ok(drain)
            };
            let (query, drain) = tokio::join!(timeout(TIMEOUT, query), look);
            query??;
            drain?
        };
        has_row(
            "PostgreSQL, Redis: a query or command unanswered (`BLPOP`)",
            Awaiting,
            &Effect::Held,
        )?;
        pod.becomes(Idle).await?;
        drain.drained(1).await?;

        client
            .batch_execute("CREATE TABLE t (n int); LISTEN news")
            .await?;
        pod.becomes(Idle).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        has_row(
            "PostgreSQL `LISTEN`, Redis `SUBSCRIBE`: between notices",
            Idle,
            &Effect::Lost("`idle-after` above the longest silence, or clients that come back"),
        )?;
        client
            .batch_execute("BEGIN; INSERT INTO t VALUES (1)")
            .await?;
        pod.becomes(Idle).await?;
        pod.drain(until_idle()).await.drained(1).await?;
        pod.drain(closing()).await.drained(0).await?;
        let commit = timeout(TIMEOUT, client.batch_execute("COMMIT")).await?;
        ensure!(commit.is_err(), "a closed connection");
        // The server has rolled back the transaction.
        let rows = connect(pod).await?.query("SELECT * FROM t", &[]).await?;
        ensure!(rows.is_empty(), "committed");
        has_row(
            "PostgreSQL: an open transaction, the client is thinking",
            Idle,
            &Effect::Lost("`idle-after` above the longest thought; the server rolls back"),
        )
    })
}
