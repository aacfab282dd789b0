//! Installing the CRI proxy on the host, and removing it again.
//!
//! The program goes to /opt/ebb/bin: /usr, with /usr/local, is read-only on image-based distributions, and /opt is
//! there for programs that no package manager brought. Units and the links that enable them go to
//! /etc/systemd/system; whatever depends on this host goes into drop-ins of theirs.

mod kubelet_setting;
mod remove;

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

pub use remove::{Removal, remove};

use super::{
    files::{self, digest, followed, under},
    kubelet::{FIRST_VERSION, Kubelet},
    plan::{self, Conflict, Is, Item, Plan, Step},
    state::{Made, STATE_FILE, State},
};
use crate::pods::cri::{Cri, CriError};

const PROGRAM: &str = "/opt/ebb/bin/ebb";
const UNITS: &str = "/etc/systemd/system";
const SERVICE: &str = "ebb-cri.service";
const SOCKET: &str = "ebb-cri.socket";
const SERVICE_UNIT: &str = include_str!("../../../deploy/systemd/ebb-cri.service");
const SOCKET_UNIT: &str = include_str!("../../../deploy/systemd/ebb-cri.socket");

/// Where the proxy listens: what the socket unit says.
pub const PROXY_SOCKET: &str = "/run/ebb/cri.sock";

/// What the path of any socket in front of CRI-O has to end with: the kubelet takes CRI-O's statistics by another
/// way than other runtimes', and tells it by this (`UsingLegacyCadvisorStats`, `pkg/kubelet/cadvisor/util.go`).
pub const CRIO_SUFFIX: &str = "run/crio/crio.sock";

/// Where the proxy listens in front of CRI-O.
const CRIO_PROXY_SOCKET: &str = "/run/ebb/run/crio/crio.sock";

/// What to install, and where.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The host's root directory.
    pub root: PathBuf,
    /// The runtime's socket, where that is not to be found out.
    pub runtime: Option<PathBuf>,
    /// Change the kubelet's endpoint, too.
    pub apply: bool,
}

/// Why the host is not changed, or not any further.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The host is not fit for it, or something is in the way. The text says what to do.
    #[error("{0}")]
    Refused(String),
    /// A file of somebody else's is in the way.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// A file can't be read or written.
    #[error("can't {what} {}: {source}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// systemd did not do what it was asked.
    #[error("`systemctl {command}` failed: {why}")]
    Systemctl {
        /// The command.
        command: String,
        /// What it said.
        why: String,
    },
    /// The proxy does not answer, so the kubelet is not pointed at it.
    #[error(
        "the proxy was installed and started, and does not answer; the kubelet's setting was not changed"
    )]
    NoAnswer(#[source] CriError),
    /// It broke off in the middle.
    #[error("{0}; run `ebb uninstall-cri` to take back what was done until then")]
    Unfinished(#[source] Box<Self>),
}

/// An installation, planned.
#[derive(Debug)]
pub struct Installation {
    root: PathBuf,
    runtime: PathBuf,
    socket: PathBuf,
    plan: Plan,
    /// The kubelet's drop-in, if it is to be written: after the proxy has answered.
    drop_in: Option<PathBuf>,
    /// What to know and to do besides.
    pub notes: Vec<String>,
}

/// Whether systemd runs this host, and may be asked (`sd_booted(3)`).
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

/// What is at a path of the host.
fn is(root: &Path, path: &Path) -> Is {
    let Ok(at) = under(root, path) else {
        return Is::Other;
    };
    match fs::symlink_metadata(&at) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Is::Absent,
        Err(_) => Is::Other,
        Ok(m) if m.is_dir() => Is::Directory,
        Ok(m) if m.is_file() => fs::read(&at).map_or(Is::Other, |b| Is::File(digest(&b))),
        Ok(m) if m.is_symlink() && followed(root, path).is_ok_and(|p| p.is_dir()) => Is::Directory,
        Ok(m) if m.is_symlink() => fs::read_link(&at).map_or(Is::Other, Is::Link),
        Ok(_) => Is::Other,
    }
}

/// Looks at the host and plans. Changes nothing.
///
/// # Errors
///
/// [`InstallError`]: the host is not fit for it, or a file is in the way or can't be read.
pub fn prepare(wanted: &Wanted) -> Result<Installation, InstallError> {
    let root = &wanted.root;
    let program =
        fs::read("/proc/self/exe").map_err(failed("read", Path::new("/proc/self/exe")))?;
    let state = State::load(root).map_err(failed("read", Path::new(STATE_FILE)))?;
    let kubelet = Kubelet::find(root);
    let mut notes = Vec::new();
    match &kubelet {
        Some(kubelet) => kubelet_setting::check_version(kubelet, root, &mut notes)?,
        None => notes.push(format!(
            "no kubelet runs here, so its version was not checked: it has to be {}.{} or later",
            FIRST_VERSION.0, FIRST_VERSION.1
        )),
    }
    let runtime = kubelet_setting::runtime(wanted, kubelet.as_ref(), state.as_ref())?;
    let is_crio = runtime.ends_with("crio.sock");
    let socket = PathBuf::from(if is_crio {
        CRIO_PROXY_SOCKET
    } else {
        PROXY_SOCKET
    });
    let made = state.map(|s| s.made).unwrap_or_default();
    let mut desired = desired(program, &runtime, &socket);
    let drop_in = kubelet_setting::drop_in(wanted, kubelet.as_ref(), &socket, &made, &mut notes)?;
    // What was applied earlier stays so.
    let applied = made
        .iter()
        .map(Made::path)
        .find(|p| p.ends_with(kubelet_setting::DROP_IN));
    if let Some(path) = drop_in.as_deref().or(applied) {
        desired.push(Item::File {
            path: path.to_owned(),
            bytes: kubelet_setting::text(&socket).into_bytes(),
            mode: 0o644,
        });
    }
    for item in &desired {
        under(root, item.path()).map_err(failed("reach", item.path()))?;
    }
    let mut plan = plan::install(&desired, &made, |path| is(root, path))?;
    // The state's own directory is ebb's, too, if it was not there.
    let home = Path::new(STATE_FILE).parent().unwrap_or(Path::new("/"));
    let missing = home.ancestors().take_while(|d| is(root, d) == Is::Absent);
    let missing: Vec<Made> = missing
        .map(|d| Made::Directory { path: d.to_owned() })
        .collect();
    plan.made.splice(0..0, missing);
    // Directories first, the outer before the inner: in a stable order, so that doing it again changes nothing.
    plan.made.sort_by_key(|m| match m {
        Made::Directory { path } => (0, path.clone()),
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
    // What `systemctl enable` would do, by the units' [Install].
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
                "# Written by `ebb install-cri`: in front of CRI-O the path has to end so.\n[Socket]\n\
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
    /// What will be done, one thing a line.
    pub fn describe(&self) -> Vec<String> {
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
        // A service that is not running is started by this; one of an older version is replaced.
        vec![
            vec!["daemon-reload"],
            vec!["start", SOCKET],
            vec!["restart", SERVICE],
        ]
    }

    /// Does it: the state first, so that whatever is done can be undone, the kubelet's setting last.
    ///
    /// # Errors
    ///
    /// [`InstallError`]. What was done until then is in the state, for `ebb uninstall-cri`.
    pub async fn carry_out(&self) -> Result<(), InstallError> {
        self.announce()?;
        self.change()
            .await
            .map_err(|why| InstallError::Unfinished(Box::new(why)))
    }

    fn announce(&self) -> Result<(), InstallError> {
        let home = under(&self.root, Path::new(STATE_FILE))
            .map_err(failed("reach", Path::new(STATE_FILE)))?;
        let home = home.parent().unwrap_or(&self.root);
        fs::create_dir_all(home).map_err(failed("make", home))?;
        let state = State::new(
            self.runtime.clone(),
            self.socket.clone(),
            self.plan.made.clone(),
        );
        let known = State::load(&self.root).map_err(failed("read", Path::new(STATE_FILE)))?;
        if known.as_ref() != Some(&state) {
            state
                .save(&self.root)
                .map_err(failed("write", Path::new(STATE_FILE)))?;
        }
        Ok(())
    }

    async fn change(&self) -> Result<(), InstallError> {
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
    let at = under(root, path).map_err(failed("reach", path))?;
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
