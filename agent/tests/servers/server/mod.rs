//! Servers from libraries, as programs for pods: this executable under other names. All listen on 8080.

mod grpc;
mod inetd;
pub(crate) mod web;
mod web_socket;

use std::{env, path::Path, process::ExitCode};

use anyhow::Result;
use tokio::runtime::Runtime;

pub(crate) use grpc::Text;

/// tonic, with slow calls.
pub(crate) const GRPC: &str = "ebb-servers-grpc";
/// axum, which is hyper.
pub(crate) const WEB: &str = "ebb-servers-web";
/// A server with two processes for each connection.
pub(crate) const INETD: &str = "ebb-servers-inetd";
/// tokio-tungstenite.
pub(crate) const WEB_SOCKET: &str = "ebb-servers-web-socket";

/// Runs the server that this process was started as, if it is one.
pub(crate) fn dispatch() -> Option<ExitCode> {
    let name = env::args_os().next()?;
    let served = match Path::new(&name).file_name()?.to_str()? {
        GRPC => run(grpc::serve()),
        INETD => inetd::serve(),
        WEB => run(web::serve()),
        WEB_SOCKET => run(web_socket::serve()),
        _ => return None,
    };
    served.unwrap();
    Some(ExitCode::SUCCESS)
}

fn run(server: impl Future<Output = Result<()>>) -> Result<()> {
    Runtime::new()?.block_on(server)
}

/// The number that is argument `n`, or 0.
fn argument(n: usize) -> u64 {
    let argument = env::args().nth(n);
    argument.and_then(|text| text.parse().ok()).unwrap_or(0)
}
