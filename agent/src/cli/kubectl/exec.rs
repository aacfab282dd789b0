//! Running `ebb` in an agent's container, as `kubectl exec` does.

use std::io;

use anyhow::{Context as _, Result};
use futures_util::SinkExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube::api::{AttachParams, AttachedProcess, TerminalSize};
use rustix::termios::{self, OptionalActions, Termios};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, copy},
    signal::unix::{SignalKind, signal},
};
use tokio_util::task::AbortOnDropHandle;

use super::{super::follow::UNTIL_STDIN_ENDS, agents::RemoteAgent};

/// The container of the agent's pod, and the program in it (deploy/daemonset.yaml, deploy/Containerfile).
const CONTAINER: &str = "agent";
const PROGRAM: &str = "/usr/local/bin/ebb";

/// How many bytes of each stream may wait to be read.
const BUFFER: usize = 64 << 10;

/// The standard input of a remote command.
enum Stdin {
    None,
    /// Without data. It ends with this process.
    Open,
    /// This terminal.
    Terminal,
}

/// What a finished command has written.
pub(super) struct RemoteOutput {
    pub(super) stdout: String,
    pub(super) stderr: String,
    /// Its exit status.
    pub(super) status: u8,
}

impl RemoteAgent {
    /// Runs `ebb` with these arguments and returns what it has written.
    pub(super) async fn output(&self, args: &[String]) -> Result<RemoteOutput> {
        let mut process = self.start(args, Stdin::None).await?;
        let (stdout, stderr) = (process.stdout(), process.stderr());
        let (stdout, stderr) = tokio::try_join!(read(stdout), read(stderr))?;
        Ok(RemoteOutput {
            stdout,
            stderr,
            status: status(process).await?,
        })
    }

    /// Runs `ebb` with these arguments and prints what it writes, as it comes. Returns its exit status.
    pub(super) async fn print(&self, args: &[String]) -> Result<u8> {
        print_streams(self.start(args, Stdin::None).await?).await
    }

    /// The same for a watch, which ends only when this process does: the remote `ebb` has then lost its standard input.
    pub(super) async fn print_watch(&self, args: &[String]) -> Result<u8> {
        let args = [args, &[format!("--{UNTIL_STDIN_ENDS}")]].concat();
        print_streams(self.start(&args, Stdin::Open).await?).await
    }

    /// Runs `ebb` with these arguments on this terminal. Returns its exit status.
    pub(super) async fn with_terminal(&self, args: &[String]) -> Result<u8> {
        let mut process = self.start(args, Stdin::Terminal).await?;
        let _raw = RawMode::set()?;
        let sizes = process.terminal_size().map(|mut to| async move {
            let mut changes = signal(SignalKind::window_change())?;
            loop {
                let size = termios::tcgetwinsize(io::stdout())?;
                let size = TerminalSize {
                    width: size.ws_col,
                    height: size.ws_row,
                };
                if to.send(size).await.is_err() {
                    return io::Result::Ok(());
                }
                let _ = changes.recv().await;
            }
        });
        let sizes = sizes.map(|sizes| AbortOnDropHandle::new(tokio::spawn(sizes)));
        let keys = process.stdin().map(|mut to| {
            let keys = async move { copy(&mut tokio::io::stdin(), &mut to).await };
            AbortOnDropHandle::new(tokio::spawn(keys))
        });
        let stdout = process.stdout();
        let shown = pass_on(stdout, tokio::io::stdout()).await;
        drop((keys, sizes));
        shown?;
        status(process).await
    }

    async fn start(&self, args: &[String], stdin: Stdin) -> Result<AttachedProcess> {
        let terminal = matches!(stdin, Stdin::Terminal);
        let command = [PROGRAM].into_iter().chain(args.iter().map(String::as_str));
        let params = AttachParams {
            container: Some(CONTAINER.into()),
            stdin: !matches!(stdin, Stdin::None),
            stdout: true,
            // A terminal is one stream.
            stderr: !terminal,
            tty: terminal,
            max_stdin_buf_size: None,
            max_stdout_buf_size: Some(BUFFER),
            max_stderr_buf_size: Some(BUFFER),
        };
        let started = self.api.exec(&self.pod, command, &params).await;
        started.with_context(|| {
            format!(
                "running ebb in pod {} of node {}; this needs the verb create on pods/exec in its namespace",
                self.pod, self.node
            )
        })
    }
}

async fn read(stream: Option<impl AsyncRead + Unpin>) -> io::Result<String> {
    let mut text = Vec::new();
    if let Some(mut stream) = stream {
        stream.read_to_end(&mut text).await?;
    }
    String::from_utf8(text).map_err(io::Error::other)
}

/// Prints what the process writes, as it comes. Returns its exit status, or 0 as soon as the reader of standard output
/// (`head`, a pager) has closed the pipe: that is no error, and a watch would never end.
async fn print_streams(mut process: AttachedProcess) -> Result<u8> {
    let (stdout, stderr) = (process.stdout(), process.stderr());
    let notes = async {
        // Without a reader of standard error the notes are of no use.
        let _ = pass_on(stderr, tokio::io::stderr()).await;
        Ok(())
    };
    match tokio::try_join!(pass_on(stdout, tokio::io::stdout()), notes) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(0),
        printed => printed?,
    };
    status(process).await
}

async fn pass_on(
    from: Option<impl AsyncRead + Unpin>,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let Some(mut from) = from else { return Ok(()) };
    copy(&mut from, &mut to).await.map(drop)
}

/// The exit status of a process that has closed its streams.
async fn status(mut process: AttachedProcess) -> Result<u8> {
    let status = process.take_status().context("its status was taken")?.await;
    status
        .as_ref()
        .and_then(exit_status)
        .context("the connection to the agent's pod was lost")
}

/// The exit status in the answer of the kubelet: `NonZeroExitCode` with a cause `ExitCode`
/// (`ExecInContainer`, `pkg/kubelet/kuberuntime` and `k8s.io/kubelet/pkg/cri/streaming/remotecommand/exec.go`).
fn exit_status(status: &Status) -> Option<u8> {
    if status.status.as_deref() == Some("Success") {
        return Some(0);
    }
    let causes = status.details.as_ref()?.causes.as_deref()?;
    let code = causes
        .iter()
        .find(|cause| cause.reason.as_deref() == Some("ExitCode"))?;
    code.message.as_deref()?.parse().ok()
}

/// The terminal in raw mode: keys go to the remote program as they are. Dropping it restores the mode before.
struct RawMode(Termios);

impl RawMode {
    fn set() -> Result<Self> {
        let before = termios::tcgetattr(io::stdin())
            .context("standard input is not a terminal, which this command needs")?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{StatusCause, StatusDetails};

    use super::*;

    #[test]
    fn the_exit_status_is_in_the_kubelets_answer() {
        let succeeded = Status {
            status: Some("Success".into()),
            ..Status::default()
        };
        assert_eq!(exit_status(&succeeded), Some(0));
        let cause = StatusCause {
            reason: Some("ExitCode".into()),
            message: Some("10".into()),
            ..StatusCause::default()
        };
        let failed = Status {
            status: Some("Failure".into()),
            reason: Some("NonZeroExitCode".into()),
            details: Some(StatusDetails {
                causes: Some(vec![cause]),
                ..StatusDetails::default()
            }),
            ..Status::default()
        };
        assert_eq!(exit_status(&failed), Some(10));
        assert_eq!(exit_status(&Status::default()), None);
    }
}
