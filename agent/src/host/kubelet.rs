//! The kubelet of this host: its process, its version, and its container runtime endpoint.
//!
//! A setting comes from the command line, else from a drop-in, else from the configuration file, else from the
//! kubelet's own default (`cmd/kubelet/app/server.go`, `NewKubeletCommand`: the file, then `--config-dir`, then
//! the flags again, which win).

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

pub(super) use ebb_core::socket_path::same as same_socket;
use serde::Deserialize;

use crate::linux::files::resolve_in;

/// The kubelet's default endpoint (`SetDefaults_KubeletConfiguration`, from 1.27 on).
pub(super) const DEFAULT_ENDPOINT: &str = "/run/containerd/containerd.sock";

/// Where runtimes listen by default.
const WELL_KNOWN: [&str; 2] = [DEFAULT_ENDPOINT, "/run/crio/crio.sock"];

/// The first kubelet whose calls the proxy can read: older kubelets send the socket's path as `:authority`.
pub(super) const FIRST_VERSION: (u32, u32) = (1, 31);

/// How long `kubelet --version` may take.
const VERSION_WITHIN: Duration = Duration::from_secs(10);

/// Which setting gives the endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum EndpointSource {
    /// `--container-runtime-endpoint`.
    Flag,
    /// A file of `--config-dir`.
    DropIn(PathBuf),
    /// The file of `--config`.
    Config(PathBuf),
    /// The kubelet's default.
    Default,
}

impl std::fmt::Display for EndpointSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Flag => f.write_str("its flag --container-runtime-endpoint"),
            Self::DropIn(path) | Self::Config(path) => path.display().fmt(f),
            Self::Default => f.write_str("its default"),
        }
    }
}

/// A running kubelet. Paths are the host's own, without the root that they were read below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RunningKubelet {
    pub(super) pid: u32,
    /// The runtime's socket, as configured now.
    pub(super) endpoint: PathBuf,
    /// Where the endpoint is set.
    pub(super) source: EndpointSource,
    /// `--config-dir`.
    pub(super) config_dir: Option<PathBuf>,
    /// `--config`.
    pub(super) config: Option<PathBuf>,
    /// A file or directory of its configuration that this process can't read. Then the endpoint may be another one.
    pub(super) unread: Option<PathBuf>,
}

/// The flags of a kubelet that ebb reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct KubeletFlags {
    endpoint: Option<String>,
    config: Option<PathBuf>,
    config_dir: Option<PathBuf>,
}

impl KubeletFlags {
    /// Reads `/proc/PID/cmdline`. Flags are `--name=value` or `--name value`; the last one counts.
    fn parse(cmdline: &[u8]) -> Self {
        let mut flags = Self::default();
        let words: Vec<&[u8]> = cmdline.split(|b| *b == 0).skip(1).collect();
        for (i, word) in words.iter().enumerate() {
            let Some(word) = word.strip_prefix(b"--").or_else(|| word.strip_prefix(b"-")) else {
                continue;
            };
            let mut parts = word.splitn(2, |b| *b == b'=');
            let name = parts.next().unwrap_or_default();
            let Some(value) = parts.next().or_else(|| words.get(i + 1).copied()) else {
                continue;
            };
            let path = || PathBuf::from(OsStr::from_bytes(value));
            match name {
                b"container-runtime-endpoint" => {
                    flags.endpoint = Some(String::from_utf8_lossy(value).into_owned());
                }
                b"config" => flags.config = Some(path()),
                b"config-dir" => flags.config_dir = Some(path()),
                _ => {}
            }
        }
        flags
    }
}

/// The part of a KubeletConfiguration that ebb reads.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Configuration {
    container_runtime_endpoint: Option<String>,
}

/// The endpoint in a configuration file. `None` if ebb can't read or parse the file: the kubelet runs with it, so
/// that is no error.
fn endpoint_in(root: &Path, path: &Path) -> Option<String> {
    let text = fs::read_to_string(resolve_in(root, path).ok()?).ok()?;
    let configuration: Configuration = serde_saphyr::from_str(&text).ok()?;
    configuration
        .container_runtime_endpoint
        .filter(|e| !e.is_empty())
}

/// The drop-ins of a directory, in the order in which the kubelet reads them: `*.conf`, also in subdirectories,
/// sorted by path (`mergeKubeletConfigurations`).
fn drop_ins(root: &Path, directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut entries: Vec<_> = resolve_in(root, directory)
        .and_then(fs::read_dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| directory.join(e.file_name()))
        .collect();
    entries.sort();
    for path in entries {
        if resolve_in(root, &path).is_ok_and(|p| p.is_dir()) {
            found.extend(drop_ins(root, &path));
        } else if path.extension().is_some_and(|e| e == "conf") {
            found.push(path);
        }
    }
    found
}

/// The socket of an endpoint: `unix:///run/x.sock`, or a bare path.
fn socket_of(endpoint: &str) -> PathBuf {
    PathBuf::from(endpoint.strip_prefix("unix://").unwrap_or(endpoint))
}

impl RunningKubelet {
    /// Finds the kubelet of the host whose root is `root`: the process named `kubelet` in the mount namespace of the
    /// host's first process. A process of a pod may have the same name.
    pub(super) fn find(root: &Path) -> Option<Self> {
        let proc = root.join("proc");
        let host = fs::read_link(proc.join("1/ns/mnt")).ok()?;
        let mut pids: Vec<u32> = fs::read_dir(&proc)
            .ok()?
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse().ok())
            .collect();
        pids.sort_unstable();
        let pid = pids.into_iter().find(|pid| {
            let process = proc.join(pid.to_string());
            fs::read_to_string(process.join("comm")).is_ok_and(|c| c.trim_end() == "kubelet")
                && fs::read_link(process.join("ns/mnt")).is_ok_and(|ns| ns == host)
        })?;
        let cmdline = fs::read(proc.join(pid.to_string()).join("cmdline")).ok()?;
        Some(Self::configured(root, pid, KubeletFlags::parse(&cmdline)))
    }

    fn configured(root: &Path, pid: u32, flags: KubeletFlags) -> Self {
        let of_drop_in = || {
            let directory = flags.config_dir.as_ref()?;
            drop_ins(root, directory)
                .into_iter()
                .rev()
                .find_map(|path| Some((endpoint_in(root, &path)?, EndpointSource::DropIn(path))))
        };
        let of_config = || {
            let path = flags.config.as_ref()?;
            let endpoint = endpoint_in(root, path)?;
            Some((endpoint, EndpointSource::Config(path.clone())))
        };
        let is_unread = |path: &&PathBuf| {
            let found = resolve_in(root, path).and_then(fs::File::open);
            found.is_err()
        };
        let of_flag = flags.endpoint.is_some();
        let files = [&flags.config, &flags.config_dir].into_iter().flatten();
        let unread = files.filter(|_| !of_flag).find(is_unread).cloned();
        let (endpoint, source) = flags
            .endpoint
            .clone()
            .map(|e| (e, EndpointSource::Flag))
            .or_else(of_drop_in)
            .or_else(of_config)
            .unwrap_or_else(|| (DEFAULT_ENDPOINT.into(), EndpointSource::Default));
        Self {
            pid,
            endpoint: socket_of(&endpoint),
            source,
            config_dir: flags.config_dir,
            config: flags.config,
            unread,
        }
    }

    /// Runs the kubelet's binary to get its version, as `(major, minor)`.
    ///
    /// # Errors
    ///
    /// The binary can't be run, does not exit in time, or prints something else.
    pub(super) fn version(&self, root: &Path) -> io::Result<(u32, u32)> {
        let program = root.join("proc").join(self.pid.to_string()).join("exe");
        let text = run_version(&program)?;
        version_of(&text).ok_or_else(|| {
            let text = text.trim();
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("unexpected output {text:?}"),
            )
        })
    }
}

/// Parses `Kubernetes v1.31.2`, with any suffix of a distribution.
fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim().strip_prefix("Kubernetes v")?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// What a program prints with `--version`.
///
/// # Errors
///
/// It can't be run, or does not exit in time.
pub(super) fn run_version(program: &Path) -> io::Result<String> {
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    // It writes one line, which fits the pipe.
    let started = Instant::now();
    while child.try_wait()?.is_none() {
        if started.elapsed() > VERSION_WITHIN {
            let _ = child.kill();
            let _ = child.wait();
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let out = child.wait_with_output()?;
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The first well-known runtime socket that exists.
pub(super) fn well_known_runtime(root: &Path) -> Option<PathBuf> {
    WELL_KNOWN
        .iter()
        .map(PathBuf::from)
        .find(|path| resolve_in(root, path).is_ok_and(|p| p.exists()))
}

/// How many clients are connected to the listener at `socket`, from the host's `/proc/net/unix`. Accepted sockets
/// have their listener's path there, and state 3 (`unix_seq_show`, `SS_CONNECTED`).
///
/// # Errors
///
/// The table can't be read.
pub fn clients_of(root: &Path, socket: &Path) -> io::Result<usize> {
    let table = fs::read_to_string(unix_table(root))?;
    Ok(count_clients(&table, socket))
}

/// The table of the host's unix sockets.
pub(super) fn unix_table(root: &Path) -> PathBuf {
    root.join("proc/1/net/unix")
}

fn count_clients(table: &str, socket: &Path) -> usize {
    // Num RefCount Protocol Flags Type St Inode Path
    table
        .lines()
        .filter(|line| {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            words.get(5) == Some(&"03") && words.get(7).is_some_and(|p| Path::new(p) == socket)
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_in_both_spellings_and_the_last_one_counts() {
        let line = b"/usr/bin/kubelet\0--config\0/var/lib/kubelet/config.yaml\0--v=2\0\
            --container-runtime-endpoint=unix:///a\0--container-runtime-endpoint\0unix:///b\0--config-dir=/etc/k\0";
        let flags = KubeletFlags::parse(line);
        assert_eq!(flags.endpoint.as_deref(), Some("unix:///b"));
        assert_eq!(flags.config, Some("/var/lib/kubelet/config.yaml".into()));
        assert_eq!(flags.config_dir, Some("/etc/k".into()));
        assert_eq!(KubeletFlags::parse(b""), KubeletFlags::default());
        assert_eq!(
            KubeletFlags::parse(b"kubelet\0--config"),
            KubeletFlags::default()
        );
    }

    fn configured(root: &Path, line: &[u8]) -> (PathBuf, EndpointSource) {
        let kubelet = RunningKubelet::configured(root, 7, KubeletFlags::parse(line));
        (kubelet.endpoint, kubelet.source)
    }

    #[test]
    fn a_flag_goes_before_drop_ins_the_last_drop_in_before_the_file_and_the_file_before_the_default()
     {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let write = |path: &str, endpoint: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let text = format!(
                "kind: KubeletConfiguration\nmaxPods: 50\ncontainerRuntimeEndpoint: {endpoint}\n"
            );
            fs::write(path, text).unwrap();
        };
        let line = b"kubelet\0--config=/k/config.yaml\0--config-dir=/k/conf.d\0";
        assert_eq!(
            configured(root, line),
            (DEFAULT_ENDPOINT.into(), EndpointSource::Default)
        );
        write("k/config.yaml", "unix:///run/a.sock");
        let file = EndpointSource::Config("/k/config.yaml".into());
        assert_eq!(configured(root, line), ("/run/a.sock".into(), file));
        write("k/conf.d/20-b.conf", "unix:///run/b.sock");
        write("k/conf.d/10-c.conf", "/run/c.sock");
        write("k/conf.d/30-not.yaml", "unix:///run/d.sock");
        let last = EndpointSource::DropIn("/k/conf.d/20-b.conf".into());
        assert_eq!(configured(root, line), ("/run/b.sock".into(), last));
        let line = [
            &line[..],
            b"--container-runtime-endpoint=unix:///run/e.sock\0",
        ]
        .concat();
        assert_eq!(
            configured(root, &line),
            ("/run/e.sock".into(), EndpointSource::Flag)
        );
    }

    #[test]
    fn versions_are_read_with_the_additions_of_distributions() {
        assert_eq!(version_of("Kubernetes v1.31.2\n"), Some((1, 31)));
        assert_eq!(version_of("Kubernetes v1.30.4+k3s1"), Some((1, 30)));
        assert_eq!(version_of("Kubernetes v1.36.0-alpha.1"), Some((1, 36)));
        assert_eq!(version_of("containerd 1.7"), None);
    }

    #[test]
    fn only_accepted_connections_of_the_socket_are_clients() {
        let table = "\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 11 /run/ebb/cri.sock
0000000000000000: 00000003 00000000 00000000 0001 03 12 /run/ebb/cri.sock
0000000000000000: 00000003 00000000 00000000 0001 03 13 /run/ebb/cri.sock
0000000000000000: 00000003 00000000 00000000 0001 03 14
0000000000000000: 00000003 00000000 00000000 0001 03 15 /run/ebb/agent.sock
";
        assert_eq!(count_clients(table, Path::new("/run/ebb/cri.sock")), 2);
    }

    #[test]
    fn clients_of_a_real_socket_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let table = || fs::read_to_string("/proc/self/net/unix").unwrap();
        assert_eq!(count_clients(&table(), &path), 0);
        let client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let accepted = listener.accept().unwrap();
        assert_eq!(count_clients(&table(), &path), 1);
        drop((client, accepted));
        assert_eq!(count_clients(&table(), &path), 0);
    }

    #[test]
    fn var_run_is_run() {
        let same = |a, b| same_socket(Path::new(a), Path::new(b));
        assert!(same("/var/run/crio/crio.sock", "/run/crio/crio.sock"));
        assert!(!same("/run/a", "/run/b"));
    }
}
