//! Goes wrong where it is told to.
use driveline_sdk::prelude::*;
use std::{future::poll_fn, panic::panic_any, pin::pin, task::Poll, time::Duration};

#[options]
pub struct ChaosOptions {
    place: Place,
}

#[options]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Check,
    Open,
    Size,
    Close,
    BeforeChild,
    AfterChild,
    AfterWait,
    Index,
    DropOfFuture,
    HostilePayload,
    Cancelled,
    Forget,
}

pub struct Chaos(Place);

struct PanicsWhenDropped;

impl Drop for PanicsWhenDropped {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("in drop");
        }
    }
}

/// A panic's payload whose own drop panics.
struct Hostile;

impl Drop for Hostile {
    fn drop(&mut self) {
        panic!("in the payload's drop");
    }
}

impl Drop for Chaos {
    fn drop(&mut self) {
        if self.0 == Place::Close {
            panic!("in close");
        }
    }
}

#[filter(name = "chaos", default = "pass")]
impl Filter for Chaos {
    type Options = ChaosOptions;

    fn check(options: &ChaosOptions) -> Result<()> {
        assert!(options.place != Place::Check, "in check");
        Ok(())
    }

    fn open(options: ChaosOptions, _: &OpenCx<'_>) -> Result<Self> {
        assert!(options.place != Place::Open, "in open");
        Ok(Chaos(options.place))
    }

    fn size(&self, child_size_bytes: u64) -> u64 {
        assert!(self.0 != Place::Size, "in size");
        child_size_bytes
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        match self.0 {
            Place::BeforeChild => panic!("before the child"),
            Place::AfterChild => {
                next.read(request).await?;
                panic!("after the child")
            }
            Place::AfterWait => {
                sleep(Duration::from_millis(1)).await;
                panic!("after waiting")
            }
            Place::Index => {
                let empty: [i32; 0] = [];
                Err(Error::errno(empty[request.length() as usize]))
            }
            Place::DropOfFuture => {
                let _panics = PanicsWhenDropped;
                next.read(request).await
            }
            Place::HostilePayload => panic_any(Hostile),
            Place::Cancelled => {
                // The child is still at work when this panics, so it is cancelled by unwinding.
                let mut child = pin!(next.read(request));
                poll_fn(|cx| {
                    let _ = child.as_mut().poll(cx);
                    Poll::Ready(())
                })
                .await;
                panic!("with a child at work")
            }
            Place::Forget => {
                let mut child = Box::pin(next.read(request));
                poll_fn(|cx| {
                    let _ = child.as_mut().poll(cx);
                    Poll::Ready(())
                })
                .await;
                std::mem::forget(child);
                Ok(())
            }
            _ => next.read(request).await,
        }
    }
}
