//! Events of one test, though others run beside it.

use std::sync::OnceLock;
use tracing::{Dispatch, Subscriber, subscriber::NoSubscriber};

/// Runs `test` with a subscriber that hears the events of this thread.
///
/// As [`tracing::subscriber::with_default`], but right for tests, which share a process: `tracing` remembers for each place
/// in the code whether anyone wants its events, and while there is a single subscriber it asks that of the thread that gets
/// there first, which may be another test's, without any. With a second one about it asks all of them.
pub fn listen<T>(subscriber: impl Subscriber + Send + Sync + 'static, test: impl FnOnce() -> T) -> T {
    static SECOND: OnceLock<Dispatch> = OnceLock::new();
    SECOND.get_or_init(|| Dispatch::new(NoSubscriber::default()));
    tracing::subscriber::with_default(subscriber, test)
}
