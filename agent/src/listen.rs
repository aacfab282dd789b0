//! Where the agent and the proxy listen: a unix socket that systemd keeps for them, or one that they bind.
//!
//! A socket file outlives the process that bound it, and nobody can bind over it: the file of a proxy that
//! was killed has to be removed, the one of a proxy that is alive must not be. Asking is by connecting.
//! Two proxies that start at once could both find a stale file, and the second would remove the first
//! one's new one; so they take turns, by a lock on the directory.

use std::{
    fs::{self, DirBuilder, File, Permissions, TryLockError},
    io,
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use listenfd::ListenFd;
use rustix::net::sockopt::socket_acceptconn;
use tokio::net::{UnixListener, UnixStream};

/// How long to wait for another process that is about to listen at the same place.
const TURN: Duration = Duration::from_secs(2);

/// How long a connect to an existing socket may take. A process that is too busy to accept is alive.
const ALIVE: Duration = Duration::from_millis(500);

/// Why it can't listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody else is there.
    #[error(
        "{} is already served by another process: stop it first, or choose another path (`ss -lxp` \
         shows whose it is)",
        .0.display()
    )]
    AlreadyServed(PathBuf),
    /// The path is taken by something that is not ours to remove.
    #[error("{} exists and is not a socket: remove it, or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// Another process is about to listen in the same directory and does not get done.
    #[error("another process keeps {} locked: is a second proxy starting there?", .0.display())]
    Busy(PathBuf),
    /// Something about the path or the file system.
    #[error("can't {what} {}", .path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// systemd passed something that is not a socket to accept connections from.
    #[error(
        "the socket passed by systemd is not a listening unix stream socket: the socket unit needs \
         ListenStream= with a path"
    )]
    NotAListener(#[source] io::Error),
    /// systemd passed more than one.
    #[error("systemd passed {0} sockets, and one is served: the socket unit has too many")]
    TooMany(usize),
}

/// A socket to serve, and the file to remove afterwards, if it is ours.
#[derive(Debug)]
pub struct Listening {
    /// To accept from.
    pub listener: UnixListener,
    /// Removes the socket file when it is dropped. None for a socket of systemd's.
    pub file: Option<SocketFile>,
}

/// A socket file of this process. Removed on drop, unless another process has put its own there.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.identity) {
            // If it can't be removed, the next start takes it over.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens on systemd's socket if there is one (`LISTEN_FDS`), else at `path`.
pub async fn listen(path: &Path) -> Result<Listening, ListenError> {
    match from_systemd()? {
        Some(listening) => Ok(listening),
        None => bind(path).await,
    }
}

/// The socket that systemd passed to this process, if it did. Needs a tokio runtime.
pub fn from_systemd() -> Result<Option<Listening>, ListenError> {
    let mut passed = ListenFd::from_env();
    if passed.len() > 1 {
        return Err(ListenError::TooMany(passed.len()));
    }
    let Some(listener) = passed
        .take_unix_listener(0)
        .map_err(ListenError::NotAListener)?
    else {
        return Ok(None);
    };
    listening(listener)
        .map(|listener| {
            Some(Listening {
                listener,
                file: None,
            })
        })
        .map_err(ListenError::NotAListener)
}

/// Binds `path`, for root only, and makes its directory if need be. Takes over the file of a process
/// that is gone. Needs a tokio runtime.
pub async fn bind(path: &Path) -> Result<Listening, ListenError> {
    let failed = |what| {
        move |source| ListenError::Io {
            what,
            path: path.to_owned(),
            source,
        }
    };
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)
        .map_err(failed("make the directory of"))?;
    let _turn = turn(directory).await?;
    remove_stale(path).await?;
    let listener = std::os::unix::net::UnixListener::bind(path).map_err(failed("listen at"))?;
    let metadata = fs::symlink_metadata(path).map_err(failed("look at"))?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: (metadata.dev(), metadata.ino()),
    };
    // Until here it had the umask's permissions, which let nobody but the owner write, and so connect,
    // unless somebody asked for that.
    fs::set_permissions(path, Permissions::from_mode(0o600))
        .map_err(failed("set the permissions of"))?;
    let listener = listening(listener).map_err(failed("listen at"))?;
    Ok(Listening {
        listener,
        file: Some(file),
    })
}

fn listening(listener: std::os::unix::net::UnixListener) -> io::Result<UnixListener> {
    if !socket_acceptconn(listener.as_fd())? {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the socket does not listen",
        ));
    }
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Waits for this process's turn to change sockets in `directory`; it ends when the file is dropped.
async fn turn(directory: &Path) -> Result<File, ListenError> {
    let failed = |source| ListenError::Io {
        what: "lock the directory",
        path: directory.to_owned(),
        source,
    };
    let lock = File::open(directory).map_err(failed)?;
    let started = Instant::now();
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
            Err(TryLockError::WouldBlock) if started.elapsed() > TURN => {
                return Err(ListenError::Busy(directory.to_owned()));
            }
            Err(TryLockError::WouldBlock) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |what| {
        move |source| ListenError::Io {
            what,
            path: path.to_owned(),
            source,
        }
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at")(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match tokio::time::timeout(ALIVE, UnixStream::connect(path)).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove the stale socket"))
        }
        // Removed by its owner in between.
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // A full queue is a process that is alive.
        Ok(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => {
            Err(failed("connect to")(error))
        }
        _ => Err(ListenError::AlreadyServed(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;
    use tokio::io::AsyncReadExt;

    use super::*;

    fn place() -> (TempDir, PathBuf) {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("run/ebb/cri.sock");
        (directory, path)
    }

    #[tokio::test]
    async fn binds_for_root_only_and_removes_its_file() {
        let (_directory, path) = place();
        let listening = bind(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(listening);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn takes_over_a_stale_socket() {
        let (_directory, path) = place();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listening = bind(&path).await.unwrap();
        UnixStream::connect(&path).await.unwrap();
        drop(listening);
    }

    #[tokio::test]
    async fn leaves_a_live_socket_alone() {
        let (_directory, path) = place();
        let first = bind(&path).await.unwrap();
        let error = bind(&path).await.unwrap_err();
        assert!(matches!(error, ListenError::AlreadyServed(_)), "{error}");
        assert!(
            error
                .to_string()
                .contains("already served by another process")
        );
        UnixStream::connect(&path).await.unwrap();
        drop(first);
    }

    #[tokio::test]
    async fn of_many_that_find_a_stale_socket_one_gets_it() {
        let (_directory, path) = place();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let all = futures_util::future::join_all((0..20).map(|_| bind(&path))).await;
        assert_eq!(all.iter().filter(|r| r.is_ok()).count(), 1);
        UnixStream::connect(&path).await.unwrap();
    }

    #[tokio::test]
    async fn leaves_what_is_not_a_socket_alone() {
        let (directory, path) = place();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path).await, Err(ListenError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        assert!(matches!(
            bind(directory.path()).await,
            Err(ListenError::NotASocket(_))
        ));
    }

    #[tokio::test]
    async fn does_not_remove_the_file_of_a_successor() {
        let (_directory, path) = place();
        let first = bind(&path).await.unwrap();
        fs::remove_file(&path).unwrap();
        let second = bind(&path).await.unwrap();
        drop(first);
        UnixStream::connect(&path).await.unwrap();
        drop(second);
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_is_an_error_that_names_it() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("x".repeat(150));
        let error = bind(&path).await.unwrap_err();
        assert!(
            matches!(
                error,
                ListenError::Io {
                    what: "listen at",
                    ..
                }
            ),
            "{error}"
        );
    }

    /// Runs this test again as systemd would start a service, with `passed` as its third descriptor.
    fn activated(role: &str, passed: std::os::fd::OwnedFd) -> std::process::Child {
        let test = concat!(module_path!(), "::serves_the_socket_that_systemd_keeps");
        let (_crate, test) = test.split_once("::").unwrap();
        std::process::Command::new("sh")
            .arg("-c")
            .arg(r#"exec 3<&0; LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" --exact --nocapture "$1""#)
            .arg(std::env::current_exe().unwrap())
            .arg(test)
            .env("EBB_TEST_ACTIVATED", role)
            .stdin(passed)
            .spawn()
            .unwrap()
    }

    #[tokio::test]
    async fn serves_the_socket_that_systemd_keeps() {
        match std::env::var("EBB_TEST_ACTIVATED").as_deref() {
            Ok("socket") => {
                let listening = listen(Path::new("/nowhere/at/all")).await.unwrap();
                assert!(listening.file.is_none());
                listening.listener.accept().await.unwrap();
                return;
            }
            Ok(_) => {
                assert!(matches!(from_systemd(), Err(ListenError::NotAListener(_))));
                return;
            }
            Err(_) => assert!(from_systemd().unwrap().is_none()),
        }
        let (_directory, path) = place();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let kept = std::os::unix::net::UnixListener::bind(&path).unwrap();
        // Connected before anybody serves: it waits in the socket's queue.
        let mut early = UnixStream::connect(&path).await.unwrap();
        for _ in 0..2 {
            let mut child = activated("socket", kept.try_clone().unwrap().into());
            let _client = UnixStream::connect(&path).await.unwrap();
            assert!(child.wait().unwrap().success());
            assert!(path.exists());
        }
        // Accepted and closed, where one still in the queue would go on waiting.
        assert_eq!(early.read(&mut [0]).await.unwrap(), 0);
        let (connected, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(
            activated("connected", connected.into())
                .wait()
                .unwrap()
                .success()
        );
        let file = File::open("/dev/null").unwrap();
        assert!(activated("file", file.into()).wait().unwrap().success());
    }
}
