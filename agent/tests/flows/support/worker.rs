//! A process that opens and closes sockets on command, one command per line. A trial needs one where a thread is not
//! enough: a process can be in any cgroup and can be killed.

use std::{
    collections::VecDeque,
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, anyhow, bail};
use ebb_testkit::cgroup::Cgroup;

use super::sockets;

const NAME: &str = "ebb-flows-worker";
const ACCEPTOR: &str = "ebb-flows-acceptor";

/// Runs the worker or its child, if this process was started as one.
pub(crate) fn dispatch() -> Option<ExitCode> {
    let name = env::args_os().next()?;
    match Path::new(&name).file_name()?.to_str()? {
        NAME => serve(),
        ACCEPTOR => accept().unwrap(),
        _ => return None,
    }
    Some(ExitCode::SUCCESS)
}

/// Accepts from the listener on standard input, in the cgroup that is the argument.
fn accept() -> Result<()> {
    let cgroup = env::args_os().nth(1).context("no cgroup")?;
    fs::write(Path::new(&cgroup).join("cgroup.procs"), "0")?;
    let listener = TcpListener::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut accepted = Vec::new();
    loop {
        accepted.push(listener.accept()?);
    }
}

#[derive(Default)]
struct Sockets {
    listener: Option<TcpListener>,
    streams: VecDeque<TcpStream>,
    children: Vec<Child>,
}

/// Answers each line with one line.
fn serve() {
    let mut sockets = Sockets::default();
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let reply = match sockets.execute(&line) {
            Ok(reply) => format!("ok {reply}"),
            Err(error) => format!("error {error:#}"),
        };
        println!("{reply}");
    }
}

impl Sockets {
    fn execute(&mut self, line: &str) -> Result<String> {
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        match verb {
            "listen" => {
                let listener = TcpListener::bind(sockets::ANY_PORT)?;
                let at = listener.local_addr()?.to_string();
                self.listener = Some(listener);
                return Ok(at);
            }
            "accept" => self.streams.push_back(self.listener()?.accept()?.0),
            "connect" => {
                let to: SocketAddr = rest.parse()?;
                self.streams.push_back(TcpStream::connect(to)?);
            }
            "connect-from" => {
                let (from, to) = rest.split_once(' ').context("from where to where")?;
                let stream = sockets::dial_from(from.parse()?, to.parse()?)?;
                self.streams.push_back(stream);
            }
            "local" => {
                let last = self.streams.back().context("nothing is open")?;
                return Ok(last.local_addr()?.to_string());
            }
            "move" => fs::write(Path::new(rest).join("cgroup.procs"), "0")?,
            "fill" => {
                let last = self.streams.back().context("nothing to fill")?;
                return Ok(sockets::fill_send_buffer(last)?.to_string());
            }
            // Answers a request of ten bytes.
            "answer" => {
                let first = self.streams.front().context("nothing is open")?;
                sockets::read_bytes(first, 10)?;
                sockets::write_bytes(first, 10)?;
            }
            "read-to-end" => {
                let first = self.streams.front().context("nothing is open")?;
                return Ok(sockets::read_to_end(first)?.to_string());
            }
            "close" => drop(self.streams.pop_front()),
            // A child that inherits the first connection.
            "fork" => {
                let first = self.streams.front().context("nothing to inherit")?;
                self.children.push(
                    Command::new("sleep")
                        .arg("1000")
                        .stdin(OwnedFd::from(first.try_clone()?))
                        .stdout(Stdio::null())
                        .spawn()?,
                );
            }
            // A child in another cgroup that inherits the listener, accepts and never closes.
            "acceptor" => {
                let listener = self.listener()?.try_clone()?;
                self.listener = None;
                self.children.push(
                    Command::new(env::current_exe()?)
                        .arg0(ACCEPTOR)
                        .arg(rest)
                        .stdin(OwnedFd::from(listener))
                        .stdout(Stdio::null())
                        .spawn()?,
                );
            }
            "kill-forks" => {
                for mut child in self.children.drain(..) {
                    child.kill()?;
                    child.wait()?;
                }
            }
            _ => bail!("no such verb: {verb}"),
        }
        Ok(String::new())
    }

    fn listener(&self) -> Result<&TcpListener> {
        self.listener.as_ref().context("not listening")
    }
}

/// A handle of the process. Dropping it kills the process.
pub(crate) struct Worker {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts one in the calling thread's namespace.
    pub(crate) fn start() -> Result<Self> {
        let mut child = Command::new(env::current_exe()?)
            .arg0(NAME)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let to = child.stdin.take().context("no stdin")?;
        let from = BufReader::new(child.stdout.take().context("no stdout")?);
        Ok(Self { child, to, from })
    }

    /// Starts one in a cgroup.
    pub(crate) fn start_in(cgroup: &Cgroup) -> Result<Self> {
        Self::start_at(cgroup.path())
    }

    /// Starts one in the cgroup of this directory.
    pub(crate) fn start_at(cgroup: &Path) -> Result<Self> {
        let mut worker = Self::start()?;
        worker.command(&format!("move {}", cgroup.display()))?;
        Ok(worker)
    }

    /// Moves the process into a cgroup.
    pub(crate) fn move_to(&mut self, cgroup: &Cgroup) -> Result<()> {
        self.command(&format!("move {}", cgroup.path().display()))
            .map(drop)
    }

    /// Sends a command and returns the answer.
    pub(crate) fn command(&mut self, line: &str) -> Result<String> {
        writeln!(self.to, "{line}")?;
        let mut reply = String::new();
        self.from.read_line(&mut reply)?;
        reply
            .trim_end()
            .strip_prefix("ok")
            .map(|answer| answer.trim().to_owned())
            .ok_or_else(|| anyhow!("{line:?}: {reply:?}"))
    }

    /// Makes it listen; returns the address.
    pub(crate) fn listen(&mut self) -> Result<SocketAddr> {
        Ok(self.command("listen")?.parse()?)
    }

    pub(crate) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
