//! The kubelet of this host: its process, its version, and which container runtime endpoint it was told.
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

use serde::Deserialize;

use super::files::followed;

/// The kubelet's default endpoint (`SetDefaults_KubeletConfiguration`, from 1.27 on).
pub const DEFAULT_ENDPOINT: &str = "/run/containerd/containerd.sock";

/// Where runtimes listen that nobody was told of.
const WELL_KNOWN: [&str; 2] = [DEFAULT_ENDPOINT, "/run/crio/crio.sock"];

/// The first kubelet whose calls the proxy can read: older ones send the socket's path as `:authority`.
pub const FIRST_VERSION: (u32, u32) = (1, 31);

/// How long `kubelet --version` may take.
const VERSION_WITHIN: Duration = Duration::from_secs(10);

/// Who names the endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `--container-runtime-endpoint`.
    Flag,
    /// A file of `--config-dir`.
    DropIn(PathBuf),
    /// The file of `--config`.
    Config(PathBuf),
    /// Nobody: it is the kubelet's default.
    Default,
}

impl std::fmt::Display for Source {
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
pub struct Kubelet {
    /// Its process.
    pub pid: u32,
    /// The socket it talks to, as it is configured now.
    pub endpoint: PathBuf,
    /// Who says so.
    pub source: Source,
    /// `--config-dir`.
    pub config_dir: Option<PathBuf>,
    /// `--config`.
    pub config: Option<PathBuf>,
}

/// What of a kubelet's command line matters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Flags {
    endpoint: Option<String>,
    config: Option<PathBuf>,
    config_dir: Option<PathBuf>,
}

impl Flags {
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

/// The only part of a KubeletConfiguration that is read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Configuration {
    container_runtime_endpoint: Option<String>,
}

/// The endpoint that a configuration file names. A file that can't be read names none: the kubelet runs, so
/// it has read it, and what ebb does not understand in it is not for ebb to judge.
fn endpoint_in(root: &Path, path: &Path) -> Option<String> {
    let text = fs::read_to_string(followed(root, path).ok()?).ok()?;
    let configuration: Configuration = serde_saphyr::from_str(&text).ok()?;
    configuration
        .container_runtime_endpoint
        .filter(|e| !e.is_empty())
}

/// The drop-ins of a directory, in the order in which the kubelet reads them: `*.conf`, also in directories
/// below, by path (`mergeKubeletConfigurations`).
fn drop_ins(root: &Path, directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut entries: Vec<_> = followed(root, directory)
        .and_then(fs::read_dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| directory.join(e.file_name()))
        .collect();
    entries.sort();
    for path in entries {
        if followed(root, &path).is_ok_and(|p| p.is_dir()) {
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

/// The same socket, whichever way it is spelled: `/var/run` is `/run`.
pub fn same_socket(a: &Path, b: &Path) -> bool {
    let plain = |p: &Path| match p.strip_prefix("/var/run") {
        Ok(rest) => Path::new("/run").join(rest),
        Err(_) => p.to_owned(),
    };
    plain(a) == plain(b)
}

impl Kubelet {
    /// Finds the kubelet of the host whose root is `root`: the process of that name in the mount namespace of
    /// the host's first process. A process of a pod may call itself anything.
    pub fn find(root: &Path) -> Option<Self> {
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
        Some(Self::configured(root, pid, Flags::parse(&cmdline)))
    }

    fn configured(root: &Path, pid: u32, flags: Flags) -> Self {
        let of_drop_in = || {
            let directory = flags.config_dir.as_ref()?;
            drop_ins(root, directory)
                .into_iter()
                .rev()
                .find_map(|path| Some((endpoint_in(root, &path)?, Source::DropIn(path))))
        };
        let of_config = || {
            let path = flags.config.as_ref()?;
            let endpoint = endpoint_in(root, path)?;
            Some((endpoint, Source::Config(path.clone())))
        };
        let (endpoint, source) = flags
            .endpoint
            .clone()
            .map(|e| (e, Source::Flag))
            .or_else(of_drop_in)
            .or_else(of_config)
            .unwrap_or_else(|| (DEFAULT_ENDPOINT.into(), Source::Default));
        Self {
            pid,
            endpoint: socket_of(&endpoint),
            source,
            config_dir: flags.config_dir,
            config: flags.config,
        }
    }

    /// Asks its own binary for its version, as `(major, minor)`.
    ///
    /// # Errors
    ///
    /// The binary can't be run, does not answer in time, or says something else.
    pub fn version(&self, root: &Path) -> io::Result<(u32, u32)> {
        let program = root.join("proc").join(self.pid.to_string()).join("exe");
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
        let text = String::from_utf8_lossy(&out.stdout);
        version_of(&text).ok_or_else(|| {
            let text = text.trim();
            io::Error::new(io::ErrorKind::InvalidData, format!("it says {text:?}"))
        })
    }
}

/// Reads `Kubernetes v1.31.2`, with whatever a distribution puts behind it.
fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim().strip_prefix("Kubernetes v")?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The first of the well-known runtime sockets that is there.
pub fn well_known_runtime(root: &Path) -> Option<PathBuf> {
    WELL_KNOWN
        .iter()
        .map(PathBuf::from)
        .find(|path| followed(root, path).is_ok_and(|p| p.exists()))
}

/// How many clients are connected to the listener at `socket`, by the host's `/proc/net/unix`. Accepted sockets
/// have their listener's path there and state 3 (`unix_seq_show`, `SS_CONNECTED`).
///
/// # Errors
///
/// The table can't be read.
pub fn clients_of(root: &Path, socket: &Path) -> io::Result<usize> {
    let table = fs::read_to_string(unix_table(root))?;
    Ok(count_clients(&table, socket))
}

/// The table of the host's unix sockets.
pub fn unix_table(root: &Path) -> PathBuf {
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
        let flags = Flags::parse(line);
        assert_eq!(flags.endpoint.as_deref(), Some("unix:///b"));
        assert_eq!(flags.config, Some("/var/lib/kubelet/config.yaml".into()));
        assert_eq!(flags.config_dir, Some("/etc/k".into()));
        assert_eq!(Flags::parse(b""), Flags::default());
        assert_eq!(Flags::parse(b"kubelet\0--config"), Flags::default());
    }

    fn configured(root: &Path, line: &[u8]) -> (PathBuf, Source) {
        let kubelet = Kubelet::configured(root, 7, Flags::parse(line));
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
            (DEFAULT_ENDPOINT.into(), Source::Default)
        );
        write("k/config.yaml", "unix:///run/a.sock");
        let file = Source::Config("/k/config.yaml".into());
        assert_eq!(configured(root, line), ("/run/a.sock".into(), file));
        write("k/conf.d/20-b.conf", "unix:///run/b.sock");
        write("k/conf.d/10-c.conf", "/run/c.sock");
        write("k/conf.d/30-not.yaml", "unix:///run/d.sock");
        let last = Source::DropIn("/k/conf.d/20-b.conf".into());
        assert_eq!(configured(root, line), ("/run/b.sock".into(), last));
        let line = [
            &line[..],
            b"--container-runtime-endpoint=unix:///run/e.sock\0",
        ]
        .concat();
        assert_eq!(
            configured(root, &line),
            ("/run/e.sock".into(), Source::Flag)
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
    fn only_accepted_connections_of_that_socket_are_clients() {
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
