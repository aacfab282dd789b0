//! A web server that logs each request when it handles it.

use std::{fs::OpenOptions, io::Write as _, sync::Mutex, time::Duration};

use anyhow::Result;
use axum::{Router, extract::RawQuery, routing::get};
use tokio::net::TcpListener;

/// The log. Each line is the query of a request.
pub(crate) const LOG: &str = "access";

pub(super) async fn serve() -> Result<()> {
    let log = OpenOptions::new().create(true).append(true).open(LOG)?;
    let log: &Mutex<_> = Box::leak(Box::new(Mutex::new(log)));
    let note = move |query: Option<String>| {
        let mut line = query.unwrap_or_default();
        line.push('\n');
        log.lock().unwrap().write_all(line.as_bytes()).unwrap();
    };
    let app = Router::new()
        .route(
            "/",
            get(async move |RawQuery(query): RawQuery| {
                note(query);
                "hello"
            }),
        )
        .route(
            "/slow",
            get(async move |RawQuery(query): RawQuery| {
                note(query);
                tokio::time::sleep(Duration::from_millis(300)).await;
                "hello"
            }),
        );
    let listener = TcpListener::bind(("0.0.0.0", 8080)).await?;
    Ok(axum::serve(listener, app).await?)
}
