//! Undoing an installation: the kubelet's setting first, the rest only when the kubelet has left the proxy.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{
    InstallError, SERVICE, SOCKET, carry_out, failed, kubelet_setting, path_state, systemctl,
    systemd_runs,
};
use crate::{
    host::{
        kubelet::{EndpointSource, RunningKubelet, clients_of, same_socket, unix_table},
        plan::{self, InstallPlan, Step},
        state::{Artifact, InstallState, STATE_FILE},
    },
    linux::files::{self, resolve_in_nofollow},
};

#[derive(Debug)]
pub(crate) enum Removal {
    /// Nothing is installed.
    Nothing,
    /// What was done, or what a dry run would do.
    Done {
        /// One action per line.
        lines: Vec<String>,
        /// Files that were changed since the installation, and are left.
        left: Vec<PathBuf>,
    },
}

/// Undoes what `ebb install-cri` did to the host below `root`; a dry run only prints what it would do.
///
/// # Errors
///
/// [`InstallError::Refused`] while the kubelet uses the proxy or may use it, unless `force`. By then the kubelet's
/// drop-in is removed, except by a dry run, and the kubelet must be restarted. Other errors if a file can't be
/// removed; the state file stays then, so that the removal can be repeated.
pub(crate) fn remove(root: &Path, dry_run: bool, force: bool) -> Result<Removal, InstallError> {
    let state = InstallState::load(root).map_err(failed("read", Path::new(STATE_FILE)))?;
    let Some(mut state) = state else {
        return Ok(Removal::Nothing);
    };
    let is_setting = |m: &Artifact| m.path().ends_with(kubelet_setting::DROP_IN);
    let (setting, rest): (Vec<Artifact>, Vec<Artifact>) =
        state.made.iter().cloned().partition(|m| is_setting(m));
    let mut lines = Vec::new();
    let mut left = Vec::new();
    let first = plan::undo(&setting, |path| path_state(root, path));
    describe(&first, &mut lines, &mut left);
    if !dry_run {
        for step in &first.steps {
            carry_out(root, step)?;
        }
        if !setting.is_empty() {
            state.made.clone_from(&rest);
            state
                .save(root)
                .map_err(failed("write", Path::new(STATE_FILE)))?;
        }
    }
    if !force {
        // The drop-in counts as removed in a dry run, too.
        let going: Vec<&Path> = setting.iter().map(Artifact::path).collect();
        if let Some(why) = in_use(root, &state, &going) {
            let first = match dry_run && !first.steps.is_empty() {
                true => format!("this would {}, then stop here: ", lines.join(", ")),
                false => String::new(),
            };
            return Err(InstallError::Refused(first + &why));
        }
    }
    let second = plan::undo(&rest, |path| path_state(root, path));
    if systemd_runs(root) {
        lines.push(format!("systemctl stop {SERVICE} {SOCKET}"));
        if !dry_run {
            systemctl(&["stop", SERVICE, SOCKET])?;
        }
    }
    describe(&second, &mut lines, &mut left);
    lines.push(format!("remove {STATE_FILE}"));
    if !dry_run {
        let (directories, files): (Vec<&Step>, Vec<&Step>) = second
            .steps
            .iter()
            .partition(|s| matches!(s, Step::RemoveDirectory(_)));
        for step in files {
            carry_out(root, step)?;
        }
        // The state file is the last file: until then the removal can be repeated.
        resolve_in_nofollow(root, Path::new(STATE_FILE))
            .and_then(|state| files::remove(&state))
            .map_err(failed("remove", Path::new(STATE_FILE)))?;
        for step in directories {
            carry_out(root, step)?;
        }
        if systemd_runs(root) {
            systemctl(&["daemon-reload"])?;
        }
    }
    Ok(Removal::Done { lines, left })
}

fn describe(plan: &InstallPlan, lines: &mut Vec<String>, left: &mut Vec<PathBuf>) {
    lines.extend(plan.steps.iter().map(Step::to_string));
    for (path, why) in &plan.left {
        lines.push(format!("leave {}: {why}", path.display()));
        left.push(path.clone());
    }
}

/// Why the proxy must stay: the kubelet uses it, or ebb cannot tell. A setting in a file of `going` does not count,
/// because that file is removed.
fn in_use(root: &Path, state: &InstallState, going: &[&Path]) -> Option<String> {
    let is_going = |k: &RunningKubelet| matches!(&k.source, EndpointSource::DropIn(p) if going.contains(&&**p));
    let configured = RunningKubelet::find(root)
        .filter(|k| same_socket(&k.endpoint, &state.socket) && !is_going(k));
    if let Some(kubelet) = configured {
        return Some(format!(
            "the kubelet still uses the proxy, set by {}: set its endpoint back to unix://{}, restart the kubelet, then \
             run this again (--force removes the proxy anyway, and the node fails)",
            kubelet.source,
            state.runtime.display()
        ));
    }
    match clients_of(root, &state.socket) {
        Ok(0) => None,
        Ok(clients) => Some(format!(
            "{clients} connections to {} are open: restart the kubelet (`systemctl restart kubelet`), which then \
             leaves the proxy, and run this again (--force does not wait for that)",
            state.socket.display()
        )),
        // Without a table there are no clients: the root is only a directory tree.
        Err(e) if e.kind() == io::ErrorKind::NotFound && root != Path::new("/") => None,
        Err(e) => Some(format!(
            "can't tell whether the kubelet is still connected to the proxy, from {}: {e} (--force skips this check)",
            unix_table(root).display()
        )),
    }
}
