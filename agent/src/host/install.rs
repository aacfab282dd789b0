//! Installing the CRI proxy on the host, and removing it again.
//!
//! The proxy's program goes to /opt/ebb/bin, because /usr, with /usr/local, is read-only on image-based
//! distributions, and /opt is for programs that no package manager installs. Units and the links that enable them go
//! to /etc/systemd/system; settings that depend on this host go into drop-ins of the units.

mod kubelet_setting;
mod remove;

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use ebb_core::socket_path;
pub(crate) use remove::{Removal, remove};

use super::{
    kubelet::{FIRST_VERSION, RunningKubelet},
    plan::{self, Conflict, InstallPlan, Item, PathState, Step},
    state::{Artifact, InstallState, STATE_FILE},
};
use crate::{
    linux::files::{self, digest, resolve_in, resolve_in_nofollow},
    pods::cri::{Cri, CriError},
};

const PROGRAM: &str = "/opt/ebb/bin/ebb-cri-proxy";
const UNITS: &str = "/etc/systemd/system";
const SERVICE: &str = "ebb-cri.service";
const SOCKET: &str = "ebb-cri.socket";
const SERVICE_UNIT: &str = include_str!("../../../deploy/systemd/ebb-cri.service");
const SOCKET_UNIT: &str = include_str!("../../../deploy/systemd/ebb-cri.socket");

/// Where the proxy listens, as in the socket unit.
pub(super) const PROXY_SOCKET: &str = socket_path::PROXY;

/// The suffix of any socket in front of CRI-O: the kubelet gets CRI-O's statistics in another way than other
/// runtimes', and recognises CRI-O by this suffix (`UsingLegacyCadvisorStats`, `pkg/kubelet/cadvisor/util.go`).
pub(super) const CRIO_SUFFIX: &str = "run/crio/crio.sock";

/// Where the proxy listens in front of CRI-O.
const CRIO_PROXY_SOCKET: &str = socket_path::PROXY_OF_CRIO;

#[derive(Clone, Debug)]
pub(crate) struct InstallOptions {
    /// The host's root directory.
    pub(crate) root: PathBuf,
    /// The runtime's socket; `None` to find it.
    pub(crate) runtime: Option<PathBuf>,
    /// Set the kubelet's endpoint, too.
    pub(crate) apply: bool,
}

/// Why an installation or removal did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstallError {
    /// The host does not meet a requirement. The text says what to do.
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Conflict(#[from] Conflict),
    #[error("can't {what} {}: {source}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("`systemctl {command}` failed: {why}")]
    Systemctl { command: String, why: String },
    #[error(
        "the proxy was installed and started, but does not answer; the kubelet's setting was not changed"
    )]
    NoAnswer(#[source] CriError),
    #[error(
        "the container runtime of this host does not answer, so nothing was changed; start it, or give its own \
         socket with --runtime"
    )]
    NoRuntime(#[source] CriError),
    /// The installation stopped half-way.
    #[error("{0}; run `ebb uninstall-cri` to undo what was done so far")]
    Unfinished(#[source] Box<Self>),
}

/// A planned installation.
#[derive(Debug)]
pub(crate) struct Installation {
    root: PathBuf,
    runtime: PathBuf,
    socket: PathBuf,
    plan: InstallPlan,
    /// The kubelet's drop-in, if it is to be written. It is written after the proxy has answered.
    drop_in: Option<PathBuf>,
    /// What else the user should know or do.
    pub(crate) notes: Vec<String>,
}

/// Whether systemd runs this host, so that `systemctl` works (`sd_booted(3)`).
fn systemd_runs(root: &Path) -> bool {
    root == Path::new("/") && Path::new("/run/systemd/system").is_dir()
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> InstallError + 'a {
    move |source| InstallError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// The proxy's program, which is installed beside this one.
fn proxy_program() -> Result<Vec<u8>, InstallError> {
    let own = env::current_exe().map_err(failed("find", Path::new("/proc/self/exe")))?;
    let path = own.with_file_name("ebb-cri-proxy");
    fs::read(&path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => InstallError::Refused(format!(
            "{} is missing: put the proxy beside this program, as in the image",
            path.display()
        )),
        _ => failed("read", &path)(e),
    })
}

/// What is at a path of the host.
fn path_state(root: &Path, path: &Path) -> PathState {
    let Ok(at) = resolve_in_nofollow(root, path) else {
        return PathState::Other;
    };
    match fs::symlink_metadata(&at) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => PathState::Absent,
        Err(_) => PathState::Other,
        Ok(m) if m.is_dir() => PathState::Directory,
        Ok(m) if m.is_file() => {
            fs::read(&at).map_or(PathState::Other, |b| PathState::File(digest(&b)))
        }
        Ok(m) if m.is_symlink() && resolve_in(root, path).is_ok_and(|p| p.is_dir()) => {
            PathState::Directory
        }
        Ok(m) if m.is_symlink() => fs::read_link(&at).map_or(PathState::Other, PathState::Link),
        Ok(_) => PathState::Other,
    }
}

/// Plans the installation on this host. Changes nothing.
///
/// # Errors
///
/// [`InstallError`] if the host does not meet a requirement, another file is in the place of one of ebb's, or a file
/// can't be read.
pub(crate) fn prepare(options: &InstallOptions) -> Result<Installation, InstallError> {
    let root = &options.root;
    let program = proxy_program()?;
    let state = InstallState::load(root).map_err(failed("read", Path::new(STATE_FILE)))?;
    let kubelet = RunningKubelet::find(root);
    let mut notes = Vec::new();
    match &kubelet {
        Some(kubelet) => kubelet_setting::check_version(kubelet, root, &mut notes)?,
        None => notes.push(format!(
            "no kubelet runs here, so its version was not checked: it must be {}.{} or later",
            FIRST_VERSION.0, FIRST_VERSION.1
        )),
    }
    let runtime = kubelet_setting::runtime(options, kubelet.as_ref(), state.as_ref())?;
    let is_crio = runtime.ends_with("crio.sock");
    let socket = PathBuf::from(if is_crio {
        CRIO_PROXY_SOCKET
    } else {
        PROXY_SOCKET
    });
    let made = state.map(|s| s.made).unwrap_or_default();
    let mut desired = desired(program, &runtime, &socket);
    let drop_in = kubelet_setting::drop_in(options, kubelet.as_ref(), &socket, &made, &mut notes)?;
    // A drop-in from an earlier `--apply` stays.
    let applied = made
        .iter()
        .map(Artifact::path)
        .find(|p| p.ends_with(kubelet_setting::DROP_IN));
    if let Some(path) = drop_in.as_deref().or(applied) {
        desired.push(Item::File {
            path: path.to_owned(),
            bytes: kubelet_setting::text(&socket).into_bytes(),
            mode: 0o644,
        });
    }
    for item in &desired {
        resolve_in_nofollow(root, item.path()).map_err(failed("reach", item.path()))?;
    }
    let mut plan = plan::install(&desired, &made, |path| path_state(root, path))?;
    // The directory of the state file is ebb's, too, if it does not exist.
    let home = Path::new(STATE_FILE).parent().unwrap_or(Path::new("/"));
    let missing = home
        .ancestors()
        .take_while(|d| path_state(root, d) == PathState::Absent);
    let missing: Vec<Artifact> = missing
        .map(|d| Artifact::Directory { path: d.to_owned() })
        .collect();
    plan.made.splice(0..0, missing);
    // Directories first, the outer before the inner: a stable order, so that a repeated installation changes nothing.
    plan.made.sort_by_key(|m| match m {
        Artifact::Directory { path } => (0, path.clone()),
        _ => (1, PathBuf::new()),
    });
    Ok(Installation {
        root: root.clone(),
        runtime,
        socket,
        plan,
        drop_in,
        notes,
    })
}

fn desired(program: Vec<u8>, runtime: &Path, socket: &Path) -> Vec<Item> {
    let unit = |name: &str, text: String| Item::File {
        path: Path::new(UNITS).join(name),
        bytes: text.into_bytes(),
        mode: 0o644,
    };
    // The link that `systemctl enable` would make, from the units' [Install].
    let enabled = |target: &str, name: &str| Item::Link {
        path: Path::new(UNITS).join(format!("{target}.wants")).join(name),
        target: Path::new(UNITS).join(name),
    };
    let mut items = vec![
        Item::File {
            path: PROGRAM.into(),
            bytes: program,
            mode: 0o755,
        },
        unit(SERVICE, SERVICE_UNIT.into()),
        unit(SOCKET, SOCKET_UNIT.into()),
        unit(
            &format!("{SERVICE}.d/10-runtime.conf"),
            format!(
                "# Written by `ebb install-cri`: the runtime's own socket on this host.\n[Service]\n\
                 Environment=\"EBB_CRI_SOCKET={}\"\n",
                runtime.display()
            ),
        ),
    ];
    if socket != Path::new(PROXY_SOCKET) {
        items.push(unit(
            &format!("{SOCKET}.d/10-path.conf"),
            format!(
                "# Written by `ebb install-cri`: in front of CRI-O the path must end like this.\n[Socket]\n\
                 ListenStream=\nListenStream={}\n",
                socket.display()
            ),
        ));
    }
    items.push(enabled("sockets.target", SOCKET));
    items.push(enabled("multi-user.target", SERVICE));
    items
}

impl Installation {
    /// Checks that a container runtime answers at the socket that the proxy will forward to. A host below another root
    /// may not run: then a missing socket is only noted.
    ///
    /// # Errors
    ///
    /// [`InstallError::NoRuntime`]
    pub(crate) async fn check_runtime(&mut self) -> Result<(), InstallError> {
        let runs = self.root == Path::new("/");
        let socket = match resolve_in(&self.root, &self.runtime) {
            Ok(socket) if runs || socket.exists() => socket,
            _ => {
                self.notes.push(format!(
                    "{} does not exist, so it was not checked that the container runtime answers there",
                    self.runtime.display()
                ));
                return Ok(());
            }
        };
        let runtime = Cri::connect(&socket).await;
        runtime.map(drop).map_err(InstallError::NoRuntime)
    }

    /// What will be done, one action per line.
    pub(crate) fn describe(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.plan.steps.iter().map(Step::to_string).collect();
        if systemd_runs(&self.root) {
            lines.extend(
                self.commands()
                    .iter()
                    .map(|c| format!("systemctl {}", c.join(" "))),
            );
        }
        let left = self.plan.left.iter();
        lines.extend(left.map(|(path, why)| format!("leave {}: {why}", path.display())));
        lines
    }

    fn commands(&self) -> Vec<Vec<&'static str>> {
        if self.plan.steps.is_empty() {
            return vec![vec!["start", SOCKET, SERVICE]];
        }
        // `restart` starts a service that is not running, and replaces one of an older version.
        vec![
            vec!["daemon-reload"],
            vec!["start", SOCKET],
            vec!["restart", SERVICE],
        ]
    }

    /// Installs: writes the state first, so that every change can be undone, and the kubelet's setting last.
    ///
    /// # Errors
    ///
    /// [`InstallError`]. `ebb uninstall-cri` undoes what was done so far.
    pub(crate) async fn carry_out(&self) -> Result<(), InstallError> {
        self.save_state()?;
        self.apply()
            .await
            .map_err(|why| InstallError::Unfinished(Box::new(why)))
    }

    fn save_state(&self) -> Result<(), InstallError> {
        let home = resolve_in_nofollow(&self.root, Path::new(STATE_FILE))
            .map_err(failed("reach", Path::new(STATE_FILE)))?;
        let home = home.parent().unwrap_or(&self.root);
        fs::create_dir_all(home).map_err(failed("make", home))?;
        let state = InstallState::new(
            self.runtime.clone(),
            self.socket.clone(),
            self.plan.made.clone(),
        );
        let known =
            InstallState::load(&self.root).map_err(failed("read", Path::new(STATE_FILE)))?;
        if known.as_ref() != Some(&state) {
            state
                .save(&self.root)
                .map_err(failed("write", Path::new(STATE_FILE)))?;
        }
        Ok(())
    }

    async fn apply(&self) -> Result<(), InstallError> {
        let late = |step: &&Step| matches!(step, Step::Put(item) if Some(item.path()) == self.drop_in.as_deref());
        let (last, first): (Vec<&Step>, Vec<&Step>) = self.plan.steps.iter().partition(late);
        for step in first {
            carry_out(&self.root, step)?;
        }
        if systemd_runs(&self.root) {
            for command in self.commands() {
                systemctl(&command)?;
            }
            Cri::connect(&self.socket)
                .await
                .map_err(InstallError::NoAnswer)?;
        }
        for step in last {
            carry_out(&self.root, step)?;
        }
        Ok(())
    }
}

fn carry_out(root: &Path, step: &Step) -> Result<(), InstallError> {
    let path = match step {
        Step::Put(item) => item.path(),
        Step::MakeDirectory(path) | Step::Remove(path) | Step::RemoveDirectory(path) => path,
    };
    let at = resolve_in_nofollow(root, path).map_err(failed("reach", path))?;
    match step {
        Step::MakeDirectory(_) => match fs::create_dir(at) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(failed("make", path)(e)),
            _ => Ok(()),
        },
        Step::Put(Item::File { bytes, mode, .. }) => {
            files::write(&at, bytes, *mode).map_err(failed("write", path))
        }
        Step::Put(Item::Link { target, .. }) => {
            files::remove(&at).map_err(failed("replace", path))?;
            std::os::unix::fs::symlink(target, at).map_err(failed("link", path))
        }
        Step::Remove(_) => files::remove(&at).map_err(failed("remove", path)),
        Step::RemoveDirectory(_) => files::remove_empty(&at).map_err(failed("remove", path)),
    }
}

fn systemctl(command: &[&str]) -> Result<(), InstallError> {
    let fault = |why: String| InstallError::Systemctl {
        command: command.join(" "),
        why,
    };
    let out = Command::new("systemctl")
        .args(command)
        .output()
        .map_err(|e| fault(e.to_string()))?;
    if out.status.success() {
        return Ok(());
    }
    Err(fault(
        String::from_utf8_lossy(&out.stderr)
            .trim()
            .replace('\n', "; "),
    ))
}
