//! A node that is ready for pods.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::containerd::Containerd;
use crate::image;
use crate::kubelet::Kubelet;
use crate::parts::Parts;
use crate::sandbox::{self, SandboxPaths};

/// A running node: containerd with the images of [`crate::image`] and a pod network.
///
/// Only one per sandbox. Dropping it kills containerd; pods end with the sandbox.
#[derive(Debug)]
pub struct Node {
    paths: &'static SandboxPaths,
    parts: Parts,
    containerd: Containerd,
}

impl Node {
    /// Starts containerd and makes and imports the images.
    ///
    /// # Errors
    /// If parts are missing, the process is not in [`sandbox::inside`], or containerd does not start.
    pub async fn start() -> Result<Self> {
        Self::start_with(Parts::find()?).await
    }

    /// As [`Self::start`], with these parts.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub async fn start_with(parts: Parts) -> Result<Self> {
        let paths = sandbox::paths()?;
        let archive = paths.directory().join("images.tar");
        let build = {
            let (parts, archive) = (parts.clone(), archive.clone());
            tokio::task::spawn_blocking(move || image::build(&parts, &archive))
        };
        let containerd = Containerd::start(&parts, paths).await?;
        build.await?.context("can't make images")?;
        containerd.import(&archive).await?;
        fs::remove_file(&archive)?;
        let node = Self {
            paths,
            parts,
            containerd,
        };
        let kubelet = node.kubelet()?;
        for name in [image::PAUSE, image::NGINX, image::FIXTURE] {
            kubelet.until_image(name).await?;
        }
        Ok(node)
    }

    /// Imports the images of an archive, and waits until the runtime lists `name`.
    ///
    /// # Errors
    /// If the archive can't be read or has no such image.
    pub async fn import(&self, archive: &Path, name: &str) -> Result<()> {
        self.containerd.import(archive).await?;
        self.kubelet()?.until_image(name).await
    }

    /// The container runtime, to stop, kill and resume it.
    pub fn containerd(&mut self) -> &mut Containerd {
        &mut self.containerd
    }

    /// The runtime's CRI socket.
    pub fn socket(&self) -> &Path {
        self.containerd.socket()
    }

    /// A kubelet that calls the runtime.
    ///
    /// # Errors
    /// If the process is not in the sandbox.
    pub fn kubelet(&self) -> Result<Kubelet> {
        Kubelet::new(self.socket())
    }

    /// A kubelet that calls another CRI endpoint, such as a proxy.
    ///
    /// # Errors
    /// As for [`Self::kubelet`].
    pub fn kubelet_at(&self, endpoint: &Path) -> Result<Kubelet> {
        Kubelet::new(endpoint)
    }

    /// The paths of the node's sandbox.
    pub fn paths(&self) -> &'static SandboxPaths {
        self.paths
    }

    /// The runtime's programs.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// A new directory for files that a pod mounts, removed with the node.
    ///
    /// # Errors
    /// If it can't be made.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.paths.directory().join("files").join(name);
        fs::create_dir_all(&path).with_context(|| format!("can't make {}", path.display()))?;
        Ok(path)
    }
}
