//! The asynchronous operations of a storage graph, made safe.
//!
//! The plugin ABI has one protocol for everything: [`OpVt`](driveline_abi::OpVt), a vtable of start, poll and
//! drop over memory that the caller lends. This crate is that protocol's only face in Rust, on both sides of the
//! boundary: it turns an `async fn` into a vtable ([`OpTable`]), a call to a child into a future ([`Next`]), and a
//! wired graph into something a request can be started on ([`Call`]). All `unsafe` of the I/O path is here.
//!
//! It is not a graph: names, permissions and changes live in `driveline-graph`. It is not the SDK either, which
//! adds options, logging and the export of a library.
//!
//! Three nouns:
//! * [`OpTable`]: which `async fn` of a driver does which operation;
//! * [`Edge`]: what a parent may call, resolved down to the leaves, immutable;
//! * [`Call`]: a request from outside, on its way through an edge.
//!
//! ```
//! use driveline_op::*;
//! use std::{pin::pin, sync::Arc, task::{Context, Poll, Waker}};
//!
//! struct Ones; // a leaf: reads as ones
//! impl Ones {
//!     async fn read(&self, _: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
//!         request.fill(0, &vec![1; request.length() as usize]);
//!         Ok(())
//!     }
//! }
//! static ONES: OpTable<Ones> = OpTable::new().read(Ones::read);
//!
//! struct Shift(u64); // a node above it: reads further on
//! impl Shift {
//!     async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
//!         next.read(&request.at(request.offset() + self.0)).await
//!     }
//! }
//! static SHIFT: OpTable<Shift> = OpTable::new().read(Shift::read);
//!
//! let info = Info { size_bytes: 1 << 20, ..Info::default() };
//! let leaf = Target::new(Instance::new(Arc::new(Body { cookie: 1, driver: Ones }), &ONES), vec![]);
//! let shift = Instance::new(Arc::new(Body { cookie: 2, driver: Shift(512) }), &SHIFT);
//! let top = Target::new(shift, vec![Edge::to(info, &leaf)]);
//! let ask = Ask { op: op::READ, offset: 0, ..Ask::default() };
//! let call = Call::new(Edge::to(info, &top), ask, Buffer::new(8));
//! let Poll::Ready(answer) = pin!(call).poll(&mut Context::from_waker(Waker::noop())) else { panic!() };
//! assert_eq!((answer.result.is_ok(), &answer.buffer[..]), (true, &[1; 8][..]));
//! ```

mod arena;
mod buffer;
mod call;
mod error;
mod next;
mod request;
mod shim;
mod wake;
mod wiring;

pub use buffer::{BUFFER_ALIGNMENT, Buffer};
pub use call::{Answer, Ask, Call};
pub use driveline_abi::{BlockStatus, Info, IoVec, effect, event, flag, info, op, status};
pub use error::{Error, Result};
pub use next::{Child, ChildOp, Next};
pub use request::{
    BlockStatusRequest, CacheRequest, ConstMemory, DiscardRequest, EventRequest, FlushRequest, Memory,
    ReadRequest, ResizeRequest, WriteRequest, WriteZeroesRequest,
};
pub use shim::{Body, NameHook, OpTable, PanicHook, panic_text, set_name_hook, set_panic_hook};
pub use wake::{HANDLE_WAKER, with_context, with_handle};
pub use wiring::{Edge, Instance, Route, Target};
