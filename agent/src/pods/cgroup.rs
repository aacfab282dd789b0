//! The cgroups of a container, by which ebb tells the sockets of host-network pods apart.
//!
//! A container may create cgroups below its own (systemd in a container, CRI-O's `container`). A socket created there
//! has the lower cgroup's id, so all of them count.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _},
    path::{Component, Path, PathBuf},
};

use ebb_core::ids::{CgroupId, ContainerId};

use crate::linux::cgroups::walk;

/// Why a container's cgroups are unknown.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No directory of its own under the cgroup v2 mount.
    #[error(
        "container {container} has no cgroup of its own under {}; host-network pods need cgroup v2",
        root.display()
    )]
    NotFound {
        /// The container.
        container: ContainerId,
        /// The cgroup v2 mount.
        root: PathBuf,
    },
    /// It can't be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// The ids of a container's cgroup and of all below it, under the cgroup v2 mounted at `root`.
///
/// `proc_cgroup` is the text of its first process's `/proc/PID/cgroup`, `cgroups_path` the OCI spec's.
/// Blocking, like all file access.
///
/// # Errors
/// [`CgroupError`] if the container has no such cgroup, or it can't be read. A cgroup that is shared with other
/// processes is never returned.
pub fn container_cgroups(
    root: &Path,
    container: &ContainerId,
    proc_cgroup: Option<&str>,
    cgroups_path: Option<&str>,
) -> Result<Vec<CgroupId>, CgroupError> {
    // The process's own path goes first. It is of no use if the agent has its own cgroup namespace: the path then
    // starts above the root.
    let of_process = proc_cgroup
        .and_then(unified_path)
        .and_then(|p| own_directory(p, container));
    let of_spec = cgroups_path.and_then(directory_of);
    let dir = of_process
        .into_iter()
        .chain(of_spec)
        .map(|relative| root.join(relative))
        .find(|dir| dir.is_dir())
        .ok_or_else(|| CgroupError::NotFound {
            container: container.clone(),
            root: root.into(),
        })?;
    let mut ids = vec![id(&dir)?];
    let walked = walk(&dir, &mut |below| {
        ids.push(CgroupId(below.ino()));
        true
    });
    walked.map_err(|source| CgroupError::Unreadable { path: dir, source })?;
    Ok(ids)
}

/// Whether a process is in the cgroup of this container or below it, by the text of its `/proc/PID/cgroup`. The cgroup
/// is known by its name, which contains the container's id with both cgroup drivers. The path before it does not matter:
/// it begins with `/..` if the agent has a cgroup namespace of its own.
pub(crate) fn is_in_container(proc_cgroup: &str, container: &ContainerId) -> bool {
    let paths = proc_cgroup.lines().filter_map(|l| l.splitn(3, ':').nth(2));
    paths
        .flat_map(|path| path.split('/'))
        .any(|name| container_id(name) == container.as_str())
}

/// The container's id in the name of its cgroup: `<id>`, `cri-containerd-<id>.scope`, `crio-<id>`.
fn container_id(name: &str) -> &str {
    let name = name.strip_suffix(".scope").unwrap_or(name);
    name.rsplit(['-', ':']).next().unwrap_or(name)
}

/// The path of the unified hierarchy in a `/proc/PID/cgroup`: the line of hierarchy 0 without
/// controllers (cgroups(7)).
fn unified_path(text: &str) -> Option<&str> {
    text.lines().find_map(|l| l.strip_prefix("0::"))
}

/// Cuts the cgroup path of a process after the component that contains the container's id. Relative to the root.
/// `None` if no component does, or if the path leaves the root.
fn own_directory(path: &str, container: &ContainerId) -> Option<PathBuf> {
    let mut dir = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => {
                dir.push(name);
                if name
                    .to_str()
                    .is_some_and(|n| n.contains(container.as_str()))
                {
                    return Some(dir);
                }
            }
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    None
}

/// The directory of an OCI `cgroupsPath`, relative to the root. The cgroupfs driver writes a path, the systemd driver
/// `slice:prefix:name`, where slice `a-b.slice` is below `a.slice`
/// (`ExpandSlice` and `getUnitName` in opencontainers/cgroups `systemd/common.go`).
fn directory_of(cgroups_path: &str) -> Option<PathBuf> {
    if let Some((slice, rest)) = cgroups_path.split_once(':') {
        let (prefix, name) = rest.split_once(':')?;
        let unit = match (prefix, name) {
            (_, "") => return None,
            (_, slice) if slice.ends_with(".slice") => slice.to_owned(),
            ("", name) => format!("{name}.scope"),
            (prefix, name) => format!("{prefix}-{name}.scope"),
        };
        let slice = if slice.is_empty() {
            "system.slice"
        } else {
            slice
        };
        return Some(expand_slice(slice)?.join(unit));
    }
    let path = cgroups_path.trim_matches('/');
    // The root, or something above it, belongs to no pod.
    let plain = Path::new(path)
        .components()
        .all(|c| matches!(c, Component::Normal(_)));
    (!path.is_empty() && plain).then(|| path.into())
}

/// `a-b-c.slice` → `a.slice/a-b.slice/a-b-c.slice`; `-.slice` is the root.
fn expand_slice(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(PathBuf::new());
    }
    if name.is_empty() || name.contains('/') || name.split('-').any(str::is_empty) {
        return None;
    }
    let ends = name.match_indices('-').map(|(i, _)| i).chain([name.len()]);
    Some(ends.map(|end| format!("{}.slice", &name[..end])).collect())
}

/// The owner of each cgroup that belongs to one of these `containers` or is below such a cgroup. A container's cgroup
/// is found by its name, which contains the container's id with both cgroup drivers. Directories that can't be read,
/// or are removed meanwhile, are left out. Blocking.
pub(crate) fn owners<T: Clone>(root: &Path, containers: &HashMap<&str, T>) -> HashMap<CgroupId, T> {
    let mut found = HashMap::new();
    if !containers.is_empty() {
        add_owners(root, None, containers, &mut found);
    }
    found
}

fn add_owners<T: Clone>(
    dir: &Path,
    parent: Option<&T>,
    containers: &HashMap<&str, T>,
    found: &mut HashMap<CgroupId, T>,
) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|t| t.is_dir()) {
            continue;
        }
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| containers.get(container_id(name)));
        let owner = owner.or(parent);
        if let Some(owner) = owner {
            found.insert(CgroupId(entry.ino()), owner.clone());
        }
        add_owners(&entry.path(), owner, containers, found);
    }
}

fn id(dir: &Path) -> Result<CgroupId, CgroupError> {
    let meta = fs::metadata(dir).map_err(|source| CgroupError::Unreadable {
        path: dir.into(),
        source,
    })?;
    Ok(CgroupId(meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(path: &str) -> Option<String> {
        directory_of(path).map(|p| p.to_str().unwrap().to_owned())
    }

    #[test]
    fn the_cgroupfs_spelling_is_a_path() {
        assert_eq!(
            dir("/kubepods/burstable/podu1/c1").as_deref(),
            Some("kubepods/burstable/podu1/c1")
        );
        for not_a_containers_own in ["", "/", "//", "/../x", "/a/../.."] {
            assert_eq!(dir(not_a_containers_own), None, "{not_a_containers_own}");
        }
    }

    #[test]
    fn the_systemd_spelling_is_expanded() {
        assert_eq!(
            dir("kubepods-burstable-podab_12.slice:cri-containerd:c1").as_deref(),
            Some(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podab_12.slice/\
                 cri-containerd-c1.scope"
            )
        );
        assert_eq!(
            dir("kubepods.slice:crio:c1").as_deref(),
            Some("kubepods.slice/crio-c1.scope")
        );
        assert_eq!(
            dir(":docker:c1").as_deref(),
            Some("system.slice/docker-c1.scope")
        );
        assert_eq!(dir("-.slice::c1").as_deref(), Some("c1.scope"));
        assert_eq!(dir("a.slice:x:y.slice").as_deref(), Some("a.slice/y.slice"));
        for bad in [
            "a.slice:crio",
            "a.slice:crio:",
            "a:crio:c",
            "a--b.slice:crio:c",
            ".slice:x:y",
        ] {
            assert_eq!(dir(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_path_of_a_process_is_cut_at_the_container() {
        let c1 = ContainerId::new("c1ff");
        let cut = |p| own_directory(p, &c1).map(|p| p.to_str().unwrap().to_owned());
        assert_eq!(unified_path("1:name=systemd:/x\n0::/a/b\n"), Some("/a/b"));
        assert_eq!(unified_path("4:memory:/x\n"), None);
        assert_eq!(
            cut("/kubepods/podu1/c1ff").as_deref(),
            Some("kubepods/podu1/c1ff")
        );
        assert_eq!(
            cut("/a.slice/crio-c1ff.scope/container/init").as_deref(),
            Some("a.slice/crio-c1ff.scope")
        );
        assert_eq!(cut("/"), None);
        assert_eq!(cut("/kubepods/another"), None);
        assert_eq!(cut("/../../kubepods/podu1/c1ff"), None);
    }

    #[test]
    fn a_process_is_in_the_container_that_its_cgroup_is_named_for() {
        let c1 = ContainerId::new("c1ff");
        for inside in [
            "0::/kubepods/podu1/c1ff\n",
            "0::/../../kubepods.slice/cri-containerd-c1ff.scope\n",
            "0::/a.slice/crio-c1ff.scope/container/init\n",
            "0::/system.slice:docker:c1ff\n",
            "12:pids:/kubepods/podu1/c1ff\n0::/\n",
        ] {
            assert!(is_in_container(inside, &c1), "{inside}");
        }
        for outside in [
            "",
            "0::/\n",
            "0::/kubepods/podu1/c2ff\n",
            "0::/kubepods/c1ff0\n",
            "0::/xc1ff\n",
        ] {
            assert!(!is_in_container(outside, &c1), "{outside}");
        }
    }

    #[test]
    fn all_cgroups_below_count_and_siblings_do_not() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("kubepods/podu1/c1ff");
        fs::create_dir_all(own.join("init/deep")).unwrap();
        fs::create_dir_all(root.path().join("kubepods/podu1/other")).unwrap();
        fs::write(own.join("cgroup.procs"), "").unwrap();
        let c1 = ContainerId::new("c1ff");
        let inode = |p: &Path| CgroupId(fs::metadata(p).unwrap().ino());
        let mut expected = vec![
            inode(&own),
            inode(&own.join("init")),
            inode(&own.join("init/deep")),
        ];
        expected.sort();

        // From the process's path, or from the spec's if the process's is unknown or leaves the root.
        for (process, spec) in [
            (Some("0::/kubepods/podu1/c1ff/init\n"), None),
            (
                Some("0::/../kubepods/podu1/c1ff\n"),
                Some("/kubepods/podu1/c1ff"),
            ),
            (None, Some("/kubepods/podu1/c1ff")),
        ] {
            let mut ids = container_cgroups(root.path(), &c1, process, spec).unwrap();
            ids.sort();
            assert_eq!(ids, expected);
        }
        let e = container_cgroups(root.path(), &c1, Some("0::/\n"), Some("/")).unwrap_err();
        assert!(matches!(e, CgroupError::NotFound { .. }));
    }

    #[test]
    fn a_cgroup_belongs_to_the_container_whose_id_it_or_an_ancestor_has() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(&path).unwrap();
            CgroupId(fs::metadata(path).unwrap().ino())
        };
        let (web, nested) = (at("kubepods/podu1/c1ff"), at("kubepods/podu1/c1ff/init"));
        let log = at("a.slice/a-b.slice/cri-containerd-c2ff.scope");
        let crio = at("a.slice/crio-c3ff.scope/container");
        let others = [
            at("kubepods/podu1"),
            at("a.slice/other-c9ff.scope"),
            at("c1ff2"),
        ];
        let containers = HashMap::from([("c1ff", "web"), ("c2ff", "log"), ("c3ff", "crio")]);
        let owners = owners(root.path(), &containers);
        for (id, owner) in [(web, "web"), (nested, "web"), (log, "log"), (crio, "crio")] {
            assert_eq!(owners.get(&id), Some(&owner));
        }
        assert!(others.iter().all(|id| !owners.contains_key(id)));
    }
}
