//! Directories of certificates, as QEMU lays them out.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// When a certificate holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code)] // not every test has all of them
pub(crate) enum Time {
    Past,
    Now,
    Future,
}

impl Time {
    fn set(self, params: &mut CertificateParams) {
        let years = match self {
            Time::Past => (1990, 1999),
            Time::Now => (2000, 2900),
            Time::Future => (2800, 2900),
        };
        params.not_before = date_time_ymd(years.0, 1, 1);
        params.not_after = date_time_ymd(years.1, 1, 1);
    }
}

/// A directory, and the authority whose certificate is in it.
pub(crate) struct Creds {
    folder: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

#[allow(dead_code)]
impl Creds {
    /// An authority, and nothing else yet.
    pub(crate) fn new(time: Time) -> Creds {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "an authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        time.set(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let creds = Creds { folder: tempfile::tempdir().unwrap(), issuer: Issuer::new(params, key) };
        fs::write(creds.path("ca-cert.pem"), certificate.pem()).unwrap();
        creds
    }

    /// With a server on this machine and a client.
    pub(crate) fn whole() -> Creds {
        let creds = Creds::new(Time::Now);
        creds.add("server", "server", &["localhost", "127.0.0.1"], Time::Now);
        creds.add("client", "client", &[], Time::Now);
        creds
    }

    pub(crate) fn dir(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A certificate and its key in `FILE-cert.pem` and `FILE-key.pem`, good for `purpose`: `server`, `client` or `ca`.
    pub(crate) fn add(&self, file: &str, purpose: &str, names: &[&str], time: Time) {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, "somebody");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        match purpose {
            "server" => params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth],
            "client" => params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth],
            _ => params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained),
        }
        time.set(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(self.path(&format!("{file}-cert.pem")), certificate.pem()).unwrap();
        fs::write(self.path(&format!("{file}-key.pem")), key.serialize_pem()).unwrap();
    }

    /// Makes `file` that of another directory.
    pub(crate) fn take(&self, file: &str, from: &Creds) {
        fs::copy(from.path(file), self.path(file)).unwrap();
    }

    pub(crate) fn remove(&self, file: &str) {
        fs::remove_file(self.path(file)).unwrap();
    }
}
