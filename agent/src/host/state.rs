//! What an installation did to the host: written before it is done, and read to undo exactly that.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::files;

/// Where it is kept. Not below /etc, which is for people, nor /run, which a reboot empties.
pub const STATE_FILE: &str = "/var/lib/ebb/install-cri.json";

/// The name of this shape.
const SCHEMA: &str = "ebb.dev/install-cri/v1";

/// Something that an installation made. It did not exist before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Made {
    /// A directory. Removed when it is empty.
    Directory {
        /// Its path on the host.
        path: PathBuf,
    },
    /// A file. Removed if it still has these bytes.
    File {
        /// Its path on the host.
        path: PathBuf,
        /// SHA-256.
        digest: String,
    },
    /// A symbolic link. Removed if it still points there.
    Link {
        /// Its path on the host.
        path: PathBuf,
        /// Where it points.
        target: PathBuf,
    },
}

impl Made {
    /// Its path on the host.
    pub fn path(&self) -> &Path {
        match self {
            Self::Directory { path } | Self::File { path, .. } | Self::Link { path, .. } => path,
        }
    }
}

/// An installation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    schema: String,
    /// The version of ebb that was installed.
    pub version: String,
    /// The runtime's socket, which the proxy passes calls to.
    pub runtime: PathBuf,
    /// The proxy's socket.
    pub socket: PathBuf,
    /// What was made, in that order.
    pub made: Vec<Made>,
}

impl State {
    /// An installation of this version of ebb.
    pub fn new(runtime: PathBuf, socket: PathBuf, made: Vec<Made>) -> Self {
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
    /// It can't be read, or is not one that this version of ebb knows.
    pub fn load(root: &Path) -> io::Result<Option<Self>> {
        let bytes = match files::under(root, Path::new(STATE_FILE)).and_then(fs::read) {
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

    /// Writes the state. Its directory has to be there.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn save(&self, root: &Path) -> io::Result<()> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        files::write(&files::under(root, Path::new(STATE_FILE))?, &bytes, 0o644)
    }
}
