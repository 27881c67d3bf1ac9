//! Loaded credentials by name.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{ClientTls, Endpoint, ServerTls, TlsCreds, TlsError};

/// Credentials by name, shared by all who look them up and those who add them.
#[derive(Clone, Debug, Default)]
pub struct TlsRegistry(Arc<Mutex<BTreeMap<String, Loaded>>>);

#[derive(Clone, Debug)]
enum Loaded {
    Server(ServerTls),
    Client(ClientTls),
}

impl TlsRegistry {
    /// Loads credentials and keeps them as `id`. Those who looked up others before keep what they have.
    ///
    /// Errors: the name is taken, or whatever is wrong with the files; then nothing changes.
    pub fn add(&self, id: &str, creds: &TlsCreds) -> Result<(), TlsError> {
        let loaded = match creds.endpoint {
            Endpoint::Server => Loaded::Server(creds.server()?),
            Endpoint::Client => Loaded::Client(creds.client()?),
        };
        let mut known = self.0.lock();
        if known.contains_key(id) {
            return Err(TlsError::Exists { id: id.to_owned() });
        }
        known.insert(id.to_owned(), loaded);
        Ok(())
    }

    /// Forgets credentials. `false`: there are none of that name.
    pub fn remove(&self, id: &str) -> bool {
        self.0.lock().remove(id).is_some()
    }

    /// The credentials of that name, for a server.
    pub fn server(&self, id: &str) -> Result<ServerTls, TlsError> {
        match self.find(id)? {
            Loaded::Server(tls) => Ok(tls),
            Loaded::Client(_) => Err(TlsError::Endpoint { expected: Endpoint::Server.name() }),
        }
    }

    /// The credentials of that name, for a client.
    pub fn client(&self, id: &str) -> Result<ClientTls, TlsError> {
        match self.find(id)? {
            Loaded::Client(tls) => Ok(tls),
            Loaded::Server(_) => Err(TlsError::Endpoint { expected: Endpoint::Client.name() }),
        }
    }

    fn find(&self, id: &str) -> Result<Loaded, TlsError> {
        self.0.lock().get(id).cloned().ok_or_else(|| TlsError::NotFound { id: id.to_owned() })
    }
}
