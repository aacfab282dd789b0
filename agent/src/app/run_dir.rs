//! The agent's run directory: its socket; the journal, the history and the note of a stop for the next agent; and a lock
//! against a second agent.

use std::{
    fs::{DirBuilder, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use ebb_protocol::hold::stop_note;
use rustix::fs::{FlockOperation, flock};

const LOCK: &str = "agent.lock";
const SOCKET: &str = "agent.sock";
const JOURNAL: &str = "journal";
const HISTORY: &str = "history";

/// Why an agent can't use a run directory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunDirError {
    /// Another agent has locked it.
    #[error("another ebb agent runs on this node already (it has locked {}): stop that agent first", lock.display())]
    Taken {
        /// The lock file.
        lock: PathBuf,
    },
    /// It can't be created, locked or changed.
    #[error("can't use the run directory {}: {source}; make it writable for root, or choose another with --run-dir", path.display())]
    Unusable {
        /// The directory or a file in it.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl RunDirError {
    /// `path`, which is a run directory or in one, can't be used.
    pub(crate) fn unusable(path: &Path, source: io::Error) -> Self {
        Self::Unusable {
            path: path.to_owned(),
            source,
        }
    }
}

/// A run directory that this process has locked for as long as this value lives.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Locks the directory, and creates it if it does not exist.
    pub(crate) fn take(path: &Path) -> Result<Self, RunDirError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(path)
            .map_err(|e| RunDirError::unusable(path, e))?;
        let lock = lock_in(path);
        let file = open_lock(&lock).map_err(|e| RunDirError::unusable(&lock, e))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self {
                path: path.to_owned(),
                _lock: file,
            }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(RunDirError::Taken { lock }),
            Err(e) => Err(RunDirError::unusable(&lock, e.into())),
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.path.join(JOURNAL)
    }

    /// Where an agent that stops notes it for the calls that arrive before the next agent.
    pub(crate) fn stop_note(&self) -> PathBuf {
        stop_note(&self.socket())
    }

    /// The file of past drains and stops.
    pub(crate) fn history(&self) -> PathBuf {
        self.path.join(HISTORY)
    }

    /// What an agent creates here, besides the lock. Other files are not the agent's: the proxy's socket may be here.
    pub(crate) fn files(&self) -> [PathBuf; 4] {
        [
            self.socket(),
            self.journal(),
            self.stop_note(),
            self.history(),
        ]
    }
}

/// Opens the lock file, for root only: a process that may read a file may also lock it, and so could keep the agent from
/// starting.
fn open_lock(path: &Path) -> io::Result<File> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    // An older agent made it readable for all.
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

pub(crate) fn lock_in(path: &Path) -> PathBuf {
    path.join(LOCK)
}
