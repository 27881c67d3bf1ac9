//! One connection from its first byte to its last.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use crate::export::{Exports, Storage};
use crate::fault::Fault;
use crate::handshake::handshake;
use crate::session;
use driveline_transport::Receive;
use driveline_transport::Transport;

/// Serves one client: handshake, then requests, until it leaves, breaks the protocol, or its export is removed.
///
/// The handshake has to be over before `handshake_limit` is. Requests that began run to their end, so when this returns
/// nothing of the session is left in storage; when its future is dropped they are cancelled.
pub async fn serve<T: Transport, S: Storage>(
    transport: &T,
    exports: &Exports<S>,
    handshake_limit: impl Future<Output = ()>,
) -> Result<(), Fault> {
    let mut receive = Receive::new();
    let negotiated = {
        let mut handshake = pin!(handshake(transport, &mut receive, exports));
        let mut limit = pin!(handshake_limit);
        poll_fn(|cx| {
            if let Poll::Ready(outcome) = handshake.as_mut().poll(cx) {
                return Poll::Ready(outcome);
            }
            limit.as_mut().poll(cx).map(|()| Err(Fault::HandshakeTimeout))
        })
        .await?
    };
    match negotiated {
        Some(negotiated) => {
            tracing::debug!(target: "driveline::nbd", export = negotiated.attached.entry.name, "session begins");
            session::run(transport, &mut receive, &negotiated).await
        }
        None => Ok(()),
    }
}
