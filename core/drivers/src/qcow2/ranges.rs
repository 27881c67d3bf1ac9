//! Which guest clusters are about to change their mapping: one request at a time for each.

use parking_lot::Mutex;
use std::{
    future::poll_fn,
    ops::Range,
    task::{Poll, Waker},
};

/// Ranges that are held, and who waits for them.
#[derive(Debug, Default)]
pub(crate) struct Ranges(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    held: Vec<(u64, Range<u64>)>,
    waiting: Vec<(Range<u64>, Waker)>,
    next: u64,
}

/// A range that is held until this is dropped.
#[derive(Debug)]
pub(crate) struct Held<'a>(&'a Ranges, u64);

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Ranges {
    /// Waits until nobody holds any part of the range, and holds it.
    pub(crate) async fn hold(&self, range: Range<u64>) -> Held<'_> {
        poll_fn(|cx| {
            let mut inner = self.0.lock();
            if inner.held.iter().any(|(_, held)| overlap(held, &range)) {
                inner.waiting.push((range.clone(), cx.waker().clone()));
                return Poll::Pending;
            }
            inner.next += 1;
            let id = inner.next;
            inner.held.push((id, range.clone()));
            Poll::Ready(Held(self, id))
        })
        .await
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut inner = self.0.0.lock();
        let at = inner.held.iter().position(|(id, _)| *id == self.1).expect("a held range is in the list");
        let (_, range) = inner.held.swap_remove(at);
        inner.waiting.retain(|(waiting, waker)| {
            let wake = overlap(waiting, &range);
            if wake {
                waker.wake_by_ref();
            }
            !wake
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{FutureExt, executor::block_on};
    use std::pin::pin;

    #[test]
    fn overlapping_ranges_wait_and_others_do_not() {
        let ranges = Ranges::default();
        let first = block_on(ranges.hold(0..10));
        let mut second = pin!(ranges.hold(9..12));
        assert!(second.as_mut().now_or_never().is_none());
        drop(block_on(ranges.hold(10..20)));
        drop(first);
        assert!(second.now_or_never().is_some());
    }
}
