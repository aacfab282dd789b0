//! A server like inetd: `cat` serves each connection, and its parent keeps the connection open, too.

use std::{
    net::TcpListener,
    os::fd::OwnedFd,
    process::{Command, Stdio},
    thread,
};

use anyhow::Result;

pub(super) fn serve() -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", 8080))?;
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || {
            let ends = (stream.try_clone(), stream.try_clone());
            let (stdin, stdout): (OwnedFd, OwnedFd) = (ends.0?.into(), ends.1?.into());
            let status = Command::new("cat")
                .stdin(Stdio::from(stdin))
                .stdout(Stdio::from(stdout))
                .status();
            drop(stream);
            status
        });
    }
    Ok(())
}
