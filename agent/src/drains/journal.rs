//! Remembers on disk when a pod's drain began, so that a hold repeated after a restart of the agent goes
//! on with its first deadline instead of a new one.
//!
//! One small JSON file per pod. Nothing is flushed to the disk by force: a crash of the node starts a new boot, and the
//! agent ignores entries of other boots. All times are on the boot-time clock, which cannot be set, so a wall clock
//! that jumps changes nothing. Only a clock of another time namespace (`time_namespaces(7)`) can disagree: the agent
//! ignores entries that begin in the future, too.
//!
//! A hold does not wait for its entry: a disk that hangs must not keep the agent from answering in time. If the agent
//! is killed before the entry is written, the beginning is lost. A repeated stop is then held with a new deadline,
//! within its own timeout.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use ebb_core::{
    clock::BootTime, ids::PodUid, machine::Deadline, notification::Notified, pod_end::PodEnd,
};
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use crate::linux::{boot_id::boot_id, files};

/// How long after its release (or its deadline, if the release is not recorded) a drain still belongs to the
/// same termination. The kubelet retries a failed kill after 10 to 15 s. A later hold is for another termination: a
/// preStop wait also runs for the restart of a container, and the pod lives on.
pub(super) const KEEP: Duration = if cfg!(test) {
    Duration::from_secs(2)
} else {
    Duration::from_secs(60)
};

/// A beginning could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The UID would not be safe as a file name.
    #[error("pod UID {0:?} has characters other than letters, digits and dashes")]
    Uid(PodUid),
    /// A file could not be read or written.
    #[error("can't {doing} {}", .path.display())]
    Io {
        /// The operation.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// When a drain began, until when it may last, and which end of its pod it is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beginning {
    /// The first hold.
    pub started: BootTime,
    /// The latest moment of release.
    #[serde(flatten)]
    pub deadline: Deadline,
    /// The first release, once there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub released: Option<BootTime>,
    /// Which end of the pod it is for.
    #[serde(default)]
    pub end: PodEnd,
    /// The notifications that were sent, which are not repeated.
    #[serde(default, skip_serializing_if = "Notified::is_nothing")]
    pub notified: Notified,
}

impl Beginning {
    /// Whether a hold that comes at `now`, with `later`, belongs to the same end of the pod.
    pub fn includes(&self, later: &PodEnd, now: BootTime) -> bool {
        self.end.includes(later, self.started, self.is_recent(now))
    }

    /// Whether no hold can continue it. Holds may continue the beginning of a final end for as long as the pod exists.
    pub fn is_over(&self, now: BootTime) -> bool {
        !self.end.is_final() && !self.is_recent(now)
    }

    /// Whether it is under way, or was over a moment ago.
    pub fn is_recent(&self, now: BootTime) -> bool {
        self.released.unwrap_or(self.deadline.at) + KEEP >= now
    }
}

#[derive(Serialize, Deserialize)]
struct JournalEntry {
    boot_id: String,
    #[serde(flatten)]
    beginning: Beginning,
}

/// A directory of beginnings.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    boot_id: String,
}

impl Journal {
    /// Opens the journal in `dir`, and makes that directory if it does not exist, for its owner only. Fails if it can't
    /// be made, or if the boot id can't be read.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, JournalError> {
        let dir = dir.into();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(io_error("make directory", &dir))?;
        let boot_id = boot_id().map_err(io_error("read the boot id for", &dir))?;
        Ok(Self { dir, boot_id })
    }

    /// All beginnings of this boot that matter at `now`. Removes files of other boots, expired files, files that begin
    /// in the future, and files that it can't read. Leaves files alone that are not the journal's.
    pub fn load(&self, now: BootTime) -> Result<HashMap<PodUid, Beginning>, JournalError> {
        let mut found = HashMap::new();
        for path in self.files()? {
            match self.read(&path) {
                Ok(Some((_, beginning))) if beginning.started > now => {
                    warn!(path = %path.display(), "removing a journal file: it begins in the future");
                }
                Ok(Some((uid, beginning))) if !beginning.is_over(now) => {
                    found.insert(uid, beginning);
                    continue;
                }
                Ok(_) => {}
                Err(why) => {
                    warn!(path = %path.display(), "removing a journal file that can't be read: {why}")
                }
            }
            if let Err(error) = fs::remove_file(&path) {
                warn!(path = %path.display(), %error, "can't remove a journal file");
            }
        }
        Ok(found)
    }

    /// Writes a beginning. On failure the journal is unchanged.
    pub fn record(&self, uid: &PodUid, beginning: Beginning) -> Result<(), JournalError> {
        if !is_safe(uid.as_str()) {
            return Err(JournalError::Uid(uid.clone()));
        }
        let path = self.dir.join(format!("{uid}.json"));
        let entry = JournalEntry {
            boot_id: self.boot_id.clone(),
            beginning,
        };
        serde_json::to_vec(&entry)
            .map_err(io::Error::from)
            .and_then(|text| files::write_for_this_boot(&path, &text))
            .map_err(io_error("write", &path))
    }

    /// Removes the beginning of a pod that is gone.
    pub fn forget(&self, uid: &PodUid) -> Result<(), JournalError> {
        if !is_safe(uid.as_str()) {
            return Err(JournalError::Uid(uid.clone()));
        }
        let path = self.dir.join(format!("{uid}.json"));
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    /// Removes the beginnings that are over at `now`.
    pub fn prune(&self, now: BootTime) -> Result<(), JournalError> {
        self.load(now).map(drop)
    }

    /// The journal's own files, by their names.
    fn files(&self) -> Result<Vec<PathBuf>, JournalError> {
        let failed = |e| io_error("list", &self.dir)(e);
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let ours = matches!(
                path.extension().and_then(OsStr::to_str),
                Some("json" | "tmp")
            );
            if ours && path.is_file() {
                files.push(path);
            } else {
                debug!(path = %path.display(), "not a journal file; left alone");
            }
        }
        Ok(files)
    }

    /// The beginning in a file; `None` if it is of another boot.
    fn read(&self, path: &Path) -> Result<Option<(PodUid, Beginning)>, String> {
        let uid = path
            .file_stem()
            .and_then(OsStr::to_str)
            .filter(|uid| is_safe(uid));
        let uid = uid.ok_or("its name is not a pod UID")?;
        if path.extension() == Some(OsStr::new("tmp")) {
            return Err("its writing was interrupted".to_owned());
        }
        let text = fs::read(path).map_err(|e| e.to_string())?;
        let entry: JournalEntry = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
        Ok((entry.boot_id == self.boot_id).then(|| (PodUid::new(uid), entry.beginning)))
    }
}

fn is_safe(uid: &str) -> bool {
    (1..=128).contains(&uid.len()) && uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    move |source| JournalError::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use ebb_core::drain_report::DeadlineCause;

    use super::*;

    const BEGINNING: Beginning = Beginning {
        started: BootTime::from_nanos(5),
        deadline: by(9),
        released: None,
        end: PodEnd {
            sandbox: None,
            containers: vec![],
            is_stop: false,
            deleted: None,
            is_not_deleted: false,
        },
        notified: Notified::NOTHING,
    };
    const NOW: BootTime = BootTime::from_nanos(10);

    const fn by(nanos: u64) -> Deadline {
        Deadline {
            at: BootTime::from_nanos(nanos),
            cause: DeadlineCause::Grace,
        }
    }

    fn journal() -> (tempfile::TempDir, Journal) {
        let dir = tempfile::tempdir().expect("a directory");
        let journal = Journal::open(dir.path().join("drains")).expect("a journal");
        (dir, journal)
    }

    fn uid(uid: &str) -> PodUid {
        PodUid::new(uid)
    }

    fn names(journal: &Journal) -> Vec<String> {
        let entries = fs::read_dir(&journal.dir).expect("a directory");
        entries
            .map(|e| {
                e.expect("an entry")
                    .file_name()
                    .into_string()
                    .expect("a name")
            })
            .collect()
    }

    #[test]
    fn a_beginning_survives_the_agent() {
        let (_dir, journal) = journal();
        journal.record(&uid("b-1"), BEGINNING).expect("recorded");
        let again = Journal::open(&journal.dir).expect("a journal");
        assert_eq!(
            again.load(NOW).expect("loaded"),
            HashMap::from([(uid("b-1"), BEGINNING)])
        );
        assert_eq!(names(&journal), ["b-1.json"], "nothing else is left behind");
        let mode = fs::metadata(journal.dir.join("b-1.json"))
            .expect("metadata")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn an_entry_of_an_older_agent_is_read() {
        let (_dir, journal) = journal();
        let path = journal.dir.join("a.json");
        let boot = &journal.boot_id;
        let text = format!(
            r#"{{"boot_id":"{boot}","started":5,"deadline":9,"deadline_cause":"grace","end":{{"sandbox":null,"containers":[],"is_stop":false,"deleted":null}}}}"#
        );
        fs::write(path, text).expect("written");
        assert_eq!(journal.load(NOW).expect("loaded")[&uid("a")], BEGINNING);
    }

    #[test]
    fn the_last_record_of_a_pod_counts() {
        let (_dir, journal) = journal();
        let shorter = Beginning {
            deadline: by(7),
            ..BEGINNING
        };
        journal.record(&uid("a"), BEGINNING).expect("recorded");
        journal
            .record(&uid("a"), shorter.clone())
            .expect("recorded");
        assert_eq!(journal.load(NOW).expect("loaded")[&uid("a")], shorter);
    }

    #[test]
    fn uids_that_are_not_safe_as_file_names_are_refused() {
        let (_dir, journal) = journal();
        for bad in [
            "",
            "..",
            "../a",
            "a/b",
            "a.json",
            "ä",
            "a b",
            &"a".repeat(129),
        ] {
            let result = journal.record(&uid(bad), BEGINNING);
            assert!(
                matches!(result, Err(JournalError::Uid(_))),
                "{bad:?}: {result:?}"
            );
        }
        assert_eq!(names(&journal), Vec::<String>::new());
    }

    #[test]
    fn half_written_and_foreign_files_are_removed_and_the_rest_is_read() {
        let (_dir, journal) = journal();
        journal.record(&uid("good"), BEGINNING).expect("recorded");
        for (name, text) in [
            ("half.json", "{\"boot_id\":"),
            ("a b.json", "{}"),
            ("c.tmp", "{}"),
        ] {
            fs::write(journal.dir.join(name), text).expect("written");
        }
        assert_eq!(journal.load(NOW).expect("loaded").len(), 1);
        assert_eq!(names(&journal), ["good.json"]);
    }

    #[test]
    fn files_that_are_not_the_journals_are_left_alone() {
        let (_dir, journal) = journal();
        fs::write(journal.dir.join("passwd"), "root").expect("written");
        assert!(journal.load(NOW).expect("loaded").is_empty());
        assert_eq!(names(&journal), ["passwd"]);
    }

    #[test]
    fn another_boots_beginnings_are_not_believed() {
        let (_dir, mut journal) = journal();
        let this_boot = std::mem::replace(&mut journal.boot_id, "another".to_owned());
        journal.record(&uid("a"), BEGINNING).expect("recorded");
        journal.boot_id = this_boot;
        assert!(journal.load(NOW).expect("loaded").is_empty());
        assert_eq!(names(&journal), Vec::<String>::new());
    }

    #[test]
    fn a_beginning_in_the_future_is_not_believed() {
        let (_dir, journal) = journal();
        for (name, started) in [("now", 10), ("future", 11)] {
            let started = BootTime::from_nanos(started);
            let beginning = Beginning {
                started,
                ..BEGINNING
            };
            journal.record(&uid(name), beginning).expect("recorded");
        }
        let loaded = journal.load(NOW).expect("loaded");
        assert_eq!(loaded.keys().collect::<Vec<_>>(), [&uid("now")]);
        assert_eq!(names(&journal), ["now.json"]);
    }

    #[test]
    fn a_beginning_is_removed_a_while_after_its_deadline() {
        let (_dir, journal) = journal();
        journal.record(&uid("a"), BEGINNING).expect("recorded");
        journal.prune(BEGINNING.deadline.at + KEEP).expect("pruned");
        assert_eq!(names(&journal), ["a.json"]);
        journal
            .prune(BEGINNING.deadline.at + KEEP + Duration::from_nanos(1))
            .expect("pruned");
        assert_eq!(names(&journal), Vec::<String>::new());
    }

    #[test]
    fn the_beginning_of_a_deletion_is_kept_until_the_pod_is_gone() {
        let (_dir, journal) = journal();
        let mut deleted = BEGINNING;
        deleted.end.deleted = Some(BEGINNING.started);
        journal
            .record(&uid("a"), deleted.clone())
            .expect("recorded");
        let later = NOW + 1000 * KEEP;
        assert_eq!(journal.load(later).expect("loaded")[&uid("a")], deleted);
        journal.forget(&uid("a")).expect("forgotten");
        journal.forget(&uid("a")).expect("it was gone already");
        assert_eq!(names(&journal), Vec::<String>::new());
    }

    #[test]
    fn a_journal_that_can_not_be_written_says_what_failed() {
        let (_dir, journal) = journal();
        fs::remove_dir(&journal.dir).expect("removed");
        let error = journal
            .record(&uid("a"), BEGINNING)
            .expect_err("no directory");
        assert!(error.to_string().starts_with("can't write "), "{error}");
    }
}
