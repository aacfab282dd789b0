//! A pod: a network namespace and a cgroup with servers, and a link to the namespace of its clients.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::{fd::OwnedFd, unix::fs::symlink},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::atomic::{AtomicU32, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use ebb_core::{
    flow::{Flow, FlowState, Snapshot},
    ids::{PodName, PodUid, SandboxId, SocketCookie},
    policy::Policy,
    scope::Scope,
};
use ebb_testkit::{
    cgroup::Cgroup,
    helpers,
    namespace::{Namespace, ip},
    parts::Parts,
    trial::step,
};
use rustix::{
    process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open},
    thread::gettid,
};
use socket2::SockRef;
use tokio::runtime::Builder;
use tokio_util::sync::CancellationToken;

use super::drains::{self, Drain, IDLE_AFTER, TIMEOUT};

/// The address of all pods, because each is alone on its link.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

static NUMBER: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Pod {
    name: String,
    inside: Namespace,
    outside: Namespace,
    cgroup: Cgroup,
    directory: PathBuf,
    processes: Vec<Child>,
    scope: Scope,
    drains: AtomicU32,
}

impl Pod {
    /// An empty pod.
    pub(crate) fn new() -> Result<Self> {
        // Started before the clients, because it takes a while.
        drains::shared();
        let name = format!("pod-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let (inside, outside) = (Namespace::new()?, Namespace::new()?);
        outside.run(|| {
            // `ip` takes a thread's id for a namespace, too.
            let here = gettid().as_raw_nonzero().to_string();
            inside.run(|| {
                ip(&format!(
                    "link add eth0 type veth peer name eth0 netns {here}"
                ))?;
                ip(&format!("address add {ADDRESS}/24 dev eth0"))?;
                ip("link set eth0 up")
            })?;
            ip("address add 10.77.0.1/24 dev eth0")?;
            ip("link set eth0 up")
        })?;
        let directory = ebb_testkit::sandbox::paths()?.directory().join(&name);
        fs::create_dir_all(&directory)?;
        Ok(Self {
            cgroup: Cgroup::new(&name)?,
            name,
            inside,
            outside,
            directory,
            processes: Vec::new(),
            scope: Scope::Untracked("nothing runs in it yet".into()),
            drains: AtomicU32::new(0),
        })
    }

    /// The directory of its files.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Starts a program in it and waits until it accepts connections on `port`.
    pub(crate) fn start(&mut self, program: &[&str], port: u16) -> Result<()> {
        let log = fs::File::create(self.directory.join(format!("{port}.log")))?;
        let cgroup = self.cgroup.path().join("cgroup.procs");
        let child = self.inside.run(|| {
            // The shell moves itself into the cgroup before it becomes the program.
            step(format!("starting {program:?}"));
            Command::new("sh")
                .args(["-c", r#"echo 0 > "$0" && exec "$@""#])
                .arg(cgroup)
                .args(program)
                .current_dir(&self.directory)
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()
                .with_context(|| format!("starting {program:?}"))
        })?;
        self.scope = Scope::Netns {
            inode: ebb::linux::netns::Netns::of_process(child.id())?.inode(),
            pid: child.id(),
        };
        self.processes.push(child);
        self.inside.run(|| {
            let until = Instant::now() + TIMEOUT;
            while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
                if Instant::now() > until {
                    let log = fs::read_to_string(self.directory.join(format!("{port}.log")));
                    bail!("{program:?} does not listen: {}", log.unwrap_or_default());
                }
                sleep(Duration::from_millis(20));
            }
            Ok(())
        })
    }

    /// Starts this executable in it as the helper of this name.
    pub(crate) fn start_own(&mut self, name: &str, arguments: &[&str], port: u16) -> Result<()> {
        let program = self.directory.join(name);
        symlink(std::env::current_exe()?, &program)?;
        let program = program.display().to_string();
        let mut line = vec![program.as_str()];
        line.extend(arguments);
        self.start(&line, port)
    }

    /// Starts nginx with these servers, and on port 9000 a slow application behind it.
    pub(crate) fn nginx(servers: &str) -> Result<Self> {
        let mut pod = Self::new()?;
        pod.start_own(helpers::FIXTURE, &["serve", "--port", "9000"], 9000)?;
        let here = pod.directory.display().to_string();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|kind| format!("{kind}_temp_path {here}/{kind};\n"))
            .collect();
        let conf = format!(
            "daemon off; user root; worker_processes 2; pid {here}/pid; error_log stderr;
            events {{ worker_connections 4096; }}
            http {{
                log_format line '$request_uri $status $body_bytes_sent'; access_log {here}/access line;
                keepalive_requests 1000000; proxy_buffering off; proxy_http_version 1.1;
                {temporary}
                {servers}
            }}"
        );
        let file = pod.directory.join("nginx.conf");
        fs::write(&file, conf)?;
        let nginx = Parts::find()?.nginx().display().to_string();
        let (file, error_log) = (file.display().to_string(), format!("{here}/error"));
        pod.start(&[&nginx, "-c", &file, "-p", &here, "-e", &error_log], 8080)?;
        Ok(pod)
    }

    /// The address of one of its ports.
    pub(crate) fn at(&self, port: u16) -> SocketAddr {
        (ADDRESS, port).into()
    }

    /// Runs `clients` in the namespace of its clients.
    pub(crate) fn with_clients<T: Send>(
        &self,
        clients: impl AsyncFnOnce(&Self) -> Result<T> + Send,
    ) -> Result<T> {
        self.outside.run(|| {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let result = runtime.block_on(clients(self));
            step("ending what the clients left behind");
            // A client's library may still wait for something.
            runtime.shutdown_timeout(TIMEOUT);
            result
        })
    }

    /// The flows that hold, with this `idle-after`.
    pub(crate) async fn flows(&self, idle_after: Duration) -> Result<Vec<Flow>> {
        let dump = drains::shared().0.dump(&self.scope).await?;
        let snapshot = Snapshot::new(
            dump.taken_at,
            &dump.samples,
            idle_after,
            |_| true,
            // The connection of `start` may not be closed yet.
            |ip| ip.is_loopback(),
        );
        Ok(snapshot.not_exempt().cloned().collect())
    }

    /// The only connection from outside.
    async fn flow(&self) -> Result<Flow> {
        let mut flows = self.flows(IDLE_AFTER).await?;
        match (flows.pop(), &flows[..]) {
            (Some(flow), []) => Ok(flow),
            (last, others) => bail!("not one flow: {last:#?} {others:#?}"),
        }
    }

    /// The state of the only connection.
    pub(crate) async fn state(&self) -> Result<FlowState> {
        Ok(self.flow().await?.state)
    }

    /// How many bytes the pod has received on it.
    pub(crate) async fn received(&self) -> Result<u64> {
        Ok(self.flow().await?.bytes_in)
    }

    /// Waits until the pod has received more than that, and so the request of a client's task.
    pub(crate) async fn receives_more_than(&self, received: u64) -> Result<()> {
        step("waiting for a request");
        let until = Instant::now() + TIMEOUT;
        while self.received().await? == received {
            ensure!(Instant::now() < until, "no request");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Demands that the connection is in the backlog or active, unless it has been quiet for `idle-after`.
    pub(crate) async fn is_active(&self) -> Result<()> {
        let flow = self.flow().await?;
        let new = matches!(flow.state, FlowState::Active | FlowState::Backlog);
        ensure!(new || flow.quiet_for >= IDLE_AFTER, "{flow:#?}");
        Ok(())
    }

    /// Waits until the connection is `state`, and demands that it is in the backlog or active until then.
    pub(crate) async fn becomes(&self, state: FlowState) -> Result<()> {
        self.becomes_after(state, &[FlowState::Backlog, FlowState::Active])
            .await
    }

    /// Waits until the connection is `state`, and demands that it is one of `before` until then.
    pub(crate) async fn becomes_after(&self, state: FlowState, before: &[FlowState]) -> Result<()> {
        step(format!("waiting for it to become {state}"));
        let until = Instant::now() + TIMEOUT;
        loop {
            let flow = self.flow().await?;
            if flow.state == state {
                return Ok(());
            }
            ensure!(
                before.contains(&flow.state) && Instant::now() < until,
                "not {state}: {flow:#?}"
            );
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// Demands that the connection stays `state` for as long as `lasting`.
    pub(crate) async fn stays(&self, state: FlowState, lasting: Duration) -> Result<()> {
        step(format!("checking that it stays {state}"));
        let until = Instant::now() + lasting;
        while Instant::now() < until {
            let now = self.state().await?;
            ensure!(now == state, "{now}, was {state}");
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        Ok(())
    }

    /// Begins a drain. Each has another pod UID, so that the driver takes it for another pod's.
    pub(crate) async fn drain(&self, policy: Policy) -> Drain {
        let number = self.drains.fetch_add(1, Ordering::Relaxed);
        let pod = ebb::pods::Pod {
            name: PodName {
                uid: PodUid::new(format!("{}-{number}", self.name)),
                namespace: "default".into(),
                name: self.name.clone(),
            },
            sandbox: SandboxId::new(self.name.clone()),
            scope: self.scope.clone(),
            ips: vec![ADDRESS.into()],
            workload: None,
            labels: std::collections::BTreeMap::new(),
            annotations: [].into(),
            containers: vec![],
        };
        drains::drain(pod, policy).await
    }

    /// Sends a signal to all its processes; returns how many there are.
    pub(crate) fn signal(&self, signal: Signal) -> Result<usize> {
        let processes = fs::read_to_string(self.cgroup.path().join("cgroup.procs"))?;
        let pids = processes.lines().filter_map(|pid| pid.parse().ok());
        let pids: Vec<_> = pids.filter_map(Pid::from_raw).collect();
        for pid in &pids {
            // The process may have ended.
            let _ = kill_process(*pid, signal);
        }
        Ok(pids.len())
    }

    /// Duplicates the descriptor that one of its processes has of the connection to `peer`.
    pub(crate) fn socket(&self, peer: SocketAddr) -> Result<OwnedFd> {
        let processes = fs::read_to_string(self.cgroup.path().join("cgroup.procs"))?;
        for pid in processes.lines() {
            let process = pid.parse().ok().and_then(Pid::from_raw).context("no pid")?;
            let process = pidfd_open(process, PidfdFlags::empty())?;
            for fd in fs::read_dir(format!("/proc/{pid}/fd"))? {
                let number = fd?.file_name().to_string_lossy().parse()?;
                let Ok(socket) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) else {
                    continue;
                };
                let other = SockRef::from(&socket).peer_addr();
                if other.is_ok_and(|other| other.as_socket() == Some(peer)) {
                    return Ok(socket);
                }
            }
        }
        bail!("no process has the connection to {peer}")
    }

    /// Closes idle flows, like a drain.
    pub(crate) async fn close(&self, idle: Vec<Flow>) -> Result<Vec<SocketCookie>> {
        Ok(drains::shared()
            .0
            .close_idle(&self.scope, idle, CancellationToken::new())
            .await?)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        step("ending the servers");
        // All processes of the cgroup, because servers leave their workers behind.
        for _ in 0..50 {
            if self.signal(Signal::KILL).is_ok_and(|n| n == 0) {
                break;
            }
            sleep(Duration::from_millis(10));
        }
        for process in &mut self.processes {
            // It may not have moved into the cgroup yet.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
