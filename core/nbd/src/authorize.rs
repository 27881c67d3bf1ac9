//! Which clients of TLS may connect, by the names in their certificates.

use std::fmt;
use std::sync::Arc;

use driveline_engine::unblock;
use driveline_transport::{TlsStream, Transport};

use crate::fault::Fault;

type Rule = dyn Fn(&str) -> Result<(), String> + Send + Sync;

/// Says of each client that has upgraded to TLS whether it may go on.
#[derive(Clone)]
pub struct Authorize(Arc<Rule>);

impl fmt::Debug for Authorize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authorize")
    }
}

impl Authorize {
    /// Asks `rule`, which is given the distinguished name of the client's certificate as QEMU spells it (`C=GB,O=Home,CN=laptop`) and
    /// says why it refuses. It may block: it is asked on the blocking pool.
    pub fn new(rule: impl Fn(&str) -> Result<(), String> + Send + Sync + 'static) -> Authorize {
        Authorize(Arc::new(rule))
    }

    /// Errors: the rule refuses, or the client has no name.
    pub(crate) async fn check<T: Transport>(&self, stream: &TlsStream<T>) -> Result<(), Fault> {
        let refused = |why| Fault::NotAuthorized { why };
        let Some(name) = stream.peer_name() else {
            return Err(refused("the client showed no certificate with a name".to_owned()));
        };
        let rule = Arc::clone(&self.0);
        unblock(move || rule(&name)).await.map_err(refused)
    }
}
