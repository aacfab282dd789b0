//! TLS and a bearer token, as a cluster's API server requires of pods.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use http::{HeaderMap, header};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

/// The credentials of a secured server and its clients.
pub(super) struct Secured {
    pub(super) acceptor: TlsAcceptor,
    /// The server's self-signed certificate, in PEM.
    certificate: String,
    token: String,
}

impl std::fmt::Debug for Secured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secured").finish_non_exhaustive()
    }
}

impl Secured {
    /// Makes a certificate for this address, and a token.
    pub(super) fn new(address: SocketAddr) -> io::Result<Self> {
        let made = rcgen::generate_simple_self_signed([address.ip().to_string()]);
        let made = made.map_err(io::Error::other)?;
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der());
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_single_cert(
                vec![made.cert.der().clone()],
                key.map_err(io::Error::other)?,
            )
            .map_err(io::Error::other)?;
        let random = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            certificate: made.cert.pem(),
            token: format!("token-of-{}", random.trim()),
        })
    }

    /// Whether the request has the token.
    pub(super) fn knows(&self, headers: &HeaderMap) -> bool {
        let given = headers.get(header::AUTHORIZATION);
        given.is_some_and(|given| *given == format!("Bearer {}", self.token))
    }

    /// Writes the files of `/var/run/secrets/kubernetes.io/serviceaccount`.
    pub(super) fn write(&self, directory: &Path) -> io::Result<()> {
        fs::write(directory.join("token"), &self.token)?;
        fs::write(directory.join("ca.crt"), &self.certificate)?;
        fs::write(directory.join("namespace"), "ebb-system")
    }
}
