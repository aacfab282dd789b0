//! The server's connections: accepted, served, and cut when it goes away.

use std::io;
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

use super::{Shared, answer};

/// How a server is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Away {
    /// Nobody listens: connections are refused.
    Refusing,
    /// Connections are made, and reset at once.
    Resetting,
}

#[derive(Debug)]
pub(super) enum Order {
    Leave(Away),
    ComeBack,
}

/// Serves connections until it is aborted.
pub(super) async fn run(
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Shared>,
    mut orders: mpsc::UnboundedReceiver<(Order, oneshot::Sender<io::Result<()>>)>,
) {
    let mut listener = Some(listener);
    let mut resetting = false;
    let mut connections = Connections::default();
    loop {
        tokio::select! {
            Some(stream) = next(listener.as_ref()) => {
                if resetting {
                    let _ = reset(&stream);
                } else if let Err(error) = connections.serve(stream, &shared) {
                    eprintln!("the stand-in for the API server lost a connection: {error}");
                }
            }
            order = orders.recv() => {
                let Some((order, done)) = order else { return };
                let result = match order {
                    Order::Leave(how) => {
                        resetting = how == Away::Resetting;
                        if how == Away::Refusing {
                            listener = None;
                        }
                        connections.cut().await;
                        Ok(())
                    }
                    Order::ComeBack => {
                        resetting = false;
                        match listener {
                            Some(_) => Ok(()),
                            None => TcpListener::bind(address).await.map(|l| listener = Some(l)),
                        }
                    }
                };
                let _ = done.send(result);
            }
        }
    }
}

/// The next connection. Never, while nobody listens.
async fn next(listener: Option<&TcpListener>) -> Option<TcpStream> {
    match listener {
        Some(listener) => listener.accept().await.ok().map(|(stream, _)| stream),
        None => std::future::pending().await,
    }
}

/// Those that are open; all end with it.
#[derive(Default)]
struct Connections {
    tasks: JoinSet<()>,
    /// Another descriptor of each socket. It must not keep one open that is done.
    open: Vec<Weak<StdStream>>,
}

impl Connections {
    fn serve(&mut self, stream: TcpStream, shared: &Arc<Shared>) -> io::Result<()> {
        let stream = stream.into_std()?;
        let other = Arc::new(stream.try_clone()?);
        self.open.retain(|open| open.strong_count() > 0);
        self.open.push(Arc::downgrade(&other));
        let stream = TcpStream::from_std(stream)?;
        let shared = Arc::clone(shared);
        self.tasks.spawn(async move {
            // A client that leaves, or does not trust the server, is no failure of the server.
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

async fn talk(stream: impl AsyncRead + AsyncWrite + Unpin, shared: &Arc<Shared>) {
    let service = service_fn(|request| answer::answer(Arc::clone(shared), request));
    let served = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let _ = served.await;
}

/// Makes the socket's last close a reset.
fn reset(socket: impl std::os::fd::AsFd) -> io::Result<()> {
    Ok(rustix::net::sockopt::set_socket_linger(
        socket,
        Some(Duration::ZERO),
    )?)
}
