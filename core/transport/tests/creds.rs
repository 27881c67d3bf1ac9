//! What is wrong with credentials is said when they are loaded, and with which file.

mod kit;

use driveline_transport::{Endpoint, TlsCreds, TlsRegistry};
use kit::{Creds, Time};
use std::fs;

/// The error of loading for an end, `<dir>` standing for the directory.
fn error(creds: &Creds, endpoint: Endpoint) -> String {
    let described = TlsCreds::new(creds.dir(), endpoint);
    let error = match endpoint {
        Endpoint::Server => described.server().map(drop),
        Endpoint::Client => described.client().map(drop),
    };
    error.unwrap_err().to_string().replace(creds.dir().to_str().unwrap(), "<dir>")
}

#[test]
fn what_is_whole_is_loaded_for_both_ends() {
    let creds = Creds::whole();
    TlsCreds::new(creds.dir(), Endpoint::Server).server().unwrap();
    TlsCreds::new(creds.dir(), Endpoint::Client).client().unwrap();
    // A client needs no certificate of its own, and a list of the revoked may be there or not.
    creds.remove("client-cert.pem");
    creds.remove("client-key.pem");
    TlsCreds::new(creds.dir(), Endpoint::Client).client().unwrap();
    fs::write(creds.path("ca-crl.pem"), "nothing").unwrap();
    assert_eq!(
        error(&creds, Endpoint::Server),
        "Unable to import CRL <dir>/ca-crl.pem: there is none in the file"
    );
}

#[test]
fn files_that_are_missing_or_something_else_are_named() {
    let creds = Creds::whole();
    creds.remove("client-key.pem");
    let missing = "Unable to access credentials <dir>/client-key.pem: No such file or directory (os error 2)";
    assert_eq!(error(&creds, Endpoint::Client), missing);
    fs::write(creds.path("server-key.pem"), "-----BEGIN ENCRYPTED PRIVATE KEY-----\n").unwrap();
    let encrypted =
        "Unable to import private key <dir>/server-key.pem: keys with a password are not supported";
    assert_eq!(error(&creds, Endpoint::Server), encrypted);
    creds.take("server-key.pem", &Creds::whole());
    assert!(
        error(&creds, Endpoint::Server).starts_with("Cannot load certificate '<dir>/server-cert.pem' & key")
    );
    creds.remove("ca-cert.pem");
    let missing = "Unable to access credentials <dir>/ca-cert.pem: No such file or directory (os error 2)";
    assert_eq!(error(&creds, Endpoint::Client), missing);
    let wrong = TlsCreds::new(creds.dir(), Endpoint::Client).server().unwrap_err().to_string();
    assert_eq!(wrong, "Expected TLS credentials for a server endpoint");
}

#[test]
fn certificates_of_no_use_are_refused() {
    for (time, says) in [(Time::Past, "has expired"), (Time::Future, "is not yet active")] {
        let creds = Creds::new(time);
        creds.add("server", "server", &[], Time::Now);
        assert_eq!(error(&creds, Endpoint::Server), format!("The CA certificate <dir>/ca-cert.pem {says}"));
        let creds = Creds::whole();
        creds.add("server", "server", &[], time);
        let text = format!("The server certificate <dir>/server-cert.pem {says}");
        assert_eq!(error(&creds, Endpoint::Server), text);
        creds.add("client", "client", &[], time);
        let text = format!("The client certificate <dir>/client-cert.pem {says}");
        assert_eq!(error(&creds, Endpoint::Client), text);
        // Who wants to may use it.
        let creds = TlsCreds { sanity_check: false, ..TlsCreds::new(creds.dir(), Endpoint::Server) };
        creds.server().unwrap();
    }
    let creds = Creds::whole();
    creds.add("server", "client", &[], Time::Now);
    let text = "Certificate <dir>/server-cert.pem purpose does not allow use with a TLS server";
    assert_eq!(error(&creds, Endpoint::Server), text);
    creds.add("server", "ca", &[], Time::Now);
    let text =
        "The certificate <dir>/server-cert.pem basic constraints show a CA, but we need one for a server";
    assert_eq!(error(&creds, Endpoint::Server), text);
    let other = Creds::whole();
    creds.take("server-cert.pem", &other);
    creds.take("server-key.pem", &other);
    let text = "Our own certificate <dir>/server-cert.pem failed validation against <dir>/ca-cert.pem: \
                The certificate hasn't got a known issuer";
    assert_eq!(error(&creds, Endpoint::Server), text);
    fs::copy(creds.path("client-cert.pem"), creds.path("ca-cert.pem")).unwrap();
    let text = "The CA certificate <dir>/ca-cert.pem basic constraints do not show a CA";
    assert_eq!(error(&creds, Endpoint::Client), text);
}

#[test]
fn a_registry_gives_credentials_to_the_right_end() {
    let (creds, registry) = (Creds::whole(), TlsRegistry::default());
    registry.add("s", &TlsCreds::new(creds.dir(), Endpoint::Server)).unwrap();
    registry.add("c", &TlsCreds::new(creds.dir(), Endpoint::Client)).unwrap();
    assert!(registry.add("c", &TlsCreds::new(creds.dir(), Endpoint::Client)).is_err());
    registry.server("s").unwrap();
    let client = registry.client("c").unwrap();
    assert_eq!(
        registry.server("c").unwrap_err().to_string(),
        "Expected TLS credentials for a server endpoint"
    );
    assert_eq!(client.check_name(None).unwrap_err().to_string(), "No hostname for certificate validation");
    assert!(client.check_name(Some("no name at all")).is_err());
    client.check_name(Some("::1")).unwrap();
    assert!(registry.remove("s") && !registry.remove("s"));
    assert_eq!(registry.server("s").unwrap_err().to_string(), "No TLS credentials with id 's'");
}
