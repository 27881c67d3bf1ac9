//! One connection from its first byte to its last.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use driveline_transport::{Receive, ServerTls, TlsStream, Transport};

use crate::authorize::Authorize;
use crate::export::{Exports, Storage};
use crate::fault::Fault;
use crate::handshake::{Haggled, Negotiated, Security, haggle, handshake};
use crate::session;

/// Serves one client: handshake, then requests, until it leaves, breaks the protocol, or its export is removed.
///
/// The handshake has to be over before `handshake_limit` is. Requests that began run to their end, so when this returns
/// nothing of the session is left in storage; when its future is dropped they are cancelled.
pub async fn serve<T: Transport, S: Storage>(
    transport: &T,
    exports: &Exports<S>,
    handshake_limit: impl Future<Output = ()>,
) -> Result<(), Fault> {
    match choose(transport, exports, handshake_limit).await? {
        Some(chosen) => transmit(transport, chosen).await,
        None => Ok(()),
    }
}

/// As [`serve`], but to whoever upgrades to TLS only: no export is named or shown before. The limit holds for all of it.
pub async fn serve_tls<T: Transport, S: Storage>(
    transport: &T,
    exports: &Exports<S>,
    tls: &ServerTls,
    handshake_limit: impl Future<Output = ()>,
) -> Result<(), Fault> {
    match choose_tls(transport, exports, tls, None, handshake_limit).await? {
        Some((stream, chosen)) => transmit_tls(&stream, chosen).await,
        None => Ok(()),
    }
}

/// A client that has chosen an export: what was agreed on, and what it has sent already.
pub(crate) struct Chosen<S> {
    receive: Receive,
    negotiated: Box<Negotiated<S>>,
}

impl<S> Chosen<S> {
    /// The engine thread that the export wants its sessions on.
    pub(crate) fn thread(&self) -> Option<usize> {
        self.negotiated.attached.entry.export.thread
    }
}

/// The handshake. `None`: the client left in good order.
pub(crate) async fn choose<T: Transport, S: Storage>(
    transport: &T,
    exports: &Exports<S>,
    handshake_limit: impl Future<Output = ()>,
) -> Result<Option<Chosen<S>>, Fault> {
    let mut receive = Receive::new();
    let haggled = {
        let handshake = pin!(handshake(transport, &mut receive, exports, Security::None));
        limited(handshake, pin!(handshake_limit)).await?
    };
    Ok(chosen(receive, haggled))
}

/// The handshake with TLS.
pub(crate) async fn choose_tls<T: Transport, S: Storage>(
    transport: T,
    exports: &Exports<S>,
    tls: &ServerTls,
    authorize: Option<&Authorize>,
    handshake_limit: impl Future<Output = ()>,
) -> Result<Option<(TlsStream<T>, Chosen<S>)>, Fault> {
    let mut limit = pin!(handshake_limit);
    let mut receive = Receive::new();
    let haggled = {
        let handshake = pin!(handshake(&transport, &mut receive, exports, Security::Required));
        limited(handshake, limit.as_mut()).await?
    };
    let Haggled::StartTls(flags) = haggled else { return Ok(None) };
    let stream = {
        let accept = pin!(async { TlsStream::accept(transport, tls).await.map_err(Fault::Tls) });
        limited(accept, limit.as_mut()).await?
    };
    if let Some(authorize) = authorize {
        limited(pin!(authorize.check(&stream)), limit.as_mut()).await?;
    }
    // Nothing that was received before counts any more.
    let mut receive = Receive::new();
    let haggled = {
        let haggling = pin!(haggle(&stream, &mut receive, exports, Security::On, flags));
        limited(haggling, limit).await?
    };
    match chosen(receive, haggled) {
        Some(chosen) => Ok(Some((stream, chosen))),
        None => {
            bid_farewell(&stream);
            Ok(None)
        }
    }
}

fn chosen<S>(receive: Receive, haggled: Haggled<S>) -> Option<Chosen<S>> {
    match haggled {
        Haggled::Chosen(negotiated) => Some(Chosen { receive, negotiated }),
        Haggled::Left | Haggled::StartTls(_) => None,
    }
}

/// Serves requests.
pub(crate) async fn transmit<T: Transport, S: Storage>(
    transport: &T,
    chosen: Chosen<S>,
) -> Result<(), Fault> {
    let Chosen { mut receive, negotiated } = chosen;
    tracing::debug!(target: "driveline::nbd", export = negotiated.attached.entry.name, "session begins");
    session::run(transport, &mut receive, &negotiated).await
}

/// Serves requests over TLS.
pub(crate) async fn transmit_tls<T: Transport, S: Storage>(
    stream: &TlsStream<T>,
    chosen: Chosen<S>,
) -> Result<(), Fault> {
    let outcome = transmit(stream, chosen).await;
    bid_farewell(stream);
    outcome
}

/// A courtesy: as much of it as can be done without waiting for a client that may be gone.
fn bid_farewell<T: Transport>(stream: &TlsStream<T>) {
    let _ = pin!(stream.finish()).poll(&mut Context::from_waker(Waker::noop()));
}

async fn limited<T>(
    mut future: Pin<&mut impl Future<Output = Result<T, Fault>>>,
    mut limit: Pin<&mut impl Future<Output = ()>>,
) -> Result<T, Fault> {
    poll_fn(|cx| {
        if let Poll::Ready(outcome) = future.as_mut().poll(cx) {
            return Poll::Ready(outcome);
        }
        limit.as_mut().poll(cx).map(|()| Err(Fault::HandshakeTimeout))
    })
    .await
}
