//! Accepts, serves and resets the server's connections.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream as StdStream};
use std::sync::{Arc, Weak};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::{ServerShared, answer};

/// How the server fails connections after [`ApiServer::leave`](super::ApiServer::leave).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Away {
    /// No socket listens, so the kernel refuses connections.
    Refusing,
    /// The server accepts connections and resets them at once.
    Resetting,
}

#[derive(Debug)]
pub(super) enum ListenerCommand {
    Leave(Away),
    ComeBack,
}

/// Serves connections until it is aborted.
pub(super) async fn run(
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<ServerShared>,
    mut orders: mpsc::UnboundedReceiver<(ListenerCommand, oneshot::Sender<io::Result<()>>)>,
) {
    let mut listener = Some(listener);
    let mut resetting = false;
    let mut connections = OpenConnections::default();
    loop {
        tokio::select! {
            Some(stream) = next(listener.as_ref()) => {
                if resetting {
                    let _ = reset(&stream);
                } else if let Err(error) = connections.serve(stream, &shared) {
                    eprintln!("the simulated API server lost a connection: {error}");
                }
            }
            order = orders.recv() => {
                let Some((order, done)) = order else { return };
                let result = match order {
                    ListenerCommand::Leave(how) => {
                        resetting = how == Away::Resetting;
                        if how == Away::Refusing {
                            listener = None;
                        }
                        connections.cut().await;
                        Ok(())
                    }
                    ListenerCommand::ComeBack => {
                        resetting = false;
                        match listener {
                            Some(_) => Ok(()),
                            None => listen_again(address).await.map(|l| listener = Some(l)),
                        }
                    }
                };
                let _ = done.send(result);
            }
        }
    }
}

/// Listens on `address`, which this process has just stopped listening on. A child process that has been forked and has
/// not executed its program yet still has the old listener, so the address may be in use for a moment.
async fn listen_again(address: SocketAddr) -> io::Result<TcpListener> {
    let give_up = Instant::now() + Duration::from_secs(5);
    loop {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < give_up => {
                sleep(Duration::from_millis(20)).await;
            }
            result => return result,
        }
    }
}

/// Accepts the next connection. Pending without a listener.
async fn next(listener: Option<&TcpListener>) -> Option<TcpStream> {
    match listener {
        Some(listener) => listener.accept().await.ok().map(|(stream, _)| stream),
        None => std::future::pending().await,
    }
}

/// The open connections. Dropping it closes them.
#[derive(Default)]
struct OpenConnections {
    tasks: JoinSet<()>,
    /// Another descriptor of each socket, weak so that it keeps no finished connection open.
    open: Vec<Weak<StdStream>>,
}

impl OpenConnections {
    fn serve(&mut self, stream: TcpStream, shared: &Arc<ServerShared>) -> io::Result<()> {
        let stream = stream.into_std()?;
        let other = Arc::new(stream.try_clone()?);
        self.open.retain(|open| open.strong_count() > 0);
        self.open.push(Arc::downgrade(&other));
        let stream = TcpStream::from_std(stream)?;
        let shared = Arc::clone(shared);
        self.tasks.spawn(async move {
            // A client that disconnects or rejects the certificate is not an error of the server.
            match &shared.secured {
                None => talk(stream, &shared).await,
                Some(secured) => {
                    if let Ok(stream) = secured.acceptor.accept(stream).await {
                        talk(stream, &shared).await;
                    }
                }
            }
            drop(other);
        });
        while self.tasks.try_join_next().is_some() {}
        Ok(())
    }

    async fn cut(&mut self) {
        for stream in self.open.iter().filter_map(Weak::upgrade) {
            let _ = reset(&*stream);
        }
        self.tasks.shutdown().await;
        self.open.clear();
    }
}

async fn talk(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    shared: &Arc<ServerShared>,
) {
    let service = service_fn(|request| answer::answer(Arc::clone(shared), request));
    let served = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let _ = served.with_upgrades().await;
}

/// Makes the close of the socket's last descriptor send a reset.
fn reset(socket: impl std::os::fd::AsFd) -> io::Result<()> {
    Ok(rustix::net::sockopt::set_socket_linger(
        socket,
        Some(Duration::ZERO),
    )?)
}
