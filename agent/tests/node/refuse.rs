//! A command that fails prints one line, exits with a status of its own and leaves nothing behind.

use std::{
    convert::Infallible,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Output,
};

use anyhow::{Context as _, Result, ensure};
use ebb_protocol::views::Problem;
use http::{HeaderValue, Response};
use http_body_util::Empty;
use hyper::{body::Bytes, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use libtest_mimic::Trial;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UnixListener, UnixStream},
    process::Command,
    task::JoinHandle,
    time::timeout,
};

use crate::{
    agent::{EBB, NODE_NAME, agent, agent_with, proxy},
    lifecycle::{entries, pinned},
    scene::{SOON, Scene, free_port, trial},
    schema,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("an_agent_without_a_runtime_exits_with_5", no_runtime),
        trial("an_agent_whose_runtime_is_no_cri_exits_with_6", not_cri),
        trial(
            "an_agent_that_cannot_bind_its_port_exits_with_7",
            port_in_use,
        ),
        trial(
            "an_agent_whose_run_directory_is_a_file_exits_with_7",
            run_is_a_file,
        ),
        trial(
            "a_second_agent_exits_with_8_and_the_first_keeps_running",
            second_agent,
        ),
        trial(
            "an_agent_on_an_unsupported_kernel_exits_with_4",
            lacking_kernel,
        ),
        trial("invalid_flags_exit_with_2_and_are_named", bad_flags),
        trial(
            "an_agent_in_a_cluster_without_a_token_says_what_to_mount",
            no_token,
        ),
        trial("a_query_without_an_agent_exits_with_9", no_agent),
        trial("a_query_about_an_unknown_pod_exits_with_10", unknown_pod),
        trial("a_user_other_than_root_gets_exit_status_3", not_root),
        trial(
            "a_second_proxy_exits_with_8_and_the_first_keeps_running",
            second_proxy,
        ),
        trial(
            "a_new_proxy_takes_over_the_socket_of_a_killed_one",
            stale_socket,
        ),
        trial(
            "a_proxy_whose_socket_path_is_a_file_exits_with_7",
            path_is_a_file,
        ),
    ]
}

/// Runs a command. Requires that it exits with this status and prints one line that contains all of `says`.
async fn refused(mut command: Command, status: i32, says: &[&str]) -> Result<()> {
    let is_proxy = Path::new(command.as_std().get_program()).ends_with("ebb-cri-proxy");
    let name = if is_proxy { "ebb-cri-proxy" } else { "ebb" };
    // Without the log, so that the error is the only line.
    command.env("EBB_LOG", "error").kill_on_drop(true);
    let out = timeout(SOON, command.output()).await;
    let out: Output = out.context("it does not end")??;
    let line = String::from_utf8(out.stderr)?;
    ensure!(out.status.code() == Some(status), "{}: {line}", out.status);
    ensure!(out.stdout.is_empty());
    ensure!(
        line.starts_with(&format!("{name}: ")) && line.lines().count() == 1,
        "{line}"
    );
    for part in says {
        ensure!(line.contains(part), "{part:?} is not in {line}");
    }
    Ok(())
}

/// Requires that a failed start leaves at most its lock file: no socket, no journal, no pinned BPF object.
/// The kernel frees BPF objects that are not pinned when the process exits.
fn nothing_left(run: &Path) -> Result<()> {
    let left = entries(run)?;
    ensure!(left.is_empty() || left == ["agent.lock"], "left: {left:?}");
    let pinned = pinned()?;
    ensure!(pinned.is_empty(), "pinned: {pinned:?}");
    Ok(())
}

/// The command of an agent with a port of its own.
fn agent_of(scene: &Scene, run: &Path) -> Command {
    let mut command = agent(scene.node.socket(), run);
    command.args(["--http", &format!("127.0.0.1:{}", free_port())]);
    command
}

async fn no_runtime(scene: Scene) -> Result<()> {
    let run = scene.directory("run")?;
    let nowhere = run.join("../nowhere.sock");
    refused(agent(&nowhere, &run), 5, &["nowhere.sock", "--cri-socket"]).await?;
    // A socket that a runtime has left behind.
    let stale = scene.directory("")?.join("stale.sock");
    drop(UnixListener::bind(&stale)?);
    refused(agent(&stale, &run), 5, &["stale.sock", "--cri-socket"]).await?;
    nothing_left(&run)
}

async fn no_token(scene: Scene) -> Result<()> {
    let run = scene.directory("run")?;
    let mut command = agent_with(&["--kube", "auto"], scene.node.socket(), &run);
    // Every container of a cluster has these variables, with or without a mounted token.
    command
        .env("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        .env("KUBERNETES_SERVICE_PORT", "443")
        .env("NODE_NAME", NODE_NAME);
    let says = [
        "this pod's service account",
        "mount its token",
        "--kube=off",
    ];
    refused(command, 1, &says).await?;
    nothing_left(&run)
}

async fn not_cri(scene: Scene) -> Result<()> {
    let run = scene.directory("run")?;
    let sockets = scene.directory("")?;
    let says = ["not a CRI", "--cri-socket"];
    let (path, _server) = serve(sockets.join("http1.sock"), http1)?;
    refused(agent(&path, &run), 6, &says).await?;
    let (path, _server) = serve(sockets.join("grpc.sock"), grpc_without_the_runtime_service)?;
    refused(agent(&path, &run), 6, &says).await?;
    let file = sockets.join("file");
    fs::write(&file, "")?;
    refused(agent(&file, &run), 5, &["file", "--cri-socket"]).await?;
    nothing_left(&run)
}

fn serve<F>(path: PathBuf, answer: fn(UnixStream) -> F) -> Result<(PathBuf, Server)>
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = UnixListener::bind(&path)?;
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream));
        }
    });
    Ok((path, Server(task)))
}

struct Server(JoinHandle<()>);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An HTTP/1.1 server, such as Docker's.
async fn http1(mut stream: UnixStream) {
    let _ = stream.read(&mut [0; 1024]).await;
    let reply = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let _ = stream.write_all(reply).await;
}

/// A gRPC server without the CRI's runtime service.
async fn grpc_without_the_runtime_service(stream: UnixStream) {
    let service = service_fn(async |_| {
        let mut reply = Response::new(Empty::<Bytes>::new());
        let headers = reply.headers_mut();
        headers.insert("content-type", HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from_static("12"));
        Ok::<_, Infallible>(reply)
    });
    let connection = http2::Builder::new(TokioExecutor::new());
    let _ = connection
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// Replaces the kernel's BTF for one process, because the kernel itself can't be replaced.
async fn lacking_kernel(scene: Scene) -> Result<()> {
    let run = scene.directory("run")?;
    let files = scene.directory("")?;
    let nothing = files.join("no-btf");
    fs::write(&nothing, "")?;
    let says = ["no kernel type information", "CONFIG_DEBUG_INFO_BTF"];
    refused(with_btf(&nothing, &agent_of(&scene, &run)), 4, &says).await?;
    // A BTF header without types or strings.
    let no_types = files.join("no-types");
    let header: [u32; 6] = [0x0001_eb9f, 24, 0, 0, 0, 0];
    fs::write(&no_types, header.map(u32::to_ne_bytes).concat())?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let says = ["`sock_common.skc_net`", release.trim(), "not supported"];
    refused(with_btf(&no_types, &agent_of(&scene, &run)), 4, &says).await?;
    nothing_left(&run)
}

/// The command in a mount namespace of its own, in which `file` replaces the kernel's BTF.
fn with_btf(file: &Path, command: &Command) -> Command {
    let mut wrapped = Command::new("unshare");
    let script = r#"mount --bind "$0" /sys/kernel/btf/vmlinux && exec "$@""#;
    wrapped.args(["--mount", "sh", "-c", script]).arg(file);
    let command = command.as_std();
    wrapped.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            wrapped.env(name, value);
        }
    }
    wrapped
}

async fn port_in_use(scene: Scene) -> Result<()> {
    let run = scene.directory("run")?;
    let taken = TcpListener::bind("127.0.0.1:0").await?;
    let address = taken.local_addr()?.to_string();
    let mut command = agent(scene.node.socket(), &run);
    command.args(["--http", &address]);
    refused(command, 7, &[&address, "--http", "in use"]).await?;
    let mut command = agent(scene.node.socket(), &run);
    command.args(["--http", "192.0.2.1:9690"]);
    refused(command, 7, &["192.0.2.1:9690", "--http"]).await?;
    nothing_left(&run)
}

async fn run_is_a_file(scene: Scene) -> Result<()> {
    let file = scene.directory("")?.join("file");
    fs::write(&file, "mine")?;
    let file_name = file.display().to_string();
    refused(agent_of(&scene, &file), 7, &[&file_name, "--run-dir"]).await?;
    refused(
        agent_of(&scene, &file.join("below")),
        7,
        &[&file_name, "--run-dir"],
    )
    .await?;
    ensure!(fs::read_to_string(&file)? == "mine");
    // A file at the path of the agent's socket.
    let run = scene.directory("run")?;
    fs::write(run.join("agent.sock"), "mine")?;
    refused(agent_of(&scene, &run), 7, &["agent.sock", "not a socket"]).await?;
    ensure!(fs::read_to_string(run.join("agent.sock"))? == "mine");
    fs::remove_file(run.join("agent.sock"))?;
    nothing_left(&run)
}

async fn second_agent(scene: Scene) -> Result<()> {
    let mut first = scene.agent(&[]).await?;
    let run = first.run.clone();
    refused(
        agent_of(&scene, &run),
        8,
        &["another ebb agent", "stop that agent"],
    )
    .await?;
    ensure!(first.runs()? && first.query(&["drains"]).await.is_ok());
    first.stop().await?;
    // The first agent's lock is free again.
    scene.agent(&[]).await?.stop().await
}

async fn bad_flags(scene: Scene) -> Result<()> {
    let run = scene.directory("run")?;
    let cases = [
        ("--quiet", "soon"),
        ("--quiet", "5"),
        ("--quiet", "2d"),
        ("--quiet", "-1s"),
        ("--idle-after", "0s"),
        ("--max-hold", "0s"),
        ("--until", "never"),
        ("--http", "nonsense"),
        ("--http", "127.0.0.1:70000"),
        ("--kube", "maybe"),
    ];
    for (flag, value) in cases {
        let mut command = agent(scene.node.socket(), &run);
        // If a flag may be given only once, the last one counts.
        command.arg(format!("{flag}={value}")).kill_on_drop(true);
        let out = timeout(SOON, command.output()).await;
        let out = out.with_context(|| format!("{flag} {value} is accepted"))??;
        let text = String::from_utf8(out.stderr)?;
        ensure!(
            out.status.code() == Some(2),
            "{flag} {value}: {} {text}",
            out.status
        );
        let first = text.lines().next().unwrap_or_default();
        if flag != "--kube" {
            ensure!(first.contains(value) && first.contains(flag), "{text}");
        }
    }
    nothing_left(&run)
}

async fn no_agent(scene: Scene) -> Result<()> {
    let run = scene.directory("run")?;
    let socket = run.join("agent.sock");
    for verb in [&["pods"][..], &["flows"], &["drains"], &["release", "web"]] {
        let mut command = Command::new(EBB);
        command.args(verb).arg("--agent").arg(&socket);
        refused(command, 9, &["agent.sock", "not running"]).await?;
    }
    nothing_left(&run)
}

async fn unknown_pod(scene: Scene) -> Result<()> {
    let ebb = scene.agent(&[]).await?;
    for verb in [["flows", "no-such-pod"], ["release", "no-such-pod"]] {
        let mut command = Command::new(EBB);
        command.args(verb).arg("--agent").arg(ebb.socket());
        refused(command, 10, &["no-such-pod", "ebb pods"]).await?;
    }
    // The agent's own answer.
    let mut stream = UnixStream::connect(ebb.socket()).await?;
    let request =
        b"GET /v1/explain?pod=no-such-pod HTTP/1.1\r\nhost: ebb\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
    ensure!(head.starts_with("HTTP/1.1 404 "), "{answer}");
    let problem: Problem = schema::parse(body)?;
    ensure!(
        problem.error.contains("no-such-pod") && problem.candidates.is_empty(),
        "{answer}"
    );
    Ok(())
}

async fn not_root(scene: Scene) -> Result<()> {
    const NOBODY: u32 = 65534;
    // The user nobody may have no access to the build directory.
    let program = scene.directory("nobody")?.join("ebb");
    fs::copy(EBB, &program)?;
    let as_nobody = |args: &Command| {
        let mut command = Command::new(&program);
        command
            .args(args.as_std().get_args())
            .uid(NOBODY)
            .gid(NOBODY);
        command
    };
    let ebb = scene.agent(&[]).await?;
    let mut pods = Command::new(EBB);
    pods.arg("pods").arg("--agent").arg(ebb.socket());
    refused(as_nobody(&pods), 3, &["root"]).await?;
    // It can't write to its run directory.
    let run = scene.directory("run")?;
    refused(as_nobody(&agent_of(&scene, &run)), 3, &["run"]).await?;
    // With a writable run directory, it can't open the runtime's socket.
    fs::set_permissions(&run, fs::Permissions::from_mode(0o777))?;
    refused(as_nobody(&agent_of(&scene, &run)), 3, &["root"]).await?;
    // With both, it can't load BPF programs.
    let (socket, _server) = forward(&scene, scene.directory("")?.join("open.sock"))?;
    let mut command = agent(&socket, &run);
    command.args(["--http", &format!("127.0.0.1:{}", free_port())]);
    refused(as_nobody(&command), 3, &["root"]).await?;
    nothing_left(&run)
}

/// Forwards a socket that every user may open to the runtime.
fn forward(scene: &Scene, path: PathBuf) -> Result<(PathBuf, Server)> {
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
    let runtime = scene.node.socket().to_owned();
    let task = tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let runtime = runtime.clone();
            tokio::spawn(async move {
                let mut server = UnixStream::connect(runtime).await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    Ok((path, Server(task)))
}

async fn second_proxy(scene: Scene) -> Result<()> {
    let ebb = scene.agent(&[]).await?;
    let first = scene.proxy(&ebb).await?;
    let command = proxy(scene.node.socket(), &first.socket, &ebb.socket());
    refused(command, 8, &["cri.sock", "already served", "stop it"]).await?;
    ensure!(scene.kubelet_at(&first)?.is_ready().await?);
    first.stop().await
}

async fn stale_socket(scene: Scene) -> Result<()> {
    let ebb = scene.agent(&[]).await?;
    let first = scene.proxy(&ebb).await?;
    let path = first.socket.clone();
    first.kill().await?;
    ensure!(path.exists(), "nothing is left to take over");
    let second = scene.proxy(&ebb).await?;
    ensure!(second.socket == path && scene.kubelet_at(&second)?.is_ready().await?);
    second.stop().await?;
    ensure!(!path.exists(), "the socket stays");
    Ok(())
}

async fn path_is_a_file(scene: Scene) -> Result<()> {
    let directory = scene.directory("proxy")?;
    let file = directory.join("cri.sock");
    fs::write(&file, "mine")?;
    let command = proxy(scene.node.socket(), &file, &directory.join("agent.sock"));
    refused(command, 7, &["cri.sock", "not a socket", "remove it"]).await?;
    ensure!(fs::read_to_string(&file)? == "mine");
    Ok(())
}
