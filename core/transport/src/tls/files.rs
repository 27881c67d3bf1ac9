//! The files of a directory of credentials.

use std::io;
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use super::TlsError;

/// What a directory holds. Source: QEMU docs/system/tls.rst and include/crypto/tlscredsx509.h, for the names of the files.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) ca_path: PathBuf,
    pub(super) ca: Vec<CertificateDer<'static>>,
    pub(super) revoked: Vec<CertificateRevocationListDer<'static>>,
    /// Our own certificate with those between it and the authority, and its key.
    pub(super) own: Option<Own>,
}

#[derive(Debug)]
pub(super) struct Own {
    pub(super) path: PathBuf,
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key_path: PathBuf,
    pub(super) key: PrivateKeyDer<'static>,
}

impl Files {
    pub(super) fn of_server(dir: &Path) -> Result<Files, TlsError> {
        let (ca_path, ca) = authority(dir)?;
        let list = dir.join("ca-crl.pem");
        let revoked = match read_optional(&list)? {
            Some(bytes) => import("CRL", &list, &bytes)?,
            None => Vec::new(),
        };
        let (cert, key) = (dir.join("server-cert.pem"), dir.join("server-key.pem"));
        let own = Own::read(cert.clone(), key)?.ok_or_else(|| missing(cert))?;
        Ok(Files { ca_path, ca, revoked, own: Some(own) })
    }

    pub(super) fn of_client(dir: &Path) -> Result<Files, TlsError> {
        let (ca_path, ca) = authority(dir)?;
        let own = Own::read(dir.join("client-cert.pem"), dir.join("client-key.pem"))?;
        Ok(Files { ca_path, ca, revoked: Vec::new(), own })
    }
}

fn authority(dir: &Path) -> Result<(PathBuf, Vec<CertificateDer<'static>>), TlsError> {
    let path = dir.join("ca-cert.pem");
    let bytes = read_optional(&path)?.ok_or_else(|| missing(path.clone()))?;
    let found = import("CA certificate", &path, &bytes)?;
    Ok((path, found))
}

impl Own {
    /// `None`: neither is there. One without the other is a mistake.
    fn read(path: PathBuf, key_path: PathBuf) -> Result<Option<Own>, TlsError> {
        let (cert, key) = match (read_optional(&path)?, read_optional(&key_path)?) {
            (None, None) => return Ok(None),
            (None, Some(_)) => return Err(missing(path)),
            (Some(_), None) => return Err(missing(key_path)),
            (Some(cert), Some(key)) => (cert, key),
        };
        let chain = import("certificate", &path, &cert)?;
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| {
            let encrypted = String::from_utf8_lossy(&key).contains("ENCRYPTED");
            let why =
                if encrypted { "keys with a password are not supported".into() } else { pem_text(&error) };
            TlsError::Import { what: "private key", path: key_path.clone(), why }
        })?;
        Ok(Some(Own { path, chain, key_path, key }))
    }
}

fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, TlsError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TlsError::Access { path: path.to_owned(), error }),
    }
}

fn missing(path: PathBuf) -> TlsError {
    TlsError::Access { path, error: io::Error::from_raw_os_error(2) }
}

/// Everything of one kind that a file holds; at least one.
fn import<T: PemObject>(what: &'static str, path: &Path, bytes: &[u8]) -> Result<Vec<T>, TlsError> {
    let wrong = |why: String| TlsError::Import { what, path: path.to_owned(), why };
    let found = T::pem_slice_iter(bytes).collect::<Result<Vec<T>, _>>().map_err(|e| wrong(pem_text(&e)))?;
    if found.is_empty() { Err(wrong("there is none in the file".into())) } else { Ok(found) }
}

fn pem_text(error: &pem::Error) -> String {
    match error {
        pem::Error::NoItemsFound => "there is none in the file".into(),
        other => other.to_string(),
    }
}
