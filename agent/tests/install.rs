//! `ebb install-cri` and `ebb uninstall-cri`, as processes, on a host that is a directory tree; and the units under
//! systemd's own tools.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    os::unix::{
        fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use ebb::{linux::files::digest, pods::cri::Cri};
use ebb_testkit::{helpers::beside, parts::Parts};
use tempfile::TempDir;

const EBB: &str = env!("CARGO_BIN_EXE_ebb");

/// The proxy that `ebb install-cri` installs.
fn proxy() -> PathBuf {
    beside(EBB, "ebb-cri-proxy")
}

const CONFIG: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
    containerRuntimeEndpoint: unix:///run/containerd/containerd.sock\n";

/// A host with a kubelet that has a configuration file and a directory of drop-ins.
struct Host(TempDir);

impl Host {
    fn new(version: &str, flags: &[&str]) -> Self {
        let host = Self(TempDir::new().unwrap());
        for directory in [
            "opt",
            "var/lib/kubelet",
            "etc/kubernetes/kubelet.conf.d",
            "proc/1/net",
        ] {
            fs::create_dir_all(host.path(directory)).unwrap();
        }
        host.write("etc/systemd/system/other.service", "[Service]\n");
        host.write("var/lib/kubelet/config.yaml", CONFIG);
        host.process(1, "systemd", "mnt:[1]", &["/sbin/init"]);
        // A process in a pod that calls itself kubelet.
        host.process(
            40,
            "kubelet",
            "mnt:[40]",
            &["kubelet", "--container-runtime-endpoint=/evil"],
        );
        host.kubelet(version, flags);
        host
    }

    fn kubelet(&self, version: &str, flags: &[&str]) {
        let flags = [&["/usr/bin/kubelet"], flags].concat();
        self.process(42, "kubelet", "mnt:[1]", &flags);
        self.write(
            "usr/bin/kubelet",
            &format!("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Kubernetes v{version}'\n"),
        );
        let program = self.path("usr/bin/kubelet");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let exe = self.path("proc/42/exe");
        let _ = fs::remove_file(&exe);
        symlink(program, exe).unwrap();
    }

    fn process(&self, pid: u32, comm: &str, namespace: &str, cmdline: &[&str]) {
        self.write(&format!("proc/{pid}/comm"), &format!("{comm}\n"));
        self.write(&format!("proc/{pid}/cmdline"), &(cmdline.join("\0") + "\0"));
        let namespaces = self.path(&format!("proc/{pid}/ns"));
        fs::create_dir_all(&namespaces).unwrap();
        let _ = fs::remove_file(namespaces.join("mnt"));
        symlink(namespace, namespaces.join("mnt")).unwrap();
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        let path = self.path(path);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    fn ebb(&self, verb: &str, flags: &[&str]) -> Output {
        let mut command = Command::new(EBB);
        command
            .arg(verb)
            .arg("--root")
            .arg(self.0.path())
            .args(flags);
        command.output().unwrap()
    }

    /// Runs a verb that must succeed, and returns what it prints.
    fn says(&self, verb: &str, flags: &[&str]) -> String {
        let out = self.ebb(verb, flags);
        assert!(out.status.success(), "{verb} {flags:?}: {out:?}");
        String::from_utf8(out.stdout).unwrap()
    }

    /// Runs a verb that must refuse, and returns its one line of error.
    fn refuses(&self, verb: &str, flags: &[&str]) -> String {
        let out = self.ebb(verb, flags);
        assert_eq!(out.status.code(), Some(12), "{verb} {flags:?}: {out:?}");
        let text = String::from_utf8(out.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        text
    }

    /// Every path, with the modes, modification times and digests of files.
    fn tree(&self) -> BTreeMap<PathBuf, String> {
        let mut tree = BTreeMap::new();
        let mut todo = vec![self.0.path().to_owned()];
        while let Some(directory) = todo.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                let meta = fs::symlink_metadata(&path).unwrap();
                let what = if meta.is_symlink() {
                    format!("-> {}", fs::read_link(&path).unwrap().display())
                } else if meta.is_dir() {
                    todo.push(path.clone());
                    format!("{:o}", meta.mode())
                } else if meta.file_type().is_socket() {
                    format!("socket {:o} {}", meta.mode(), meta.mtime_nsec())
                } else {
                    let bytes = fs::read(&path).unwrap();
                    let digest = digest(&bytes);
                    format!("{:o} {} {digest}", meta.mode(), meta.mtime_nsec())
                };
                tree.insert(path, what);
            }
        }
        tree
    }
}

const FLAGS: [&str; 2] = [
    "--config=/var/lib/kubelet/config.yaml",
    "--config-dir=/etc/kubernetes/kubelet.conf.d",
];

const DROP_IN: &str = "etc/kubernetes/kubelet.conf.d/99-ebb-cri.conf";

#[test]
fn installing_and_removing_leaves_the_host_as_it_was() {
    let host = Host::new("1.31.2", &FLAGS);
    let before = host.tree();
    let planned = host.says("install-cri", &["--apply", "--dry-run"]);
    assert_eq!(host.tree(), before, "a dry run changes nothing");
    let done = host.says("install-cri", &["--apply"]);
    assert!(
        done.contains("99-ebb-cri.conf") && done.contains("systemctl restart kubelet"),
        "{done}"
    );
    for line in done.lines() {
        assert!(planned.contains(line), "not planned: {line}");
    }

    assert_eq!(
        fs::read(host.path("opt/ebb/bin/ebb-cri-proxy")).unwrap(),
        fs::read(proxy()).unwrap()
    );
    let mode = fs::metadata(host.path("opt/ebb/bin/ebb-cri-proxy"))
        .unwrap()
        .mode();
    assert_eq!(mode & 0o777, 0o755);
    let runtime = host.read("etc/systemd/system/ebb-cri.service.d/10-runtime.conf");
    assert!(
        runtime.contains("EBB_CRI_SOCKET=/run/containerd/containerd.sock"),
        "{runtime}"
    );
    let setting = host.read(DROP_IN);
    assert!(
        setting.contains("containerRuntimeEndpoint: unix:///run/ebb/cri.sock"),
        "{setting}"
    );
    assert_eq!(
        host.read("var/lib/kubelet/config.yaml"),
        CONFIG,
        "never edited"
    );
    let link = fs::read_link(host.path("etc/systemd/system/sockets.target.wants/ebb-cri.socket"));
    assert_eq!(
        link.unwrap(),
        Path::new("/etc/systemd/system/ebb-cri.socket")
    );

    // A second run: the runtime is still containerd, not the proxy that the kubelet now uses.
    let installed = host.tree();
    let again = host.says("install-cri", &[]);
    assert!(again.contains("nothing to do"), "{again}");
    assert_eq!(host.tree(), installed);

    let planned = host.says("uninstall-cri", &["--dry-run"]);
    let done = host.says("uninstall-cri", &[]);
    for line in done.lines() {
        assert!(planned.contains(line), "not planned: {line}");
    }
    assert_eq!(host.tree(), before);
    assert!(host.says("uninstall-cri", &[]).contains("nothing to do"));
}

#[test]
fn nothing_is_written_if_no_container_runtime_answers() {
    let host = Host::new("1.31.2", &FLAGS);
    fs::create_dir_all(host.path("run/containerd")).unwrap();
    let listener = UnixListener::bind(host.path("run/containerd/containerd.sock")).unwrap();
    let before = host.tree();
    let refuses = |status: [i32; 2]| {
        for flags in [&["--apply"][..], &[]] {
            let out = host.ebb("install-cri", flags);
            let why = String::from_utf8_lossy(&out.stderr);
            assert!(
                out.status.code().is_some_and(|code| status.contains(&code)),
                "{flags:?}: {out:?}"
            );
            assert!(why.contains("so nothing was changed"), "{why}");
            assert_eq!(host.tree(), before, "{flags:?}");
        }
    };
    // A server that is no CRI runtime, for both installations.
    let server = thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            // The client may have gone.
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n");
        }
    });
    refuses([5, 6]);
    server.join().unwrap();
    // A socket that a killed runtime has left.
    refuses([5, 5]);
}

#[test]
fn without_apply_the_setting_is_printed_and_the_kubelet_is_not_changed() {
    let host = Host::new("1.33.0", &FLAGS);
    let before = host.tree();
    let said = host.says("install-cri", &["--dry-run"]);
    assert!(
        said.contains("containerRuntimeEndpoint: unix:///run/ebb/cri.sock"),
        "{said}"
    );
    assert!(said.contains("99-ebb-cri.conf"), "{said}");
    assert_eq!(host.tree(), before);
    let said = host.says("install-cri", &[]);
    assert!(
        said.contains("containerRuntimeEndpoint: unix:///run/ebb/cri.sock"),
        "{said}"
    );
    assert!(said.contains("99-ebb-cri.conf"), "{said}");
    assert!(!host.path(DROP_IN).exists());
    // Once with `--apply`, and then without it: the drop-in stays.
    host.says("install-cri", &["--apply"]);
    host.says("install-cri", &[]);
    assert!(host.path(DROP_IN).exists());
}

#[test]
fn apply_refuses_if_a_drop_in_would_have_no_effect_and_says_what_to_change() {
    let flag = "--container-runtime-endpoint=unix:///run/containerd/containerd.sock";
    let host = Host::new("1.31.0", &[FLAGS[0], FLAGS[1], flag]);
    let before = host.tree();
    let why = host.refuses("install-cri", &["--apply"]);
    assert!(
        why.contains("--container-runtime-endpoint goes before"),
        "{why}"
    );
    let host_without = Host::new("1.31.0", &FLAGS[..1]);
    let why = host_without.refuses("install-cri", &["--apply"]);
    assert!(why.contains("/var/lib/kubelet/config.yaml"), "{why}");
    assert_eq!(host.tree(), before);
    let said = host_without.says("install-cri", &[]);
    assert!(
        said.contains("put `containerRuntimeEndpoint: unix:///run/ebb/cri.sock` there"),
        "{said}"
    );
}

#[test]
fn old_kubelets_are_refused_with_the_reason() {
    let host = Host::new("1.30.9", &FLAGS);
    let before = host.tree();
    let why = host.refuses("install-cri", &[]);
    assert!(why.contains("1.30") && why.contains(":authority"), "{why}");
    assert_eq!(host.tree(), before);
}

#[test]
fn in_front_of_crio_the_proxys_path_ends_like_crios() {
    let flag = "--container-runtime-endpoint=unix:///var/run/crio/crio.sock";
    let host = Host::new("1.32.0", &[flag]);
    let before = host.tree();
    host.says("install-cri", &[]);
    let runtime = host.read("etc/systemd/system/ebb-cri.service.d/10-runtime.conf");
    assert!(
        runtime.contains("EBB_CRI_SOCKET=/var/run/crio/crio.sock"),
        "{runtime}"
    );
    let socket = host.read("etc/systemd/system/ebb-cri.socket.d/10-path.conf");
    assert!(
        socket.ends_with("ListenStream=\nListenStream=/run/ebb/run/crio/crio.sock\n"),
        "{socket}"
    );
    host.says("uninstall-cri", &[]);
    assert_eq!(host.tree(), before);
}

#[test]
fn the_proxy_is_not_removed_while_the_kubelet_uses_it() {
    let host = Host::new("1.31.2", &FLAGS);
    let before = host.tree();
    host.says("install-cri", &["--apply"]);
    // The drop-in is removed first; the kubelet was started with it, and stays connected until it is restarted.
    let clients = "Num RefCount Protocol Flags Type St Inode Path\n\
        0: 00000003 00000000 00000000 0001 03 12 /run/ebb/cri.sock\n";
    host.write("proc/1/net/unix", clients);
    let installed = host.tree();
    let why = host.refuses("uninstall-cri", &["--dry-run"]);
    assert!(why.contains("99-ebb-cri.conf, then stop here"), "{why}");
    assert!(why.contains("restart the kubelet"), "{why}");
    assert_eq!(host.tree(), installed);
    let why = host.refuses("uninstall-cri", &[]);
    assert!(why.contains("restart the kubelet"), "{why}");
    assert!(!host.path(DROP_IN).exists());
    assert!(host.path("opt/ebb/bin/ebb-cri-proxy").exists());
    fs::remove_file(host.path("proc/1/net/unix")).unwrap();
    host.says("uninstall-cri", &[]);
    assert_eq!(host.tree(), before);

    // An endpoint that was set by hand: ebb does not change it.
    host.says("install-cri", &[]);
    host.write(
        "var/lib/kubelet/config.yaml",
        &CONFIG.replace("containerd/containerd", "ebb/cri"),
    );
    let why = host.refuses("uninstall-cri", &[]);
    assert!(why.contains("/var/lib/kubelet/config.yaml"), "{why}");
    assert!(
        why.contains("unix:///run/containerd/containerd.sock"),
        "{why}"
    );
    host.says("uninstall-cri", &["--force"]);
    assert!(!host.path("opt/ebb").exists());
}

#[test]
fn the_proxy_is_not_removed_while_its_clients_are_unknown() {
    let host = Host::new("1.31.2", &FLAGS);
    let before = host.tree();
    host.says("install-cri", &[]);
    let installed = host.tree();
    // The file exists and can't be read.
    fs::create_dir(host.path("proc/1/net/unix")).unwrap();
    for flags in [&[][..], &["--dry-run"]] {
        let why = host.refuses("uninstall-cri", flags);
        assert!(why.contains("can't tell"), "{why}");
        assert!(why.contains("proc/1/net/unix"), "{why}");
    }
    fs::remove_dir(host.path("proc/1/net/unix")).unwrap();
    assert_eq!(host.tree(), installed);
    fs::create_dir(host.path("proc/1/net/unix")).unwrap();
    host.says("uninstall-cri", &["--force"]);
    fs::remove_dir(host.path("proc/1/net/unix")).unwrap();
    assert_eq!(host.tree(), before);
}

#[test]
fn absolute_links_of_the_host_are_resolved_inside_the_host() {
    let host = Host::new("1.31.2", &FLAGS);
    // This path exists on the host and outside it: ebb must use the one on the host.
    let target = TempDir::new().unwrap();
    let within = host.path(target.path().strip_prefix("/").unwrap().to_str().unwrap());
    fs::create_dir_all(&within).unwrap();
    for directory in ["opt", "etc/kubernetes/kubelet.conf.d"] {
        fs::remove_dir(host.path(directory)).unwrap();
        symlink(target.path(), host.path(directory)).unwrap();
    }
    let before = host.tree();
    host.says("install-cri", &["--apply"]);
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0);
    let program = fs::read(within.join("ebb/bin/ebb-cri-proxy")).unwrap();
    assert_eq!(digest(&program), digest(&fs::read(proxy()).unwrap()));
    let setting = fs::read_to_string(within.join("99-ebb-cri.conf")).unwrap();
    assert!(setting.contains("unix:///run/ebb/cri.sock"), "{setting}");
    // The kubelet's configuration is read through the links, too.
    let said = host.says("install-cri", &[]);
    assert!(
        said.contains("the kubelet uses the proxy already"),
        "{said}"
    );
    host.says("uninstall-cri", &[]);
    assert_eq!(host.tree(), before);

    fs::remove_dir(&within).unwrap();
    let before = host.tree();
    let out = host.ebb("install-cri", &[]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success(), "{out:?}");
    assert!(
        said.contains("/opt is a symbolic link that leads nowhere"),
        "{said}"
    );
    assert_eq!(host.tree(), before);
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0);
}

#[test]
fn a_failed_installation_says_how_to_undo_it() {
    let host = Host::new("1.31.2", &FLAGS);
    let before = host.tree();
    // In a mount namespace of its own, where /opt is read-only.
    let script = r#"mount -t tmpfs -o ro none "$1/opt" && exec "$0" install-cri --root "$1""#;
    let out = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, EBB])
        .arg(host.0.path())
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(said.contains("can't make /opt/ebb"), "{said}");
    assert!(said.contains("run `ebb uninstall-cri`"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(host.path("var/lib/ebb/install-cri.json").exists());
    host.says("uninstall-cri", &[]);
    assert_eq!(host.tree(), before);
}

#[test]
fn files_that_others_wrote_or_changed_are_neither_replaced_nor_removed() {
    let host = Host::new("1.31.2", &FLAGS);
    host.write("etc/systemd/system/ebb-cri.service", "mine\n");
    let before = host.tree();
    let why = host.refuses("install-cri", &[]);
    assert!(
        why.contains("/etc/systemd/system/ebb-cri.service is there already"),
        "{why}"
    );
    assert_eq!(host.tree(), before);
    fs::remove_file(host.path("etc/systemd/system/ebb-cri.service")).unwrap();

    host.says("install-cri", &[]);
    host.write("etc/systemd/system/ebb-cri.service", "patched\n");
    let why = host.refuses("install-cri", &[]);
    assert!(why.contains("was changed since"), "{why}");
    let said = host.says("uninstall-cri", &[]);
    assert!(
        said.contains("/etc/systemd/system/ebb-cri.service was changed since"),
        "{said}"
    );
    assert_eq!(host.read("etc/systemd/system/ebb-cri.service"), "patched\n");
    assert!(!host.path("opt/ebb").exists());
}

/// A program of systemd that `cargo xtask setup` has unpacked.
fn systemd(program: &str) -> Command {
    let parts = Parts::directory();
    let unpacked = parts.join("usr/bin").join(program);
    assert!(
        unpacked.exists(),
        "{} is missing: run `cargo xtask setup`",
        unpacked.display()
    );
    let libraries = ["lib", "usr/lib"].map(|dir| {
        let triple = format!("{}-linux-gnu", std::env::consts::ARCH);
        parts.join(dir).join(triple)
    });
    let mut path = libraries[1].join("systemd").into_os_string();
    for directory in libraries {
        path.push(":");
        path.push(directory);
    }
    let mut command = Command::new(unpacked);
    command.env("LD_LIBRARY_PATH", path);
    command
}

#[test]
fn the_installed_units_pass_systemds_own_check() {
    for endpoint in ["/run/containerd/containerd.sock", "/run/crio/crio.sock"] {
        let flag = format!("--container-runtime-endpoint=unix://{endpoint}");
        let host = Host::new("1.31.2", &[&flag]);
        host.says("install-cri", &[]);
        let units = host.path("etc/systemd/system");
        // The check fails without the unit's program, which is not installed here.
        for unit in ["ebb-cri.service", "ebb-cri.service.d/10-runtime.conf"] {
            let path = units.join(unit);
            let text = fs::read_to_string(&path).unwrap();
            fs::write(
                path,
                text.replace("/opt/ebb/bin/ebb-cri-proxy", proxy().to_str().unwrap()),
            )
            .unwrap();
        }
        let out = systemd("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=no"])
            .args([units.join("ebb-cri.service"), units.join("ebb-cri.socket")])
            .env("SYSTEMD_UNIT_PATH", format!("{}:", units.display()))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        let ours: Vec<&str> = said
            .lines()
            .filter(|line| line.contains("ebb-cri"))
            .collect();
        assert!(out.status.success() && ours.is_empty(), "{out:?}");
        // An invalid unit is found.
        let service = units.join("ebb-cri.service");
        let text = fs::read_to_string(&service).unwrap();
        fs::write(&service, text.replace("Restart=always", "Restart=perhaps")).unwrap();
        let out = systemd("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=no"])
            .arg(&service)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.contains("perhaps"), "{out:?}");
    }
}

/// A process that is killed when this is dropped.
struct KilledOnDrop(std::process::Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn the_proxy_serves_the_socket_that_systemd_passes() {
    let directory = TempDir::new().unwrap();
    let socket = directory.path().join("cri.sock");
    let mut command = systemd("systemd-socket-activate");
    // It execs the proxy at the first connection.
    command
        .arg("--listen")
        .arg(&socket)
        .arg(proxy())
        .args(["--listen", "/nowhere/at/all", "--runtime"])
        .arg(directory.path().join("no-runtime.sock"))
        .stderr(Stdio::null());
    let _proxy = KilledOnDrop(command.spawn().unwrap());
    let started = Instant::now();
    let answer = loop {
        // Before it listens, no connection succeeds; afterwards the proxy answers that it can't reach the runtime.
        let answer = match Cri::connect(&socket).await {
            Ok(cri) => panic!("{} answers without a runtime", cri.runtime()),
            Err(e) => e.to_string(),
        };
        if answer.contains("ebb can't reach the container runtime") {
            break answer;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "{answer}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(answer.contains("no-runtime.sock"), "{answer}");
}
