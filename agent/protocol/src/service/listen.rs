//! The unix socket on which the agent or the proxy listens: systemd passes it, or the process binds it.
//!
//! A socket file outlives the process that bound it, and no other process can bind the same path. So a new process
//! removes the file of a process that was killed, but not that of a live one; a connect shows which it is. Two
//! processes that start at once could both find a stale file, and the second would remove the first one's new file;
//! so each takes a lock of the directory first. The agent locks its run directory anyway, and systemd starts only one
//! proxy, but neither protects a proxy that is started by hand. The lock is a file that only root can open: any process
//! that may read a file or a directory may also lock it.

use std::{
    fs::{self, DirBuilder, File, Permissions, TryLockError},
    io,
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use listenfd::ListenFd;
use rustix::net::sockopt::socket_acceptconn;
use tokio::net::{UnixListener, UnixStream};

/// The name of a directory's lock file, which exists while a process is binding a socket there.
const LOCK: &str = "listen.lock";

/// How long to wait for another process that holds the directory's lock.
const LOCK_WITHIN: Duration = Duration::from_secs(2);

/// How long a connect to an existing socket may take. A process that is too busy to accept is alive.
const CONNECT_WITHIN: Duration = Duration::from_millis(500);

/// Why a process can't listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process serves the path.
    #[error(
        "{} is already served by another process: stop it first, or choose another path (`ss -lxp` \
         shows whose it is)",
        .0.display()
    )]
    AlreadyServed(PathBuf),
    /// The path exists and is not a socket.
    #[error("{} exists and is not a socket: remove it, or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// Another process keeps the directory locked.
    #[error("another process keeps {} locked: is a second proxy starting there?", .0.display())]
    Busy(PathBuf),
    /// A file system operation failed.
    #[error("can't {what} {}", .path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Its error.
        source: io::Error,
    },
    /// systemd passed something else than a listening unix stream socket.
    #[error(
        "the socket passed by systemd is not a listening unix stream socket: the socket unit needs \
         ListenStream= with a path"
    )]
    NotAListener(#[source] io::Error),
    /// systemd passed more than one socket.
    #[error(
        "systemd passed {0} sockets, but only one is served: remove the others from the socket unit"
    )]
    TooMany(usize),
}

impl ListenError {
    /// The exit status of the process: 8 if another process serves the socket, else 7.
    pub const fn exit_status(&self) -> u8 {
        match self {
            Self::AlreadyServed(_) | Self::Busy(_) => 8,
            Self::NotASocket(_) | Self::Io { .. } | Self::NotAListener(_) | Self::TooMany(_) => 7,
        }
    }
}

/// A listening socket, and its file if this process made it.
#[derive(Debug)]
pub struct Listening {
    /// The listening socket.
    pub listener: UnixListener,
    /// Removes the socket file on drop. `None` for a socket from systemd.
    pub file: Option<SocketFile>,
}

/// The socket file of this process. Removed on drop, unless another process has replaced it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.identity) {
            // If this fails, the next process to start removes it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens on the socket from systemd if there is one (`LISTEN_FDS`), else at `path`.
pub async fn listen(path: &Path) -> Result<Listening, ListenError> {
    match from_systemd()? {
        Some(listening) => Ok(listening),
        None => bind(path).await,
    }
}

/// The socket that systemd passed to this process, if any. Needs a tokio runtime.
fn from_systemd() -> Result<Option<Listening>, ListenError> {
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

/// Binds `path`, for root only, and makes its directory if needed. Replaces a stale file. Needs a tokio runtime.
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
    let _lock = lock(directory).await?;
    remove_stale(path).await?;
    let listener = std::os::unix::net::UnixListener::bind(path).map_err(failed("listen at"))?;
    let metadata = fs::symlink_metadata(path).map_err(failed("read the state of"))?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: (metadata.dev(), metadata.ino()),
    };
    // Until here it had the umask's permissions. With the usual umask only the owner may write, and so connect.
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

/// The lock of a directory. Removed and released on drop.
#[derive(Debug)]
struct DirectoryLock {
    path: PathBuf,
    _file: File,
}

impl Drop for DirectoryLock {
    fn drop(&mut self) {
        // Still locked, so it is this process's file. If it stays, the next process locks it.
        let _ = fs::remove_file(&self.path);
    }
}

/// Waits for the lock of `directory`.
async fn lock(directory: &Path) -> Result<DirectoryLock, ListenError> {
    let path = directory.join(LOCK);
    let failed = |source| ListenError::Io {
        what: "lock the directory",
        path: directory.to_owned(),
        source,
    };
    let started = Instant::now();
    loop {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) if is_at(&file, &path).map_err(failed)? => {
                return Ok(DirectoryLock { path, _file: file });
            }
            // The process that had it locked has removed it since.
            Ok(()) => {}
            Err(TryLockError::Error(error)) => return Err(failed(error)),
            Err(TryLockError::WouldBlock) if started.elapsed() > LOCK_WITHIN => {
                return Err(ListenError::Busy(directory.to_owned()));
            }
            Err(TryLockError::WouldBlock) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Whether `path` leads to this open file.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((open.dev(), open.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
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
        Err(error) => return Err(failed("read the state of")(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match tokio::time::timeout(CONNECT_WITHIN, UnixStream::connect(path)).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove the stale socket"))
        }
        // Its owner has just removed it.
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // A full accept queue (EAGAIN) means that its process is alive.
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

    fn socket_path() -> (TempDir, PathBuf) {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("run/ebb/cri.sock");
        (directory, path)
    }

    #[tokio::test]
    async fn binds_for_root_only_and_removes_its_file() {
        let (_directory, path) = socket_path();
        let listening = bind(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(listening);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn its_lock_is_for_root_only_and_is_gone_afterwards() {
        let (_directory, path) = socket_path();
        let run = path.parent().unwrap();
        fs::create_dir_all(run).unwrap();
        let held = lock(run).await.unwrap();
        let mode = fs::metadata(run.join(LOCK)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(bind(&path).await, Err(ListenError::Busy(_))));
        drop(held);
        // Any user who may read the directory can lock it, and must not keep the process from listening.
        let directory = File::open(run).unwrap();
        directory.lock().unwrap();
        let _listening = bind(&path).await.unwrap();
        assert!(!run.join(LOCK).exists());
    }

    #[tokio::test]
    async fn takes_over_a_stale_socket() {
        let (_directory, path) = socket_path();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listening = bind(&path).await.unwrap();
        UnixStream::connect(&path).await.unwrap();
        drop(listening);
    }

    #[tokio::test]
    async fn keeps_the_socket_of_a_live_process() {
        let (_directory, path) = socket_path();
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
    async fn of_many_processes_that_find_a_stale_socket_one_binds_it() {
        let (_directory, path) = socket_path();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let all = futures_util::future::join_all((0..20).map(|_| bind(&path))).await;
        assert_eq!(all.iter().filter(|r| r.is_ok()).count(), 1);
        UnixStream::connect(&path).await.unwrap();
    }

    #[tokio::test]
    async fn keeps_a_file_that_is_not_a_socket() {
        let (directory, path) = socket_path();
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
        let (_directory, path) = socket_path();
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

    /// Runs this test again as systemd starts a service, with `passed` as descriptor 3.
    fn activated(role: &str, passed: std::os::fd::OwnedFd) -> std::process::Child {
        let test = concat!(module_path!(), "::serves_the_socket_that_systemd_passes");
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
    async fn serves_the_socket_that_systemd_passes() {
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
        let (_directory, path) = socket_path();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let kept = std::os::unix::net::UnixListener::bind(&path).unwrap();
        // Connected before any process accepts, so it waits in the accept queue.
        let mut early = UnixStream::connect(&path).await.unwrap();
        for _ in 0..2 {
            let mut child = activated("socket", kept.try_clone().unwrap().into());
            let _client = UnixStream::connect(&path).await.unwrap();
            assert!(child.wait().unwrap().success());
            assert!(path.exists());
        }
        // A child accepted and closed it. In the queue it would still wait.
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
