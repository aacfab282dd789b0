//! What a node finds in its mount and network namespaces.

use std::ffi::CString;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};

use super::Place;

const CGROUPS: &str = "/sys/fs/cgroup";

/// Arranges the namespaces that the calling process has just made.
pub(super) fn arrange(place: &Place) -> Result<()> {
    // First of all: without this, what is unmounted here would be unmounted on the machine.
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .context("can't make mounts private")?;
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_over("proc", "/proc", "proc", plain, "")?;

    // Machines with cgroup v1 have a tmpfs full of controllers here.
    let _ = unmount(CGROUPS, UnmountFlags::DETACH);
    mount_over("cgroup2", CGROUPS, "cgroup2", plain, "")?;
    enter_cgroup(place)?;

    mount_over(
        "tmpfs",
        "/run",
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=755",
    )?;
    // As systemd has it: a container may be told of what is mounted and unmounted below.
    mount_change("/run", MountPropagationFlags::SHARED).context("can't share mounts in /run")?;
    // containerd's network library keeps state in /var/lib/cni, whatever it is configured to do.
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
    // Whatever an agent pins vanishes with the namespace. Kernels without bpffs have none to protect.
    if Path::new("/sys/fs/bpf").is_dir() {
        let _ = mount_over("bpf", "/sys/fs/bpf", "bpf", plain, "");
    }

    rustix::system::sethostname(b"ebb-node").context("can't set the host name")?;
    sysctl("net/ipv4/ip_forward", "1")?;
    if Path::new("/proc/sys/net/ipv6").is_dir() {
        for scope in ["all", "default"] {
            sysctl(&format!("net/ipv6/conf/{scope}/disable_ipv6"), "0")?;
            sysctl(&format!("net/ipv6/conf/{scope}/forwarding"), "1")?;
            // Nobody else is on this network, and a probe for duplicates takes over a second.
            sysctl(&format!("net/ipv6/conf/{scope}/accept_dad"), "0")?;
        }
    }
    Ok(())
}

/// Moves the calling process into the sandbox's cgroup for everything that is not a pod.
fn enter_cgroup(place: &Place) -> Result<()> {
    let system = place.system_cgroup();
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
