//! The mounts and settings in a node's namespaces.

use std::ffi::CString;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};

use super::SandboxPaths;

const CGROUPS: &str = "/sys/fs/cgroup";

/// Sets up the namespaces that the calling process has just made.
pub(super) fn arrange(paths: &SandboxPaths) -> Result<()> {
    // First, because otherwise an unmount here would unmount on the machine, too.
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .context("can't make mounts private")?;
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_over("proc", "/proc", "proc", plain, "")?;

    // On machines with cgroup v1 this is a tmpfs with the controllers' mounts.
    let _ = unmount(CGROUPS, UnmountFlags::DETACH);
    mount_over("cgroup2", CGROUPS, "cgroup2", plain, "")?;
    enter_cgroup(paths)?;

    mount_over(
        "tmpfs",
        "/run",
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=755",
    )?;
    // Shared, as under systemd, so that later mounts below can propagate to containers.
    mount_change("/run", MountPropagationFlags::SHARED).context("can't share mounts in /run")?;
    // containerd's network library always keeps state in /var/lib/cni.
    let upper = "/run/ebb-node/var-lib";
    let work = "/run/ebb-node/var-lib-work";
    fs::create_dir_all(upper)?;
    fs::create_dir_all(work)?;
    let options = format!("lowerdir=/var/lib,upperdir={upper},workdir={work}");
    mount_over(
        "overlay",
        "/var/lib",
        "overlay",
        MountFlags::empty(),
        &options,
    )?;
    // BPF objects that an agent pins go away with the namespace. Kernels without bpffs need nothing.
    if Path::new("/sys/fs/bpf").is_dir() {
        let _ = mount_over("bpf", "/sys/fs/bpf", "bpf", plain, "");
    }

    rustix::system::sethostname(b"ebb-node").context("can't set the host name")?;
    sysctl("net/ipv4/ip_forward", "1")?;
    if Path::new("/proc/sys/net/ipv6").is_dir() {
        for scope in ["all", "default"] {
            sysctl(&format!("net/ipv6/conf/{scope}/disable_ipv6"), "0")?;
            sysctl(&format!("net/ipv6/conf/{scope}/forwarding"), "1")?;
            // No other host is on this network, and duplicate address detection takes over a second.
            sysctl(&format!("net/ipv6/conf/{scope}/accept_dad"), "0")?;
        }
    }
    Ok(())
}

/// Moves the calling process into the sandbox's cgroup for all processes outside pods.
fn enter_cgroup(paths: &SandboxPaths) -> Result<()> {
    let system = paths.system_cgroup();
    fs::create_dir_all(&system).with_context(|| format!("can't make {}", system.display()))?;
    fs::write(system.join("cgroup.procs"), "0")
        .with_context(|| format!("can't move into {}", system.display()))
}

fn mount_over(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> Result<()> {
    let options = CString::new(options)?;
    mount(source, target, kind, flags, options.as_c_str())
        .with_context(|| format!("can't mount {kind} on {target}"))
}

fn sysctl(name: &str, value: &str) -> Result<()> {
    fs::write(format!("/proc/sys/{name}"), value)
        .with_context(|| format!("can't set {name}={value}"))
}
