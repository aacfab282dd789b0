//! Undoing an installation: the kubelet's setting first, the rest only when the kubelet has left the proxy.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{
    InstallError, SERVICE, SOCKET, carry_out, failed, is, kubelet_setting, systemctl, systemd_runs,
};
use crate::host::{
    files::{self, under},
    kubelet::{Kubelet, Source, clients_of, same_socket, unix_table},
    plan::{self, Plan, Step},
    state::{Made, STATE_FILE, State},
};

/// What there was to do.
#[derive(Debug)]
pub enum Removal {
    /// Nothing is installed.
    Nothing,
    /// This is what was done, or would be.
    Done {
        /// One thing a line.
        lines: Vec<String>,
        /// Files that somebody changed, which are still there.
        left: Vec<PathBuf>,
    },
}

/// Undoes what `ebb install-cri` did to the host below `root`, or says what it would do.
///
/// # Errors
///
/// [`InstallError::Refused`] while the kubelet uses the proxy or may use it, unless `force`: its drop-in is removed
/// by then (not by a dry run, which refuses as well), and the kubelet has to be restarted. Others if a file can't be removed; what was is forgotten, the rest is still
/// in the state.
pub fn remove(root: &Path, dry_run: bool, force: bool) -> Result<Removal, InstallError> {
    let state = State::load(root).map_err(failed("read", Path::new(STATE_FILE)))?;
    let Some(mut state) = state else {
        return Ok(Removal::Nothing);
    };
    let is_setting = |m: &Made| m.path().ends_with(kubelet_setting::DROP_IN);
    let (setting, rest): (Vec<Made>, Vec<Made>) =
        state.made.iter().cloned().partition(|m| is_setting(m));
    let mut lines = Vec::new();
    let mut left = Vec::new();
    let first = plan::undo(&setting, |path| is(root, path));
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
        // What a dry run leaves there counts as removed.
        let going: Vec<&Path> = setting.iter().map(Made::path).collect();
        if let Some(why) = in_use(root, &state, &going) {
            let first = match dry_run && !first.steps.is_empty() {
                true => format!("this would {}, then stop here: ", lines.join(", ")),
                false => String::new(),
            };
            return Err(InstallError::Refused(first + &why));
        }
    }
    let second = plan::undo(&rest, |path| is(root, path));
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
        // Last of the files: until here, it can all be done again.
        under(root, Path::new(STATE_FILE))
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

fn describe(plan: &Plan, lines: &mut Vec<String>, left: &mut Vec<PathBuf>) {
    lines.extend(plan.steps.iter().map(Step::to_string));
    for (path, why) in &plan.left {
        lines.push(format!("leave {}: {why}", path.display()));
        left.push(path.clone());
    }
}

/// Why the proxy has to stay: the kubelet uses it, or nobody can tell. Settings that are `going` do not count.
fn in_use(root: &Path, state: &State, going: &[&Path]) -> Option<String> {
    let is_going = |k: &Kubelet| matches!(&k.source, Source::DropIn(p) if going.contains(&&**p));
    let told =
        Kubelet::find(root).filter(|k| same_socket(&k.endpoint, &state.socket) && !is_going(k));
    if let Some(kubelet) = told {
        return Some(format!(
            "the kubelet still uses the proxy, by {}: set it back to unix://{}, restart the kubelet, then run this \
             again (--force removes the proxy all the same, and the node fails)",
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
        // No table, no clients: a root that is only a directory tree, with nothing running in it.
        Err(e) if e.kind() == io::ErrorKind::NotFound && root != Path::new("/") => None,
        Err(e) => Some(format!(
            "can't tell whether the kubelet is still connected to the proxy, by {}: {e} (--force does not ask)",
            unix_table(root).display()
        )),
    }
}
