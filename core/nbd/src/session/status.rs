//! Block status: asks storage and bitmaps about a range, and writes down what they say.

use std::borrow::Cow;
use std::future::poll_fn;
use std::ops::Range;
use std::task::Poll;

use driveline_bitmap::Bitmap;
use driveline_op::{Ask, BlockStatus, Buffer, op, status};

use super::reply::Failure;
use crate::contexts::{Context, Selected};
use crate::export::Storage;
use crate::limits::STATUS_BYTES_MAX;
use driveline_wire::{
    AllocationFlags, Chunk, EXTENTS_MAX, Errno, Extent, ExtentWidth, Extents, Headers, ReplyFlags, Request,
};

/// Questions to storage for one reply. Where they do not suffice the client asks again, and others get their turn.
const QUESTIONS_MAX: usize = 1 << 16;
/// Questions after which the other requests of the thread get their turn.
const QUESTIONS_PER_TURN: usize = 128;
/// Status of a dirty extent (`NBD_STATE_DIRTY`).
const DIRTY: u64 = 1;
/// Status of an extent that is dirty and reads as zeroes, in the context for backups.
const DIRTY_ZEROES: u64 = 2;

/// The whole reply to a block status request: one chunk for each of `contexts`.
///
/// A reply may tell less than was asked, but at least one extent for each context. With `one` it tells exactly one.
pub(super) async fn survey<'a, S: Storage>(
    storage: &S,
    headers: Headers,
    request: &Request,
    length: u64,
    one: bool,
    contexts: impl Iterator<Item = &'a Selected>,
) -> Result<Vec<u8>, Failure> {
    let range = representable(request.offset, length, headers);
    let mut lists: Vec<List<'a>> = contexts.map(|selected| List::new(selected, headers)).collect();
    let limit = if one { 1 } else { extents_max(headers, lists.len()) };
    lists.iter_mut().for_each(|list| list.limit = limit);
    ask_storage(storage, &range, &mut lists).await?;
    for list in &mut lists {
        if let Context::Bitmap(bitmap) = &list.selected.context {
            read_bitmap(bitmap, &range, DIRTY, list);
        }
    }
    let mut out = Vec::with_capacity(lists.iter().map(|list| list.bytes.len() + 64).sum());
    let last = lists.len().wrapping_sub(1);
    for (index, mut list) in lists.into_iter().enumerate() {
        let flags = ReplyFlags::EMPTY.with(ReplyFlags::DONE, index == last);
        list.close().encode(headers, flags, request.cookie, request.offset, &mut out);
    }
    if out.is_empty() {
        Chunk::None.encode(headers, ReplyFlags::DONE, request.cookie, request.offset, &mut out);
    }
    Ok(out)
}

/// As much of the range as extents of that width can describe, in the end of an extent that stays aligned.
fn representable(offset: u64, length: u64, headers: Headers) -> Range<u64> {
    let length = match headers {
        Headers::Compact => length.min(0xffff_0000),
        Headers::Extended => length,
    };
    offset..offset + length
}

/// How many extents each of `lists` may have, so that all together stay within bounds.
fn extents_max(headers: Headers, lists: usize) -> usize {
    let width = ExtentWidth::of(headers);
    (STATUS_BYTES_MAX / width.extent_length() / lists.max(1)).clamp(1, EXTENTS_MAX)
}

/// The extents of one context, as they are collected.
struct List<'a> {
    selected: &'a Selected,
    width: ExtentWidth,
    limit: usize,
    /// Extents before the last one.
    count: usize,
    /// It grows for as long as its status goes on.
    last: Option<Extent>,
    bytes: Vec<u8>,
    full: bool,
}

impl<'a> List<'a> {
    fn new(selected: &'a Selected, headers: Headers) -> List<'a> {
        let width = ExtentWidth::of(headers);
        List { selected, width, limit: 1, count: 0, last: None, bytes: Vec::new(), full: false }
    }

    /// Appends an extent, unless the list is full.
    fn push(&mut self, length: u64, status: u64) {
        match &mut self.last {
            _ if self.full => {}
            Some(last) if last.status == status => last.length += length,
            Some(_) if self.count + 1 == self.limit => self.full = true,
            last => {
                if let Some(last) = last.replace(Extent { length, status }) {
                    last.encode(self.width, &mut self.bytes);
                    self.count += 1;
                }
            }
        }
    }

    /// Where it is now, for [`List::back_to`].
    fn mark(&self) -> (usize, Option<Extent>, usize, bool) {
        (self.count, self.last, self.bytes.len(), self.full)
    }

    fn back_to(&mut self, (count, last, bytes, full): (usize, Option<Extent>, usize, bool)) {
        self.bytes.truncate(bytes);
        (self.count, self.last, self.full) = (count, last, full);
    }

    fn close(&mut self) -> Chunk<'_> {
        let last = self.last.take().expect("every context says something about a range that is not empty");
        last.encode(self.width, &mut self.bytes);
        let extents = Extents::new(self.width, &self.bytes).expect("the list is made of whole extents");
        Chunk::BlockStatus { context: self.selected.id, extents }
    }
}

/// Fills the lists of all contexts that storage knows about.
async fn ask_storage<S: Storage>(
    storage: &S,
    range: &Range<u64>,
    lists: &mut [List<'_>],
) -> Result<(), Failure> {
    let mut offset = range.start;
    for question in 1.. {
        let asking = |list: &List<'_>| !matches!(list.selected.context, Context::Bitmap(_)) && !list.full;
        if offset == range.end || question > QUESTIONS_MAX || !lists.iter().any(asking) {
            break;
        }
        let length = range.end - offset;
        let ask = Ask { op: op::BLOCK_STATUS, offset, length, ..Ask::default() };
        let answer = storage.call(ask, Buffer::default()).await;
        let mut status = answer.status;
        match answer.result {
            Ok(()) => {}
            // Storage that cannot tell has data everywhere, as far as a client is concerned.
            Err(error) if error.code() == libc::ENOTSUP => {
                status = BlockStatus { flags: status::DATA, depth: 1, length, ..BlockStatus::default() };
            }
            // What is known already is an answer, too; the client meets the error when it asks on.
            Err(_) if offset > range.start => break,
            Err(error) => {
                let message = Cow::Owned(format!("BLOCK_STATUS: {error}"));
                return Err(Failure { errno: Errno::from_system(error.code()), message });
            }
        }
        debug_assert!((1..=length).contains(&status.length), "storage describes a part of what it was asked");
        // A wrong answer must neither stand still nor lead out of the export.
        let described = status.length.clamp(1, length);
        for list in lists.iter_mut() {
            match &list.selected.context {
                Context::Allocation => list.push(described, allocation(&status).0),
                Context::Depth => list.push(described, status.depth.into()),
                Context::Bitmap(_) => {}
                Context::Backup(bitmap) => {
                    let zeroes = status.flags & status::ZERO != 0;
                    let dirty = if zeroes { DIRTY_ZEROES } else { DIRTY };
                    read_bitmap(bitmap, &(offset..offset + described), dirty, list);
                }
            }
        }
        offset += described;
        if question % QUESTIONS_PER_TURN == 0 {
            next_turn().await;
        }
    }
    Ok(())
}

fn allocation(status: &BlockStatus) -> AllocationFlags {
    AllocationFlags::EMPTY
        .with(AllocationFlags::HOLE, status.flags & status::DATA == 0)
        .with(AllocationFlags::ZERO, status.flags & status::ZERO != 0)
}

fn read_bitmap(bitmap: &Bitmap, range: &Range<u64>, dirty: u64, list: &mut List<'_>) {
    let before = list.mark();
    let offset = bitmap.read(|bits| {
        list.back_to(before);
        let mut offset = range.start;
        for extent in bits.extents(range.clone()) {
            if list.full {
                return range.end;
            }
            list.push(extent.range.end - extent.range.start, if extent.dirty { dirty } else { 0 });
            offset = extent.range.end;
        }
        offset
    });
    if offset < range.end {
        // The bitmap does not reach that far, so it cannot vouch for that part.
        list.push(range.end - offset, dirty);
    }
}

/// Lets other requests go on first.
async fn next_turn() {
    let mut passed = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut passed, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
