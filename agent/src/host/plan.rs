//! Plans an installation, or its removal: compares what is on the host with what should be there. Pure: a function
//! gives the state of a path.

use std::path::{Path, PathBuf};

use super::state::Artifact;
use crate::linux::files::digest;

/// Something that should be on the host.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Item {
    File {
        path: PathBuf,
        bytes: Vec<u8>,
        mode: u32,
    },
    Link {
        path: PathBuf,
        target: PathBuf,
    },
}

impl Item {
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::File { path, .. } | Self::Link { path, .. } => path,
        }
    }

    fn to_artifact(&self) -> Artifact {
        match self {
            Self::File { path, bytes, .. } => Artifact::File {
                path: path.clone(),
                digest: digest(bytes),
            },
            Self::Link { path, target } => Artifact::Link {
                path: path.clone(),
                target: target.clone(),
            },
        }
    }
}

impl std::fmt::Debug for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File { path, bytes, mode } => {
                write!(f, "{} ({} bytes, {mode:o})", path.display(), bytes.len())
            }
            Self::Link { path, target } => {
                write!(f, "{} -> {}", path.display(), target.display())
            }
        }
    }
}

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PathState {
    Absent,
    /// A directory, or a link to one.
    Directory,
    /// A file with this SHA-256.
    File(String),
    /// A symbolic link that points there, and not to a directory.
    Link(PathBuf),
    /// Something else, or unreadable.
    Other,
}

impl PathState {
    /// Whether this is unchanged since ebb made it.
    fn is_unchanged(&self, made: &Artifact) -> bool {
        match (self, made) {
            (Self::File(is), Artifact::File { digest, .. }) => is == digest,
            (Self::Link(is), Artifact::Link { target, .. }) => is == target,
            (Self::Directory, Artifact::Directory { .. }) => true,
            _ => false,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    MakeDirectory(PathBuf),
    /// Write a file or make a link. One that exists is ebb's own, and is replaced.
    Put(Item),
    /// Remove a file or a link.
    Remove(PathBuf),
    /// Remove a directory if it is empty.
    RemoveDirectory(PathBuf),
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::MakeDirectory(path) => write!(f, "make the directory {}", path.display()),
            Self::Put(Item::File { path, bytes, .. }) => {
                write!(f, "write {} ({} bytes)", path.display(), bytes.len())
            }
            Self::Put(Item::Link { path, target }) => {
                write!(f, "link {} to {}", path.display(), target.display())
            }
            Self::Remove(path) => write!(f, "remove {}", path.display()),
            Self::RemoveDirectory(path) => {
                write!(f, "remove the directory {} if it is empty", path.display())
            }
        }
    }
}

/// What to do, and what ebb will have made then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct InstallPlan {
    pub(super) steps: Vec<Step>,
    pub(super) made: Vec<Artifact>,
    /// What is left as it is, with the reason.
    pub(super) left: Vec<(PathBuf, &'static str)>,
}

/// A file in the place of one of ebb's, with other content.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Conflict {
    /// `ebb install-cri` did not write it.
    #[error(
        "{} is there already, and `ebb install-cri` did not write it: move it away, then run this again",
        .0.display()
    )]
    Foreign(PathBuf),
    /// It was changed since ebb wrote it.
    #[error(
        "{} was changed since `ebb install-cri` wrote it: move it away, then run this again",
        .0.display()
    )]
    Changed(PathBuf),
}

/// Plans an installation of `desired`; `made` is what earlier installations made.
///
/// A desired item that exists already, and that ebb did not make, is left and not removed later. An item that an
/// earlier installation made and that is no longer desired is removed, unless it was changed.
///
/// # Errors
///
/// [`Conflict`] for the first path that has other content.
pub(super) fn install(
    desired: &[Item],
    made: &[Artifact],
    state_of: impl Fn(&Path) -> PathState,
) -> Result<InstallPlan, Conflict> {
    let mut plan = InstallPlan::default();
    let mut directories: Vec<PathBuf> = Vec::new();
    for item in desired {
        let path = item.path();
        let current = state_of(path);
        let own = made.iter().find(|m| m.path() == path);
        let wanted = item.to_artifact();
        if current.is_unchanged(&wanted) {
            match own {
                Some(_) => plan.made.push(wanted),
                None => plan.left.push((path.to_owned(), "it exists already")),
            }
            continue;
        }
        match own {
            _ if current == PathState::Absent => {}
            Some(own) if current.is_unchanged(own) => {}
            Some(_) => return Err(Conflict::Changed(path.to_owned())),
            None => return Err(Conflict::Foreign(path.to_owned())),
        }
        let missing: Vec<&Path> = path
            .ancestors()
            .skip(1)
            .take_while(|d| {
                state_of(d) == PathState::Absent && !directories.iter().any(|made| made == d)
            })
            .collect();
        for directory in missing.into_iter().rev() {
            directories.push(directory.to_owned());
            plan.steps.push(Step::MakeDirectory(directory.to_owned()));
        }
        plan.steps.push(Step::Put(item.clone()));
        plan.made.push(wanted);
    }
    // Directories made now or earlier, outermost first, before what is in them.
    let earlier = made
        .iter()
        .filter(|m| matches!(m, Artifact::Directory { .. }));
    let earlier = earlier.map(|m| m.path().to_owned());
    let mut all: Vec<PathBuf> = earlier.chain(directories).collect();
    all.sort();
    all.dedup();
    let directories = all.into_iter().map(|path| Artifact::Directory { path });
    plan.made.splice(0..0, directories);

    let obsolete: Vec<Artifact> = made
        .iter()
        .filter(|m| !matches!(m, Artifact::Directory { .. }))
        .filter(|m| !desired.iter().any(|d| d.path() == m.path()))
        .cloned()
        .collect();
    let undone = undo(&obsolete, state_of);
    plan.steps.extend(undone.steps);
    plan.left.extend(undone.left);
    Ok(plan)
}

/// Plans the removal of these artifacts, the last one first. An artifact that was changed since is left.
pub(super) fn undo(made: &[Artifact], state_of: impl Fn(&Path) -> PathState) -> InstallPlan {
    let mut plan = InstallPlan::default();
    for one in made.iter().rev() {
        let path = one.path().to_owned();
        match state_of(&path) {
            PathState::Absent => {}
            current if current.is_unchanged(one) => plan.steps.push(match one {
                Artifact::Directory { .. } => Step::RemoveDirectory(path),
                Artifact::File { .. } | Artifact::Link { .. } => Step::Remove(path),
            }),
            _ => plan.left.push((path, "it was changed since")),
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// The paths of a host. Parents of a path are directories, and all other paths are absent.
    #[derive(Clone, Default)]
    struct Host(BTreeMap<PathBuf, PathState>);

    impl Host {
        fn with(paths: &[(&str, PathState)]) -> Self {
            let mut host = Self::default();
            for (path, is) in paths {
                host.put(Path::new(path), is.clone());
            }
            host
        }

        fn put(&mut self, path: &Path, is: PathState) {
            for parent in path.ancestors().skip(1) {
                self.0.insert(parent.to_owned(), PathState::Directory);
            }
            self.0.insert(path.to_owned(), is);
        }

        fn is(&self, path: &Path) -> PathState {
            if path == Path::new("/") {
                return PathState::Directory;
            }
            self.0.get(path).cloned().unwrap_or(PathState::Absent)
        }

        fn carry_out(&mut self, plan: &InstallPlan) {
            for step in &plan.steps {
                match step {
                    Step::MakeDirectory(path) => {
                        assert_eq!(self.is(path), PathState::Absent);
                        assert_eq!(self.is(path.parent().unwrap()), PathState::Directory);
                        self.0.insert(path.clone(), PathState::Directory);
                    }
                    Step::Put(item) => {
                        assert_eq!(self.is(item.path().parent().unwrap()), PathState::Directory);
                        let is = match item {
                            Item::File { bytes, .. } => PathState::File(digest(bytes)),
                            Item::Link { target, .. } => PathState::Link(target.clone()),
                        };
                        self.0.insert(item.path().to_owned(), is);
                    }
                    Step::Remove(path) => assert!(self.0.remove(path).is_some()),
                    Step::RemoveDirectory(path) => {
                        let empty = !self.0.keys().any(|p| p != path && p.starts_with(path));
                        if empty {
                            self.0.remove(path);
                        }
                    }
                }
            }
        }
    }

    fn file(path: &str, text: &str) -> Item {
        Item::File {
            path: path.into(),
            bytes: text.into(),
            mode: 0o644,
        }
    }

    fn link(path: &str, target: &str) -> Item {
        Item::Link {
            path: path.into(),
            target: target.into(),
        }
    }

    fn has(text: &str) -> PathState {
        PathState::File(digest(text.as_bytes()))
    }

    fn desired() -> Vec<Item> {
        vec![
            file("/opt/ebb/bin/ebb-cri-proxy", "program"),
            file("/etc/s/ebb.service", "unit"),
            link("/etc/s/wants/ebb.service", "../ebb.service"),
        ]
    }

    #[test]
    fn installing_and_undoing_restores_the_host() {
        let before = Host::with(&[("/etc/s/other", has("x")), ("/opt", PathState::Directory)]);
        let mut host = before.clone();
        let plan = install(&desired(), &[], |p| host.is(p)).unwrap();
        host.carry_out(&plan);
        assert_eq!(
            host.is(Path::new("/opt/ebb/bin/ebb-cri-proxy")),
            has("program")
        );
        // Again: nothing to do, and the same to undo.
        let again = install(&desired(), &plan.made, |p| host.is(p)).unwrap();
        assert_eq!(again.steps, []);
        assert_eq!(again.made, plan.made);
        let undo = undo(&plan.made, |p| host.is(p));
        host.carry_out(&undo);
        assert_eq!(host.0, before.0);
        assert_eq!(undo.left, []);
    }

    #[test]
    fn a_partial_installation_can_be_undone() {
        let before = Host::with(&[("/etc/s/other", has("x")), ("/opt", PathState::Directory)]);
        let plan = install(&desired(), &[], |p| before.is(p)).unwrap();
        for done in 0..plan.steps.len() {
            let mut host = before.clone();
            let part = InstallPlan {
                steps: plan.steps[..done].to_vec(),
                ..InstallPlan::default()
            };
            host.carry_out(&part);
            host.carry_out(&undo(&plan.made, |p| host.is(p)));
            assert_eq!(host.0, before.0, "after {done} steps");
        }
    }

    #[test]
    fn a_newer_version_replaces_its_own_files() {
        let mut host = Host::with(&[("/opt/x", has("x")), ("/etc/s/y", has("y"))]);
        let old = install(&desired(), &[], |p| host.is(p)).unwrap();
        host.carry_out(&old);
        let mut newer = desired();
        newer[0] = file("/opt/ebb/bin/ebb-cri-proxy", "newer program");
        newer.remove(2);
        let plan = install(&newer, &old.made, |p| host.is(p)).unwrap();
        assert_eq!(
            plan.steps,
            [
                Step::Put(newer[0].clone()),
                // No longer desired.
                Step::Remove("/etc/s/wants/ebb.service".into()),
            ]
        );
    }

    #[test]
    fn files_of_others_are_never_replaced() {
        let host = Host::with(&[("/opt/ebb/bin/ebb-cri-proxy", has("another"))]);
        let conflict = install(&desired(), &[], |p| host.is(p)).unwrap_err();
        assert_eq!(
            conflict,
            Conflict::Foreign("/opt/ebb/bin/ebb-cri-proxy".into())
        );
        let made = [Artifact::File {
            path: "/opt/ebb/bin/ebb-cri-proxy".into(),
            digest: digest(b"program"),
        }];
        let conflict = install(&desired(), &made, |p| host.is(p)).unwrap_err();
        assert_eq!(
            conflict,
            Conflict::Changed("/opt/ebb/bin/ebb-cri-proxy".into())
        );
        let odd = Host::with(&[("/opt/ebb/bin/ebb-cri-proxy", PathState::Other)]);
        assert!(install(&desired(), &[], |p| odd.is(p)).is_err());
    }

    #[test]
    fn a_file_that_existed_before_is_not_removed() {
        let mut host = Host::with(&[("/opt/ebb/bin/ebb-cri-proxy", has("program"))]);
        let before = host.clone();
        let plan = install(&desired(), &[], |p| host.is(p)).unwrap();
        assert_eq!(plan.left.len(), 1);
        host.carry_out(&plan);
        host.carry_out(&undo(&plan.made, |p| host.is(p)));
        assert_eq!(host.0, before.0);
    }

    #[test]
    fn a_changed_file_is_left_with_its_directory_and_is_reported() {
        let mut host = Host::with(&[("/etc/s/other", has("x")), ("/opt", PathState::Directory)]);
        let plan = install(&desired(), &[], |p| host.is(p)).unwrap();
        host.carry_out(&plan);
        let changed = Path::new("/opt/ebb/bin/ebb-cri-proxy");
        host.put(changed, has("patched"));
        let undo = undo(&plan.made, |p| host.is(p));
        host.carry_out(&undo);
        assert_eq!(undo.left, [(changed.to_owned(), "it was changed since")]);
        assert_eq!(host.is(changed), has("patched"));
        assert_eq!(host.is(Path::new("/etc/s/ebb.service")), PathState::Absent);
    }
}
