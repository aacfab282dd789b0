//! Paths of unix sockets, as users and kubelets write them.

use std::path::{Component, Path, PathBuf};

/// Where the CRI proxy listens.
pub const PROXY: &str = "/run/ebb/cri.sock";

/// Where the CRI proxy listens in front of CRI-O: the kubelet recognises CRI-O by the end of this path.
pub const PROXY_OF_CRIO: &str = "/run/ebb/run/crio/crio.sock";

/// The only scheme of a socket's address, as in the kubelet's `containerRuntimeEndpoint`.
const SCHEME: &str = "unix://";

/// Parses the path of a unix socket: `/run/x.sock`, or `unix:///run/x.sock` as in the kubelet's configuration. For
/// flags and environment variables.
///
/// # Errors
///
/// The path is relative, is a directory's, or has another scheme. The text says what to write.
pub fn parse(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix(SCHEME).unwrap_or(text);
    if let Some((scheme, _)) = path.split_once("://") {
        return Err(format!(
            "{scheme}:// is no unix socket; write its path, as in /run/containerd/containerd.sock or \
             unix:///run/containerd/containerd.sock"
        ));
    }
    if !path.starts_with('/') {
        return Err(
            "not an absolute path; write it from the root, as in /run/containerd/containerd.sock or \
             unix:///run/containerd/containerd.sock"
                .into(),
        );
    }
    let names_a_file = matches!(
        Path::new(path).components().next_back(),
        Some(Component::Normal(_))
    );
    if !names_a_file || path.ends_with('/') {
        return Err("the path of a directory; write the path of the socket in it".into());
    }
    Ok(path.into())
}

/// Whether two paths name the same socket: `/var/run` is a link to `/run`.
pub fn same(a: &Path, b: &Path) -> bool {
    let plain = |p: &Path| match p.strip_prefix("/var/run") {
        Ok(rest) => Path::new("/run").join(rest),
        Err(_) => p.to_owned(),
    };
    plain(a) == plain(b)
}

/// Whether the CRI proxy listens at this path by default.
pub fn is_proxy(path: &Path) -> bool {
    [PROXY, PROXY_OF_CRIO]
        .iter()
        .any(|proxy| same(path, Path::new(proxy)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_an_absolute_path_with_or_without_the_scheme() {
        let socket = Ok(PathBuf::from("/run/x.sock"));
        assert_eq!(parse("/run/x.sock"), socket);
        assert_eq!(parse("unix:///run/x.sock"), socket);
        for (text, says) in [
            ("", "absolute"),
            ("x.sock", "absolute"),
            ("./run/x.sock", "absolute"),
            ("unix://run/x.sock", "absolute"),
            ("unix:/run/x.sock", "absolute"),
            ("unix://", "absolute"),
            ("tcp://127.0.0.1:1", "tcp://"),
            ("unix://unix:///run/x.sock", "unix://"),
            ("npipe:////./pipe/x", "npipe://"),
            ("/", "directory"),
            ("/run/", "directory"),
            ("/run/..", "directory"),
        ] {
            let why = parse(text).unwrap_err();
            assert!(why.contains(says), "{text}: {why}");
        }
    }

    #[test]
    fn var_run_is_run() {
        assert!(same(Path::new("/var/run/x.sock"), Path::new("/run/x.sock")));
        assert!(is_proxy(Path::new("/var/run/ebb/cri.sock")));
        assert!(!is_proxy(Path::new("/run/containerd/containerd.sock")));
    }
}
