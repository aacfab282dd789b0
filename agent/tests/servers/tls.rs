//! TLS 1.3: the server sends last before the first request, because it sends session tickets.

use std::{fs, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use ebb_core::flow::FlowState::{Awaiting, Idle};
use rcgen::generate_simple_self_signed;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, ProtocolVersion, RootCertStore, pki_types::ServerName},
};

use crate::support::{
    drains::{IDLE_AFTER, TIMEOUT, until_idle},
    pod::Pod,
    until_table::{Effect, has_row},
};

ebb_testkit::trials![tls_a_fresh_connection_is_idle_and_a_request_in_flight_is_awaiting];

fn tls_a_fresh_connection_is_idle_and_a_request_in_flight_is_awaiting() -> Result<()> {
    // Before the pod, because nginx reads the files.
    let key = generate_simple_self_signed(["web.test".to_owned()])?;
    let files = tempfile::tempdir()?;
    let (cert_file, key_file) = (files.path().join("cert"), files.path().join("key"));
    fs::write(&cert_file, key.cert.pem())?;
    fs::write(&key_file, key.signing_key.serialize_pem())?;
    let mut roots = RootCertStore::empty();
    roots.add(key.cert.der().clone())?;
    let ring = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(ring)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let nginx = format!(
        "server {{
            listen 8080 ssl; ssl_certificate {}; ssl_certificate_key {}; ssl_protocols TLSv1.3;
            location / {{ proxy_pass http://127.0.0.1:9000/; }}
        }}",
        cert_file.display(),
        key_file.display()
    );
    Pod::nginx(&nginx)?.with_clients(async move |pod| {
        let tcp = TcpStream::connect(pod.at(8080)).await?;
        let name = ServerName::try_from("web.test")?;
        let mut client = TlsConnector::from(Arc::new(config))
            .connect(name, tcp)
            .await?;
        let version = client.get_ref().1.protocol_version();
        ensure!(version == Some(ProtocolVersion::TLSv1_3), "{version:?}");
        pod.is_active().await?;
        pod.becomes(Idle).await?;
        has_row(
            "TLS 1.3: handshake done, nothing asked",
            Idle,
            &Effect::CutHarmlessly,
        )?;

        client
            .write_all(b"GET /slow?ms=4000 HTTP/1.1\r\nHost: x\r\n\r\n")
            .await?;
        pod.becomes(Awaiting).await?;
        let drain = pod.drain(until_idle()).await;
        pod.stays(Awaiting, 2 * IDLE_AFTER).await?;
        drain.is_held().await?;
        let mut answer = [0; 4096];
        let n = timeout(TIMEOUT, client.read(&mut answer)).await?;
        ensure!(answer[..n.context("no answer")?].starts_with(b"HTTP/1.1 200"));
        pod.becomes(Idle).await?;
        drain.drained(1).await?;
        Ok(())
    })
}
