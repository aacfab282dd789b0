//! From what is and what should be to what is to be done. Pure: what is on the host is asked through a function.

use std::path::{Path, PathBuf};

use super::{files::digest, state::Made};

/// Something that should be on the host.
#[derive(Clone, PartialEq, Eq)]
pub enum Item {
    /// A file.
    File {
        /// Its path.
        path: PathBuf,
        /// All of it.
        bytes: Vec<u8>,
        /// Its permissions.
        mode: u32,
    },
    /// A symbolic link.
    Link {
        /// Its path.
        path: PathBuf,
        /// Where it points.
        target: PathBuf,
    },
}

impl Item {
    /// Its path.
    pub fn path(&self) -> &Path {
        match self {
            Self::File { path, .. } | Self::Link { path, .. } => path,
        }
    }

    fn made(&self) -> Made {
        match self {
            Self::File { path, bytes, .. } => Made::File {
                path: path.clone(),
                digest: digest(bytes),
            },
            Self::Link { path, target } => Made::Link {
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
pub enum Is {
    /// Nothing.
    Absent,
    /// A directory, or a link to one.
    Directory,
    /// A file with this SHA-256.
    File(String),
    /// A symbolic link that points there, and not to a directory.
    Link(PathBuf),
    /// Something else, or nobody can tell.
    Other,
}

impl Is {
    /// Whether this is what was made.
    fn still(&self, made: &Made) -> bool {
        match (self, made) {
            (Self::File(is), Made::File { digest, .. }) => is == digest,
            (Self::Link(is), Made::Link { target, .. }) => is == target,
            (Self::Directory, Made::Directory { .. }) => true,
            _ => false,
        }
    }
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make a directory.
    MakeDirectory(PathBuf),
    /// Write a file or make a link; if there is one, it is ebb's own and is replaced.
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

/// What is to be done, and what the host's state will be then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In this order.
    pub steps: Vec<Step>,
    /// What ebb will have made.
    pub made: Vec<Made>,
    /// What is left as it is, with the reason.
    pub left: Vec<(PathBuf, &'static str)>,
}

/// A file that is not ebb's, where one of ebb's should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// It was there before.
    #[error(
        "{} is there already, and not from `ebb install-cri`: move it away, then run this again",
        .0.display()
    )]
    Foreign(PathBuf),
    /// Somebody changed what ebb had made.
    #[error(
        "{} was changed since `ebb install-cri` wrote it: move it away, then run this again",
        .0.display()
    )]
    Changed(PathBuf),
}

/// Plans an installation of `desired` where `made` is what earlier ones made.
///
/// What is there already and as it should be, but not ebb's, is left, and not removed later. What was made
/// earlier and is no longer desired is removed, unless somebody changed it.
///
/// # Errors
///
/// [`Conflict`] for the first path where something else is.
pub fn install(
    desired: &[Item],
    made: &[Made],
    is: impl Fn(&Path) -> Is,
) -> Result<Plan, Conflict> {
    let mut plan = Plan::default();
    let mut directories: Vec<PathBuf> = Vec::new();
    for item in desired {
        let path = item.path();
        let there = is(path);
        let own = made.iter().find(|m| m.path() == path);
        let wanted = item.made();
        if there.still(&wanted) {
            match own {
                Some(_) => plan.made.push(wanted),
                None => plan.left.push((path.to_owned(), "it is there already")),
            }
            continue;
        }
        match own {
            _ if there == Is::Absent => {}
            Some(own) if there.still(own) => {}
            Some(_) => return Err(Conflict::Changed(path.to_owned())),
            None => return Err(Conflict::Foreign(path.to_owned())),
        }
        let missing: Vec<&Path> = path
            .ancestors()
            .skip(1)
            .take_while(|d| is(d) == Is::Absent && !directories.iter().any(|made| made == d))
            .collect();
        for directory in missing.into_iter().rev() {
            directories.push(directory.to_owned());
            plan.steps.push(Step::MakeDirectory(directory.to_owned()));
        }
        plan.steps.push(Step::Put(item.clone()));
        plan.made.push(wanted);
    }
    // Directories made now or earlier, outermost first, before what is in them.
    let earlier = made.iter().filter(|m| matches!(m, Made::Directory { .. }));
    let earlier = earlier.map(|m| m.path().to_owned());
    let mut all: Vec<PathBuf> = earlier.chain(directories).collect();
    all.sort();
    all.dedup();
    let directories = all.into_iter().map(|path| Made::Directory { path });
    plan.made.splice(0..0, directories);

    let obsolete: Vec<Made> = made
        .iter()
        .filter(|m| !matches!(m, Made::Directory { .. }))
        .filter(|m| !desired.iter().any(|d| d.path() == m.path()))
        .cloned()
        .collect();
    let undone = undo(&obsolete, is);
    plan.steps.extend(undone.steps);
    plan.left.extend(undone.left);
    Ok(plan)
}

/// Plans to undo what was made: the last first, and only what is still as it was made.
pub fn undo(made: &[Made], is: impl Fn(&Path) -> Is) -> Plan {
    let mut plan = Plan::default();
    for one in made.iter().rev() {
        let path = one.path().to_owned();
        match is(&path) {
            Is::Absent => {}
            there if there.still(one) => plan.steps.push(match one {
                Made::Directory { .. } => Step::RemoveDirectory(path),
                Made::File { .. } | Made::Link { .. } => Step::Remove(path),
            }),
            _ => plan.left.push((path, "somebody changed it")),
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// What is on a host; what is not named is absent, parents of what is are directories.
    #[derive(Clone, Default)]
    struct Host(BTreeMap<PathBuf, Is>);

    impl Host {
        fn with(paths: &[(&str, Is)]) -> Self {
            let mut host = Self::default();
            for (path, is) in paths {
                host.put(Path::new(path), is.clone());
            }
            host
        }

        fn put(&mut self, path: &Path, is: Is) {
            for parent in path.ancestors().skip(1) {
                self.0.insert(parent.to_owned(), Is::Directory);
            }
            self.0.insert(path.to_owned(), is);
        }

        fn is(&self, path: &Path) -> Is {
            if path == Path::new("/") {
                return Is::Directory;
            }
            self.0.get(path).cloned().unwrap_or(Is::Absent)
        }

        /// Does what a plan says.
        fn carry_out(&mut self, plan: &Plan) {
            for step in &plan.steps {
                match step {
                    Step::MakeDirectory(path) => {
                        assert_eq!(self.is(path), Is::Absent);
                        assert_eq!(self.is(path.parent().unwrap()), Is::Directory);
                        self.0.insert(path.clone(), Is::Directory);
                    }
                    Step::Put(item) => {
                        assert_eq!(self.is(item.path().parent().unwrap()), Is::Directory);
                        let is = match item {
                            Item::File { bytes, .. } => Is::File(digest(bytes)),
                            Item::Link { target, .. } => Is::Link(target.clone()),
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

    fn has(text: &str) -> Is {
        Is::File(digest(text.as_bytes()))
    }

    fn desired() -> Vec<Item> {
        vec![
            file("/opt/ebb/bin/ebb", "program"),
            file("/etc/s/ebb.service", "unit"),
            link("/etc/s/wants/ebb.service", "../ebb.service"),
        ]
    }

    #[test]
    fn installing_and_undoing_leaves_what_was() {
        let before = Host::with(&[("/etc/s/other", has("x")), ("/opt", Is::Directory)]);
        let mut host = before.clone();
        let plan = install(&desired(), &[], |p| host.is(p)).unwrap();
        host.carry_out(&plan);
        assert_eq!(host.is(Path::new("/opt/ebb/bin/ebb")), has("program"));
        // Once more: nothing to do, and the same to undo.
        let again = install(&desired(), &plan.made, |p| host.is(p)).unwrap();
        assert_eq!(again.steps, []);
        assert_eq!(again.made, plan.made);
        let undo = undo(&plan.made, |p| host.is(p));
        host.carry_out(&undo);
        assert_eq!(host.0, before.0);
        assert_eq!(undo.left, []);
    }

    #[test]
    fn an_installation_that_broke_off_is_undone_as_far_as_it_got() {
        let before = Host::with(&[("/etc/s/other", has("x")), ("/opt", Is::Directory)]);
        let plan = install(&desired(), &[], |p| before.is(p)).unwrap();
        for done in 0..plan.steps.len() {
            let mut host = before.clone();
            let part = Plan {
                steps: plan.steps[..done].to_vec(),
                ..Plan::default()
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
        newer[0] = file("/opt/ebb/bin/ebb", "newer program");
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
    fn what_is_not_ebbs_is_never_replaced() {
        let host = Host::with(&[("/opt/ebb/bin/ebb", has("another"))]);
        let conflict = install(&desired(), &[], |p| host.is(p)).unwrap_err();
        assert_eq!(conflict, Conflict::Foreign("/opt/ebb/bin/ebb".into()));
        let made = [Made::File {
            path: "/opt/ebb/bin/ebb".into(),
            digest: digest(b"program"),
        }];
        let conflict = install(&desired(), &made, |p| host.is(p)).unwrap_err();
        assert_eq!(conflict, Conflict::Changed("/opt/ebb/bin/ebb".into()));
        let odd = Host::with(&[("/opt/ebb/bin/ebb", Is::Other)]);
        assert!(install(&desired(), &[], |p| odd.is(p)).is_err());
    }

    #[test]
    fn what_is_there_already_is_not_ebbs_to_remove() {
        let mut host = Host::with(&[("/opt/ebb/bin/ebb", has("program"))]);
        let before = host.clone();
        let plan = install(&desired(), &[], |p| host.is(p)).unwrap();
        assert_eq!(plan.left.len(), 1);
        host.carry_out(&plan);
        host.carry_out(&undo(&plan.made, |p| host.is(p)));
        assert_eq!(host.0, before.0);
    }

    #[test]
    fn what_somebody_changed_is_left_and_named_and_so_is_its_directory() {
        let mut host = Host::with(&[("/etc/s/other", has("x")), ("/opt", Is::Directory)]);
        let plan = install(&desired(), &[], |p| host.is(p)).unwrap();
        host.carry_out(&plan);
        let changed = Path::new("/opt/ebb/bin/ebb");
        host.put(changed, has("patched"));
        let undo = undo(&plan.made, |p| host.is(p));
        host.carry_out(&undo);
        assert_eq!(undo.left, [(changed.to_owned(), "somebody changed it")]);
        assert_eq!(host.is(changed), has("patched"));
        assert_eq!(host.is(Path::new("/etc/s/ebb.service")), Is::Absent);
    }
}
