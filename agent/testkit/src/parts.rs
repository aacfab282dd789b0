//! The paths of the runtime's programs.
//!
//! `cargo xtask setup` unpacks Debian packages below the cargo target directory instead of installing them, because
//! installing containerd would start a service on the user's machine.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

/// The unpacked runtime parts.
#[derive(Debug, Clone)]
pub struct Parts {
    root: PathBuf,
    /// The directory with containerd, if not `root`.
    containerd: Option<PathBuf>,
}

impl Parts {
    /// Finds the parts in [`Parts::directory`].
    ///
    /// # Errors
    /// One line that names the missing program and the command that fetches it.
    pub fn find() -> Result<Self> {
        Self {
            root: Self::directory(),
            containerd: None,
        }
        .checked()
    }

    /// The same parts with containerd of another Debian suite, such as `trixie`.
    ///
    /// # Errors
    /// As for [`Self::find`].
    pub fn with_containerd_of(suite: &str) -> Result<Self> {
        let root = Self::directory();
        Self {
            containerd: Some(root.join(format!("containerd-{suite}"))),
            root,
        }
        .checked()
    }

    fn checked(self) -> Result<Self> {
        let parts = self;
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

    /// The directory of the unpacked packages: `$EBB_PARTS`, else `ebb-parts` in the cargo target directory.
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
        self.containerd_root().join("usr/bin/containerd")
    }

    /// containerd's command line client, used to import images.
    pub fn ctr(&self) -> PathBuf {
        self.containerd_root().join("usr/bin/ctr")
    }

    fn containerd_root(&self) -> &Path {
        self.containerd.as_deref().unwrap_or(&self.root)
    }

    /// The OCI runtime.
    pub fn runc(&self) -> PathBuf {
        self.root.join("usr/sbin/runc")
    }

    /// The directory of the network plugins.
    pub fn cni_plugins(&self) -> PathBuf {
        self.root.join("usr/lib/cni")
    }

    /// The nginx server, for an image.
    pub fn nginx(&self) -> PathBuf {
        self.root.join("usr/sbin/nginx")
    }

    /// A command that runs wrk, a load generator, with its unpacked libraries.
    ///
    /// # Errors
    /// One line that names the missing program and the command that fetches it.
    pub fn wrk(&self) -> Result<Command> {
        let program = self.root.join("usr/bin/wrk");
        if !program.is_file() {
            bail!("{} is missing: run `cargo xtask setup`", program.display());
        }
        // One directory per architecture, with Debian's name for it.
        let libraries = self.root.join("usr/lib").read_dir()?.flatten();
        let libraries: Vec<_> = libraries
            .map(|entry| entry.path())
            .filter(|path| path.ends_with(format!("{}-linux-gnu", env::consts::ARCH)))
            .collect();
        let mut command = Command::new(program);
        command.env("LD_LIBRARY_PATH", env::join_paths(libraries)?);
        Ok(command)
    }

    /// nginx's table of MIME types.
    pub fn mime_types(&self) -> PathBuf {
        self.root.join("etc/nginx/mime.types")
    }

    /// iptables (the legacy one, without nftables). It needs none of the other parts, which are missing in a guest of
    /// `cargo xtask vmtest`.
    ///
    /// # Errors
    /// One line that names the command that fetches it.
    pub fn iptables() -> Result<Command> {
        let root = Self::directory();
        let program = root.join("usr/sbin/xtables-legacy-multi");
        let libraries = root.join("usr/lib").read_dir().ok();
        let libraries = libraries
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.join("xtables").is_dir());
        let Some(libraries) = libraries.filter(|_| program.is_file()) else {
            bail!("{} is missing: run `cargo xtask setup`", program.display());
        };
        let mut command = Command::new(program);
        command
            .arg("iptables")
            .env("XTABLES_LIBDIR", libraries.join("xtables"))
            .env("LD_LIBRARY_PATH", libraries);
        Ok(command)
    }

    /// The directory of PostgreSQL's programs, which find their other files relative to it.
    pub fn postgresql(&self) -> PathBuf {
        self.root.join("usr/lib/postgresql/15/bin")
    }

    /// The Redis server.
    pub fn redis(&self) -> PathBuf {
        self.root.join("usr/bin/redis-server")
    }

    /// A PATH with the parts first, where containerd finds its shim.
    pub(crate) fn path_variable(&self) -> String {
        let root = self.root.display();
        let containerd = self.containerd_root().display();
        format!(
            "{containerd}/usr/bin:{root}/usr/bin:{root}/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        )
    }
}
