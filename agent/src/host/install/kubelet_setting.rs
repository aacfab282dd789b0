//! What the kubelet has to do with an installation: its version, the runtime that it uses, and its one setting.

use std::path::{Path, PathBuf};

use super::{CRIO_PROXY_SOCKET, InstallError, PROXY_SOCKET, Wanted};
use crate::host::{
    kubelet::{FIRST_VERSION, Kubelet, Source, same_socket, well_known_runtime},
    state::{Made, State},
};

/// The drop-in's name in the kubelet's `--config-dir`. Late, since the last one counts.
pub(super) const DROP_IN: &str = "99-ebb-cri.conf";

/// Refuses a kubelet that the proxy can't serve; notes it if its version can't be asked.
pub(super) fn check_version(
    kubelet: &Kubelet,
    root: &Path,
    notes: &mut Vec<String>,
) -> Result<(), InstallError> {
    let (major, minor) = FIRST_VERSION;
    match kubelet.version(root) {
        Ok(version) if version < FIRST_VERSION => Err(InstallError::Refused(format!(
            "the kubelet is version {}.{}, and the proxy can serve {major}.{minor} and later: older ones send an \
             `:authority` that is no valid one, and would not get through",
            version.0, version.1
        ))),
        Ok(_) => Ok(()),
        Err(e) => {
            notes.push(format!(
                "the kubelet's version could not be asked ({e}): it has to be {major}.{minor} or later"
            ));
            Ok(())
        }
    }
}

/// The runtime's own socket: by flag, by the kubelet's configuration as long as that is not the proxy, by the
/// earlier installation, or the one that is there.
pub(super) fn runtime(
    wanted: &Wanted,
    kubelet: Option<&Kubelet>,
    state: Option<&State>,
) -> Result<PathBuf, InstallError> {
    let of_kubelet = kubelet
        .map(|k| k.endpoint.clone())
        .filter(|endpoint| !is_proxy(endpoint));
    wanted
        .runtime
        .clone()
        .or(of_kubelet)
        .or_else(|| state.map(|s| s.runtime.clone()))
        .or_else(|| well_known_runtime(&wanted.root))
        .ok_or_else(|| {
            InstallError::Refused(
                "no container runtime was found: name its socket with --runtime".into(),
            )
        })
}

fn is_proxy(endpoint: &Path) -> bool {
    [PROXY_SOCKET, CRIO_PROXY_SOCKET]
        .iter()
        .any(|socket| same_socket(endpoint, Path::new(socket)))
}

/// The kubelet's setting, as a drop-in of its configuration.
pub(super) fn text(socket: &Path) -> String {
    format!(
        "# Written by `ebb install-cri --apply`; `ebb uninstall-cri` removes it.\n\
         apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
         containerRuntimeEndpoint: unix://{}\n",
        socket.display()
    )
}

/// Where the drop-in for the kubelet goes, if it is to be written; notes what to change by hand otherwise.
pub(super) fn drop_in(
    wanted: &Wanted,
    kubelet: Option<&Kubelet>,
    socket: &Path,
    made: &[Made],
    notes: &mut Vec<String>,
) -> Result<Option<PathBuf>, InstallError> {
    let line = format!("containerRuntimeEndpoint: unix://{}", socket.display());
    let Some(kubelet) = kubelet else {
        if wanted.apply {
            return Err(InstallError::Refused(
                "no kubelet runs here, so --apply can't find its configuration".into(),
            ));
        }
        notes.push(format!("the kubelet's configuration needs `{line}`"));
        return Ok(None);
    };
    if same_socket(&kubelet.endpoint, socket) {
        notes.push(format!(
            "the kubelet uses the proxy already, by {}",
            kubelet.source
        ));
        return Ok(None);
    }
    let obstacle = match (&kubelet.source, &kubelet.config_dir) {
        (Source::Flag, _) => Some(format!(
            "its flag --container-runtime-endpoint goes before its configuration: set the flag to \
             unix://{}, or remove it (kubeadm has it in /var/lib/kubelet/kubeadm-flags.env)",
            socket.display()
        )),
        (_, None) => Some(format!(
            "it runs without --config-dir, and ebb does not edit {}: put `{line}` there",
            kubelet
                .config
                .as_deref()
                .map_or_else(|| "its configuration".into(), |p| p.display().to_string())
        )),
        (Source::DropIn(path), Some(directory)) if *path > directory.join(DROP_IN) => {
            Some(format!(
                "{} comes after ebb's drop-in: put `{line}` there",
                path.display()
            ))
        }
        _ => None,
    };
    let restart = "then restart the kubelet (`systemctl restart kubelet`); running containers stay as they are";
    match (obstacle, &kubelet.config_dir) {
        (Some(obstacle), _) if wanted.apply => Err(InstallError::Refused(format!(
            "the kubelet's endpoint can't be changed by a drop-in: {obstacle}"
        ))),
        (Some(obstacle), _) => {
            notes.push(format!(
                "the kubelet does not use the proxy yet: {obstacle}; {restart}"
            ));
            Ok(None)
        }
        (None, Some(directory)) => {
            let path = directory.join(DROP_IN);
            if wanted.apply {
                notes.push(format!(
                    "{} is read when the kubelet starts: {restart}",
                    path.display()
                ));
                return Ok(Some(path));
            }
            if !made.iter().any(|m| m.path() == path) {
                notes.push(format!(
                    "the kubelet does not use the proxy yet: write {} (or run this with --apply), {restart}\n{}",
                    path.display(),
                    text(socket).trim_end()
                ));
            }
            Ok(None)
        }
        (None, None) => Ok(None),
    }
}
