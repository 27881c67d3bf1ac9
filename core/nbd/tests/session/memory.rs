//! Storage that is memory, and as slow and as faulty as a test wants it.

use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;

use driveline_nbd::Storage;
use driveline_op::{Answer, Ask, BlockStatus, Buffer, Error, Info, flag, op, status};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// A page that nobody wrote is a hole.
const PAGE: usize = 4096;

/// A clone is the same memory.
#[derive(Clone)]
pub(crate) struct Memory(Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) data: Mutex<Data>,
    info: Info,
    /// How many times a call may wait before it is done, at most.
    delays_max: Mutex<u32>,
    random: Mutex<SmallRng>,
    pub(crate) running: AtomicUsize,
    pub(crate) running_max: AtomicUsize,
    pub(crate) asks: Mutex<Vec<Ask>>,
    /// Fails every call.
    pub(crate) errno: Mutex<Option<i32>>,
}

pub(crate) struct Data {
    pub(crate) bytes: Vec<u8>,
    allocated: Vec<bool>,
}

impl Memory {
    pub(crate) fn new(size: usize) -> Memory {
        Memory::with_info(Info { size_bytes: size as u64, ..Info::default() })
    }

    pub(crate) fn with_info(info: Info) -> Memory {
        Memory::build(info, info.size_bytes as usize)
    }

    /// One that is only looked at by its bitmaps: it has no bytes.
    pub(crate) fn huge(size_bytes: u64) -> Memory {
        Memory::build(Info { size_bytes, ..Info::default() }, 0)
    }

    fn build(info: Info, size: usize) -> Memory {
        Memory(Arc::new(Inner {
            data: Mutex::new(Data { bytes: vec![0; size], allocated: vec![false; size.div_ceil(PAGE)] }),
            info,
            delays_max: Mutex::new(0),
            random: Mutex::new(SmallRng::seed_from_u64(1)),
            running: AtomicUsize::new(0),
            running_max: AtomicUsize::new(0),
            asks: Mutex::default(),
            errno: Mutex::default(),
        }))
    }

    pub(crate) fn slow(self, delays_max: u32) -> Memory {
        *self.0.delays_max.lock() = delays_max;
        self
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.0
    }

    fn now(&self, ask: &Ask, buffer: &mut Buffer) -> (Result<(), Error>, BlockStatus) {
        if let Some(errno) = *self.0.errno.lock() {
            return (Err(Error::errno(errno)), BlockStatus::default());
        }
        let mut data = self.0.data.lock();
        let start = ask.offset as usize;
        let length = if buffer.is_empty() { ask.length as usize } else { buffer.len() };
        let range = start..start + length;
        let pages = start / PAGE..(start + length).div_ceil(PAGE);
        let mut found = BlockStatus::default();
        match ask.op {
            op::READ => buffer.copy_from_slice(&data.bytes[range]),
            op::WRITE => {
                data.bytes[range].copy_from_slice(buffer);
                data.allocated[pages].fill(true);
            }
            op::WRITE_ZEROES => {
                data.bytes[range].fill(0);
                if ask.flags & flag::MAY_UNMAP == 0 {
                    data.allocated[pages].fill(true);
                }
            }
            op::DISCARD | op::FLUSH | op::CACHE => {}
            op::BLOCK_STATUS => {
                let allocated = data.allocated[pages.start];
                let end = ((pages.start + 1) * PAGE).min(start + length);
                found.length = (end - start) as u64;
                found.flags = if allocated { status::DATA } else { status::ZERO };
                found.depth = u32::from(allocated);
            }
            _ => return (Err(Error::NOT_SUPPORTED), found),
        }
        (Ok(()), found)
    }
}

impl Storage for Memory {
    fn info(&self) -> Info {
        self.0.info
    }

    fn call(&self, ask: Ask, mut buffer: Buffer) -> impl Future<Output = Answer> {
        self.0.asks.lock().push(ask);
        let delays_max = *self.0.delays_max.lock();
        let mut delays = if delays_max == 0 { 0 } else { self.0.random.lock().random_range(0..=delays_max) };
        async move {
            let running = self.0.running.fetch_add(1, Ordering::Relaxed) + 1;
            self.0.running_max.fetch_max(running, Ordering::Relaxed);
            poll_fn(|cx| {
                if delays == 0 {
                    return Poll::Ready(());
                }
                delays -= 1;
                cx.waker().wake_by_ref();
                Poll::Pending
            })
            .await;
            let (result, status) = self.now(&ask, &mut buffer);
            self.0.running.fetch_sub(1, Ordering::Relaxed);
            Answer { result, buffer, status }
        }
    }
}
