//! Whether credentials can do what they are for, before anybody connects: a server that starts with an expired
//! certificate would refuse every client, and none could say why.
//!
//! Source: QEMU crypto/tlscredsx509.c, for what is checked and how it is said.

use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, Error, KeyUsage, anchor_from_trusted_cert};

use super::files::{Files, Own};
use super::{Endpoint, TlsError};

/// Checks the authority, and our own certificate against it.
pub(super) fn check(
    files: &Files,
    endpoint: Endpoint,
    provider: &CryptoProvider,
    now: UnixTime,
) -> Result<(), TlsError> {
    let ca_path = files.ca_path.display();
    for ca in &files.ca {
        // An authority is none of those that may stand at the end of a chain: this is what the verifier should say of it, once
        // its time is right.
        match verify(ca, &[], std::slice::from_ref(ca), endpoint, provider, now) {
            Err(Error::CaUsedAsEndEntity) => {}
            Err(Error::CertExpired { .. }) => {
                return Err(said(format!("The CA certificate {ca_path} has expired")));
            }
            Err(Error::CertNotValidYet { .. }) => {
                return Err(said(format!("The CA certificate {ca_path} is not yet active")));
            }
            Err(Error::BadDer | Error::BadDerTime | Error::UnsupportedCertVersion) => {
                return Err(said(format!(
                    "The CA certificate {ca_path} is no X.509 certificate of version 3"
                )));
            }
            _ => {
                let text = format!("The CA certificate {ca_path} basic constraints do not show a CA");
                return Err(said(text));
            }
        }
    }
    files.own.as_ref().map_or(Ok(()), |own| check_own(own, files, endpoint, provider, now))
}

fn check_own(
    own: &Own,
    files: &Files,
    endpoint: Endpoint,
    provider: &CryptoProvider,
    now: UnixTime,
) -> Result<(), TlsError> {
    let (path, role) = (own.path.display(), endpoint.name());
    let (first, between) = own.chain.split_first().expect("a file without certificates was refused");
    let Err(error) = verify(first, between, &files.ca, endpoint, provider, now) else { return Ok(()) };
    Err(said(match error {
        Error::CertExpired { .. } => format!("The {role} certificate {path} has expired"),
        Error::CertNotValidYet { .. } => format!("The {role} certificate {path} is not yet active"),
        Error::CaUsedAsEndEntity => {
            format!("The certificate {path} basic constraints show a CA, but we need one for a {role}")
        }
        Error::RequiredEkuNotFoundContext(_) => {
            format!("Certificate {path} purpose does not allow use with a TLS {role}")
        }
        // An authority of the same name that did not sign it is another one.
        Error::UnknownIssuer | Error::InvalidSignatureForPublicKey => format!(
            "Our own certificate {path} failed validation against {}: The certificate hasn't got a known issuer",
            files.ca_path.display()
        ),
        other => format!(
            "Our own certificate {path} failed validation against {}: {other}",
            files.ca_path.display()
        ),
    }))
}

fn verify(
    cert: &CertificateDer<'_>,
    between: &[CertificateDer<'_>],
    authorities: &[CertificateDer<'_>],
    endpoint: Endpoint,
    provider: &CryptoProvider,
    now: UnixTime,
) -> Result<(), Error> {
    let anchors =
        authorities.iter().map(anchor_from_trusted_cert).collect::<Result<Vec<TrustAnchor<'_>>, _>>()?;
    let usage = match endpoint {
        Endpoint::Server => KeyUsage::server_auth(),
        Endpoint::Client => KeyUsage::client_auth(),
    };
    let algorithms = provider.signature_verification_algorithms.all;
    EndEntityCert::try_from(cert)?
        .verify_for_usage(algorithms, &anchors, between, now, usage, None, None)
        .map(drop)
}

fn said(text: String) -> TlsError {
    TlsError::Certificate { text }
}
