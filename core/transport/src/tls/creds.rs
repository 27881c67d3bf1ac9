//! Credentials: which directory, for which end, and what is made of it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::files::{Files, Own};
use super::{TlsError, sanity, trust};

/// Which end of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Endpoint {
    /// Whoever accepts.
    Server,
    /// Whoever connects.
    #[default]
    Client,
}

impl Endpoint {
    /// `server` or `client`.
    pub fn name(self) -> &'static str {
        match self {
            Endpoint::Server => "server",
            Endpoint::Client => "client",
        }
    }
}

/// A directory of certificates, as QEMU's object `tls-creds-x509` describes it.
///
/// | file | end | must it be there? |
/// |---|---|---|
/// | `ca-cert.pem` | both | yes |
/// | `server-cert.pem`, `server-key.pem` | server | yes |
/// | `ca-crl.pem` | server | no |
/// | `client-cert.pem`, `client-key.pem` | client | no, but one without the other is a mistake |
///
/// `dh-params.pem` is not looked at: the groups for the exchange of keys are fixed nowadays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsCreds {
    /// The directory.
    pub dir: PathBuf,
    /// Which end they are for.
    pub endpoint: Endpoint,
    /// Must the other side show a certificate of the authority? Default: yes.
    pub verify_peer: bool,
    /// Are the certificates checked when they are loaded? Default: yes.
    pub sanity_check: bool,
}

/// What a server upgrades its connections with.
#[derive(Clone)]
pub struct ServerTls(pub(super) Arc<ServerConfig>);

/// What a client upgrades its connections with.
#[derive(Clone)]
pub struct ClientTls {
    pub(super) config: Arc<ClientConfig>,
    verify_peer: bool,
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerTls")
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientTls")
    }
}

impl TlsCreds {
    /// Credentials of `dir` with everything else as QEMU has it by default.
    pub fn new(dir: impl Into<PathBuf>, endpoint: Endpoint) -> TlsCreds {
        TlsCreds { dir: dir.into(), endpoint, verify_peer: true, sanity_check: true }
    }

    /// Loads what a server needs. It reads files.
    ///
    /// Errors: [`TlsError`], also if the credentials are for a client.
    pub fn server(&self) -> Result<ServerTls, TlsError> {
        if self.endpoint != Endpoint::Server {
            return Err(TlsError::Endpoint { expected: Endpoint::Server.name() });
        }
        let (mut files, provider) = (Files::of_server(&self.dir)?, Arc::new(ring::default_provider()));
        self.check(&files, &provider)?;
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .expect("the library has what it prefers");
        let builder = if self.verify_peer {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots(&files)?, provider)
                .with_crls(std::mem::take(&mut files.revoked))
                // As everywhere else: a list says who is revoked, and nothing of those that are not in it.
                .allow_unknown_revocation_status()
                .build()
                .map_err(|error| wrong_ca(&files, &error))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let Own { path, chain, key_path, key } = files.own.expect("a server without certificate was refused");
        let config = builder.with_single_cert(chain, key).map_err(|error| TlsError::Certificate {
            text: format!(
                "Cannot load certificate '{}' & key '{}': {error}",
                path.display(),
                key_path.display()
            ),
        })?;
        Ok(ServerTls(Arc::new(config)))
    }

    /// Loads what a client needs. It reads files.
    ///
    /// Errors: [`TlsError`], also if the credentials are for a server.
    pub fn client(&self) -> Result<ClientTls, TlsError> {
        if self.endpoint != Endpoint::Client {
            return Err(TlsError::Endpoint { expected: Endpoint::Client.name() });
        }
        let (files, provider) = (Files::of_client(&self.dir)?, Arc::new(ring::default_provider()));
        self.check(&files, &provider)?;
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .expect("the library has what it prefers");
        let builder = if self.verify_peer {
            let verifier = WebPkiServerVerifier::builder_with_provider(roots(&files)?, provider)
                .build()
                .map_err(|error| wrong_ca(&files, &error))?;
            builder.dangerous().with_custom_certificate_verifier(verifier)
        } else {
            builder.dangerous().with_custom_certificate_verifier(trust::anybody(provider))
        };
        let config = match files.own {
            None => builder.with_no_client_auth(),
            Some(Own { path, chain, key_path, key }) => {
                builder.with_client_auth_cert(chain, key).map_err(|error| TlsError::Certificate {
                    text: format!(
                        "Cannot load certificate '{}' & key '{}': {error}",
                        path.display(),
                        key_path.display()
                    ),
                })?
            }
        };
        Ok(ClientTls { config: Arc::new(config), verify_peer: self.verify_peer })
    }

    fn check(&self, files: &Files, provider: &CryptoProvider) -> Result<(), TlsError> {
        match self.sanity_check {
            true => sanity::check(files, self.endpoint, provider, UnixTime::now()),
            false => Ok(()),
        }
    }
}

impl ClientTls {
    /// The name that a server's certificate has to have: `given`, which is a host name or an IP address.
    ///
    /// Errors: it is neither; or none is given, though servers are verified.
    pub(super) fn server_name(&self, given: Option<&str>) -> Result<ServerName<'static>, TlsError> {
        match given {
            Some(name) => ServerName::try_from(name.to_owned())
                .map_err(|_| TlsError::Hostname { name: name.to_owned() }),
            None if self.verify_peer => Err(TlsError::NoHostname),
            None => Ok(ServerName::try_from("localhost").expect("it is a name")),
        }
    }

    /// Whether a connection can be upgraded with this name, before there is one. See [`TlsError::NoHostname`].
    pub fn check_name(&self, given: Option<&str>) -> Result<(), TlsError> {
        self.server_name(given).map(drop)
    }
}

fn roots(files: &Files) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for ca in &files.ca {
        roots.add(ca.clone()).map_err(|error| wrong_ca(files, &error))?;
    }
    Ok(Arc::new(roots))
}

fn wrong_ca(files: &Files, error: &dyn fmt::Display) -> TlsError {
    TlsError::Import { what: "CA certificate", path: files.ca_path.clone(), why: error.to_string() }
}
