//! The record of what an installation changes on the host. `ebb install-cri` writes it before the changes, and
//! `ebb uninstall-cri` undoes exactly these.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::linux::files;

/// Not below /etc, which administrators edit, nor /run, which a reboot empties.
pub(super) const STATE_FILE: &str = "/var/lib/ebb/install-cri.json";

const SCHEMA: &str = "ebb.dev/install-cri/v1";

/// Something that an installation made and that did not exist before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(super) enum Artifact {
    /// A directory. Removed when it is empty.
    Directory { path: PathBuf },
    /// A file. Removed if it still has these bytes.
    File {
        path: PathBuf,
        /// SHA-256.
        digest: String,
    },
    /// A symbolic link. Removed if it still points there.
    Link { path: PathBuf, target: PathBuf },
}

impl Artifact {
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Directory { path } | Self::File { path, .. } | Self::Link { path, .. } => path,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InstallState {
    schema: String,
    /// The version of ebb.
    pub(super) version: String,
    /// The runtime's socket, to which the proxy forwards calls.
    pub(super) runtime: PathBuf,
    /// The proxy's socket.
    pub(super) socket: PathBuf,
    /// In the order of creation.
    pub(super) made: Vec<Artifact>,
}

impl InstallState {
    pub(super) fn new(runtime: PathBuf, socket: PathBuf, made: Vec<Artifact>) -> Self {
        Self {
            schema: SCHEMA.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            runtime,
            socket,
            made,
        }
    }

    /// The state of the host below `root`; `None` if nothing is installed.
    ///
    /// # Errors
    ///
    /// The file can't be read, or has another schema.
    pub(super) fn load(root: &Path) -> io::Result<Option<Self>> {
        let bytes = match files::resolve_in_nofollow(root, Path::new(STATE_FILE)).and_then(fs::read)
        {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read?,
        };
        let state: Self = serde_json::from_slice(&bytes)?;
        if state.schema != SCHEMA {
            let unknown = format!("it has schema {:?}, not {SCHEMA:?}", state.schema);
            return Err(io::Error::new(io::ErrorKind::InvalidData, unknown));
        }
        Ok(Some(state))
    }

    /// Writes the state into its directory, which must exist.
    pub(super) fn save(&self, root: &Path) -> io::Result<()> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        files::write(
            &files::resolve_in_nofollow(root, Path::new(STATE_FILE))?,
            &bytes,
            0o644,
        )
    }
}
