//! The kubelet in an installation: its version, its runtime, and the setting of its endpoint.

use std::path::{Path, PathBuf};

use ebb_core::socket_path::is_proxy;

use super::{InstallError, InstallOptions};
use crate::host::{
    kubelet::{EndpointSource, FIRST_VERSION, RunningKubelet, same_socket, well_known_runtime},
    state::{Artifact, InstallState},
};

/// The drop-in's name in the kubelet's `--config-dir`. It sorts late, because the last drop-in wins.
pub(super) const DROP_IN: &str = "99-ebb-cri.conf";

/// Refuses a kubelet that the proxy can't serve. Adds a note if its version is unknown.
pub(super) fn check_version(
    kubelet: &RunningKubelet,
    root: &Path,
    notes: &mut Vec<String>,
) -> Result<(), InstallError> {
    let (major, minor) = FIRST_VERSION;
    match kubelet.version(root) {
        Ok(version) if version < FIRST_VERSION => Err(InstallError::Refused(format!(
            "the kubelet is version {}.{}, and the proxy serves {major}.{minor} and later: older kubelets send an \
             invalid `:authority`, so the proxy can't read their calls",
            version.0, version.1
        ))),
        Ok(_) => Ok(()),
        Err(e) => {
            notes.push(format!(
                "the kubelet's version is unknown ({e}): it must be {major}.{minor} or later"
            ));
            Ok(())
        }
    }
}

/// The runtime's own socket: from the flag, else from the kubelet's configuration unless that names the proxy, else
/// from an earlier installation, else a well-known one that exists.
pub(super) fn runtime(
    options: &InstallOptions,
    kubelet: Option<&RunningKubelet>,
    state: Option<&InstallState>,
) -> Result<PathBuf, InstallError> {
    if let Some(runtime) = options.runtime.as_deref().filter(|r| is_proxy(r)) {
        return Err(InstallError::Refused(format!(
            "--runtime {} is the proxy's own socket: give the container runtime's, such as \
             /run/containerd/containerd.sock",
            runtime.display()
        )));
    }
    let of_kubelet = kubelet
        .map(|k| k.endpoint.clone())
        .filter(|endpoint| !is_proxy(endpoint));
    options
        .runtime
        .clone()
        .or(of_kubelet)
        .or_else(|| state.map(|s| s.runtime.clone()))
        .or_else(|| well_known_runtime(&options.root))
        .ok_or_else(|| {
            InstallError::Refused(
                "found no container runtime: give its socket with --runtime".into(),
            )
        })
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

/// The path of the kubelet's drop-in, if it is to be written. Otherwise adds a note with what to change by hand.
pub(super) fn drop_in(
    options: &InstallOptions,
    kubelet: Option<&RunningKubelet>,
    socket: &Path,
    made: &[Artifact],
    notes: &mut Vec<String>,
) -> Result<Option<PathBuf>, InstallError> {
    let line = format!("containerRuntimeEndpoint: unix://{}", socket.display());
    let Some(kubelet) = kubelet else {
        if options.apply {
            return Err(InstallError::Refused(
                "no kubelet runs here, so --apply can't find its configuration".into(),
            ));
        }
        notes.push(format!("the kubelet's configuration needs `{line}`"));
        return Ok(None);
    };
    if same_socket(&kubelet.endpoint, socket) {
        notes.push(format!(
            "the kubelet uses the proxy already, set by {}",
            kubelet.source
        ));
        return Ok(None);
    }
    let obstacle = match (&kubelet.source, &kubelet.config_dir) {
        (EndpointSource::Flag, _) => Some(format!(
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
        (EndpointSource::DropIn(path), Some(directory)) if *path > directory.join(DROP_IN) => {
            Some(format!(
                "{} comes after ebb's drop-in: put `{line}` there",
                path.display()
            ))
        }
        _ => None,
    };
    let restart = "then restart the kubelet (`systemctl restart kubelet`); running containers stay as they are";
    match (obstacle, &kubelet.config_dir) {
        (Some(obstacle), _) if options.apply => Err(InstallError::Refused(format!(
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
            if options.apply {
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
