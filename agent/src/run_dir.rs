//! The agent's run directory: its socket, what it tells the next agent, and the lock that keeps two from sharing it.

use std::{
    fs::{DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

const LOCK: &str = "agent.lock";
const SOCKET: &str = "agent.sock";
const JOURNAL: &str = "journal";
const FLOWS: &str = "flows";

/// Why a run directory can't be had.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Another agent has it.
    #[error("another ebb agent runs on this node already (it holds {}): stop that one first", lock.display())]
    Taken {
        /// The lock file.
        lock: PathBuf,
    },
    /// It is no good.
    #[error("can't use the run directory {}: {source}; make it writable for root, or choose another with --run-dir", path.display())]
    Unusable {
        /// The directory or a file in it.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl RunDirError {
    /// `path`, in a run directory or itself one, is no good.
    pub(crate) fn unusable(path: &Path, source: io::Error) -> Self {
        Self::Unusable {
            path: path.to_owned(),
            source,
        }
    }
}

/// A run directory that is this process's alone for as long as this lives.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Takes it, and makes it if need be.
    ///
    /// # Errors
    ///
    /// See [`RunDirError`].
    pub(crate) fn take(path: &Path) -> Result<Self, RunDirError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(path)
            .map_err(|e| RunDirError::unusable(path, e))?;
        let lock = lock_in(path);
        let file = File::create(&lock).map_err(|e| RunDirError::unusable(&lock, e))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self {
                path: path.to_owned(),
                _lock: file,
            }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(RunDirError::Taken { lock }),
            Err(e) => Err(RunDirError::unusable(&lock, e.into())),
        }
    }

    /// The agent's unix socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    /// The directory of its journal.
    pub(crate) fn journal(&self) -> PathBuf {
        self.path.join(JOURNAL)
    }

    /// What the next agent is to know of the flows that are open.
    pub(crate) fn flows(&self) -> PathBuf {
        self.path.join(FLOWS)
    }

    /// All that an agent makes here, besides the lock. Nothing else is ebb's: the proxy's socket may be beside it.
    pub(crate) fn made(&self) -> [PathBuf; 3] {
        [self.socket(), self.journal(), self.flows()]
    }
}

/// The lock file of a run directory.
pub(crate) fn lock_in(path: &Path) -> PathBuf {
    path.join(LOCK)
}
