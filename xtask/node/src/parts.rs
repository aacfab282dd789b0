//! Where the runtime's programs are.
//!
//! `cargo xtask setup` unpacks Debian packages below the cargo target directory instead of
//! installing them: installing containerd would start a service on the user's machine.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The unpacked runtime parts.
#[derive(Debug, Clone)]
pub struct Parts {
    root: PathBuf,
}

impl Parts {
    /// Finds the parts where [`Parts::directory`] says.
    ///
    /// # Errors
    /// One line that names the missing program and the command that fetches it.
    pub fn find() -> Result<Self> {
        let parts = Self {
            root: Self::directory(),
        };
        let needed = [
            parts.containerd(),
            parts.ctr(),
            parts.runc(),
            parts.cni_plugins().join("bridge"),
            parts.nginx(),
        ];
        for program in needed {
            if !program.is_file() {
                bail!("{} is missing: run `cargo xtask setup`", program.display());
            }
        }
        Ok(parts)
    }

    /// The directory that packages are unpacked into: `$EBB_PARTS`, else `ebb-parts` in the cargo
    /// target directory.
    pub fn directory() -> PathBuf {
        if let Some(directory) = env::var_os("EBB_PARTS") {
            return directory.into();
        }
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"),
            PathBuf::from,
        );
        let directory = target.join("ebb-parts");
        directory.canonicalize().unwrap_or(directory)
    }

    /// The container runtime.
    pub fn containerd(&self) -> PathBuf {
        self.root.join("usr/bin/containerd")
    }

    /// containerd's command line client, used to import images.
    pub fn ctr(&self) -> PathBuf {
        self.root.join("usr/bin/ctr")
    }

    /// The OCI runtime.
    pub fn runc(&self) -> PathBuf {
        self.root.join("usr/sbin/runc")
    }

    /// The directory of the network plugins.
    pub fn cni_plugins(&self) -> PathBuf {
        self.root.join("usr/lib/cni")
    }

    /// The nginx server, to be put into an image.
    pub fn nginx(&self) -> PathBuf {
        self.root.join("usr/sbin/nginx")
    }

    /// nginx's table of MIME types.
    pub fn mime_types(&self) -> PathBuf {
        self.root.join("etc/nginx/mime.types")
    }

    /// A PATH on which the parts come first.
    pub(crate) fn path_variable(&self) -> String {
        let root = self.root.display();
        format!(
            "{root}/usr/bin:{root}/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        )
    }
}
