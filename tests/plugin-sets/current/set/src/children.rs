//! Writes to two children at once.
use driveline_sdk::{ChildId, prelude::*};
use std::{future::poll_fn, pin::pin, task::Poll};

pub struct Mirror {
    target: ChildId,
}

#[filter(name = "mirror", default = "pass", children("target"), effects(own_writes, not_live))]
impl Filter for Mirror {
    type Options = NoOptions;

    fn open(_: NoOptions, cx: &OpenCx<'_>) -> Result<Self> {
        let target = cx.child("target")?;
        if cx.info(target).size_bytes < cx.info(0).size_bytes {
            return Err(Error::option("target", "it is smaller than the child"));
        }
        Ok(Mirror { target })
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        let (mut one, mut two) = (next.fork(), next.fork());
        let (mut one, mut two) = (pin!(one.write(request)), pin!(two.child(self.target).write(request)));
        let (mut done_one, mut done_two) = (None, None);
        poll_fn(|cx| {
            if done_one.is_none() && let Poll::Ready(result) = one.as_mut().poll(cx) {
                done_one = Some(result);
            }
            if done_two.is_none() && let Poll::Ready(result) = two.as_mut().poll(cx) {
                done_two = Some(result);
            }
            match (done_one.take(), done_two.take()) {
                (Some(one), Some(two)) => Poll::Ready(one.and(two)),
                (one, two) => {
                    (done_one, done_two) = (one, two);
                    Poll::Pending
                }
            }
        })
        .await
    }
}
