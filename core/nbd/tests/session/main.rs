//! Whole connections over a pipe: a real session, a client made of the same codec, and memory as storage.

mod client;
mod handshake;
mod malformed;
mod memory;
mod pipe;
mod stopping;
mod transmission;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use driveline_nbd::{Export, Exports, Fault, serve};

use memory::Memory;
use pipe::Pipe;

/// Runs `future` to its end; one that hangs fails the test.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        assert!(Instant::now() < deadline, "nothing moves any more");
        thread::park_timeout(Duration::from_secs(1));
    }
}

/// The export `disk`, of memory.
fn exports_of(memory: Memory) -> Exports<Memory> {
    let exports = Exports::default();
    exports.add("disk", Export::new(memory).writable(true)).unwrap();
    exports
}

/// Runs a server on one end of a pipe and `client` on the other. The client's end is closed when it is done.
fn connect<T, F: Future<Output = T>>(
    exports: &Exports<Memory>,
    client: impl FnOnce(Pipe) -> F,
) -> (Result<(), Fault>, T) {
    let (near, far) = Pipe::pair(64 << 10);
    block_on(async {
        let server = async {
            let far = far;
            serve(&far, exports, std::future::pending()).await
        };
        futures::future::join(server, client(near)).await
    })
}

/// Lets the other end of the connection go on.
async fn next_turn() {
    let mut passed = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut passed, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
