//! An OCI image layout in one tar file (opencontainers/image-spec, image-layout.md).
//!
//! ```text
//!  oci-layout            {"imageLayoutVersion":"1.0.0"}
//!  index.json            the manifests, each with the name of its image
//!  blobs/sha256/<hash>   manifests, configurations and layers (uncompressed tar files)
//! ```

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header, HeaderMode};

/// The configuration of an image.
pub(super) struct ImageConfig {
    pub(super) entrypoint: Vec<String>,
    pub(super) arguments: Vec<String>,
    pub(super) stop_signal: &'static str,
}

/// A finished layer.
pub(super) struct Layer {
    path: PathBuf,
    digest: String,
    size: u64,
}

/// A layer being written.
pub(super) struct LayerWriter {
    path: PathBuf,
    tar: Builder<Hashing<BufWriter<File>>>,
}

impl LayerWriter {
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("can't make {}", path.display()))?;
        let writer = Hashing {
            hash: Sha256::new(),
            inner: BufWriter::with_capacity(1 << 20, file),
            size: 0,
        };
        let mut tar = Builder::new(writer);
        tar.mode(HeaderMode::Deterministic);
        Ok(Self {
            path: path.to_owned(),
            tar,
        })
    }

    pub(super) fn directory(&mut self, name: &str) -> Result<()> {
        let mut header = header(
            EntryType::Directory,
            0,
            if name == "tmp" { 0o1777 } else { 0o755 },
        );
        Ok(self
            .tar
            .append_data(&mut header, format!("{name}/"), io::empty())?)
    }

    pub(super) fn file(&mut self, name: &str, source: &Path, mode: u32) -> Result<()> {
        let file =
            File::open(source).with_context(|| format!("can't read {}", source.display()))?;
        let mut header = header(EntryType::Regular, file.metadata()?.len(), mode);
        Ok(self.tar.append_data(&mut header, name, file)?)
    }

    pub(super) fn text(&mut self, name: &str, text: &str) -> Result<()> {
        let mut header = header(EntryType::Regular, text.len() as u64, 0o644);
        Ok(self.tar.append_data(&mut header, name, text.as_bytes())?)
    }

    pub(super) fn link(&mut self, name: &str, target: &str) -> Result<()> {
        let mut header = header(EntryType::Symlink, 0, 0o777);
        Ok(self.tar.append_link(&mut header, name, target)?)
    }

    pub(super) fn finish(self) -> Result<Layer> {
        let mut writer = self.tar.into_inner()?;
        writer.flush()?;
        Ok(Layer {
            path: self.path,
            digest: hex(writer.hash),
            size: writer.size,
        })
    }
}

/// An archive being written.
pub(super) struct Archive {
    tar: Builder<BufWriter<File>>,
    manifests: Vec<Value>,
    blobs: BTreeSet<String>,
}

impl Archive {
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("can't make {}", path.display()))?;
        let tar = Builder::new(BufWriter::with_capacity(1 << 20, file));
        Ok(Self {
            tar,
            manifests: Vec::new(),
            blobs: BTreeSet::new(),
        })
    }

    /// Adds an image; a layer shared with an earlier one is stored once.
    pub(super) fn add(
        &mut self,
        name: &str,
        layers: &[&Layer],
        config: &ImageConfig,
    ) -> Result<()> {
        let mut described = Vec::new();
        for layer in layers {
            if self.blobs.insert(layer.digest.clone()) {
                let mut header = header(EntryType::Regular, layer.size, 0o644);
                let blob = format!("blobs/sha256/{}", layer.digest);
                self.tar
                    .append_data(&mut header, blob, File::open(&layer.path)?)?;
            }
            described.push(descriptor("layer.v1.tar", &layer.digest, layer.size));
        }
        let diff_ids: Vec<String> = layers
            .iter()
            .map(|layer| format!("sha256:{}", layer.digest))
            .collect();
        let configuration = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "Entrypoint": config.entrypoint,
                "Cmd": config.arguments,
                "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
                "StopSignal": config.stop_signal,
                "WorkingDir": "/",
            },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let configuration = self.json_blob("config.v1+json", &configuration)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": configuration,
            "layers": described,
        });
        let mut manifest = self.json_blob("manifest.v1+json", &manifest)?;
        manifest["annotations"] = json!({ "io.containerd.image.name": name });
        self.manifests.push(manifest);
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<()> {
        let index = json!({ "schemaVersion": 2, "manifests": self.manifests });
        self.text("index.json", index.to_string().as_bytes())?;
        self.text("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        self.tar.into_inner()?.flush()?;
        Ok(())
    }

    fn json_blob(&mut self, kind: &str, value: &Value) -> Result<Value> {
        let text = value.to_string();
        let digest = hex(Sha256::new_with_prefix(&text));
        if self.blobs.insert(digest.clone()) {
            self.text(&format!("blobs/sha256/{digest}"), text.as_bytes())?;
        }
        Ok(descriptor(kind, &digest, text.len() as u64))
    }

    fn text(&mut self, name: &str, text: &[u8]) -> Result<()> {
        let mut header = header(EntryType::Regular, text.len() as u64, 0o644);
        Ok(self.tar.append_data(&mut header, name, text)?)
    }
}

fn descriptor(kind: &str, digest: &str, size: u64) -> Value {
    json!({
        "mediaType": format!("application/vnd.oci.image.{kind}"),
        "digest": format!("sha256:{digest}"),
        "size": size,
    })
}

fn header(kind: EntryType, size: u64, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

/// The machine's architecture, with Go's name for it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn hex(hash: Sha256) -> String {
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Hashes and counts the bytes that it writes to `inner`.
struct Hashing<W> {
    hash: Sha256,
    inner: W,
    size: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
