//! Plain words: status, request, extent, limits.

use abi_stable::StableAbi;

/// How an operation stands: `0` done, `1` pending, `-errno` failed, `i32::MIN` the filter panicked.
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status(
    /// The number that crosses the boundary.
    pub i32,
);

impl Status {
    /// Done, successfully.
    pub const OK: Self = Self(0);
    /// Not done; the waker given will be woken when a poll is worth while.
    pub const PENDING: Self = Self(1);
    /// The code behind this operation panicked; the panic was caught on its side of the boundary.
    pub const PANICKED: Self = Self(i32::MIN);
}

/// A stretch of lent memory. Its owner (a guest, say) may change it at any time, so it is never a slice.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct IoVec {
    /// The first byte.
    pub base: *mut u8,
    /// Bytes.
    pub len: usize,
}

/// Operation numbers: the index of an operation in every table.
pub mod op {
    /// Fill the memory of `iov` with what is at `offset`.
    pub const READ: u32 = 0;
    /// Store the memory of `iov` at `offset`.
    pub const WRITE: u32 = 1;
    /// Make all completed writes durable.
    pub const FLUSH: u32 = 2;
    /// The range is no longer needed; what it reads as afterwards is unspecified.
    pub const DISCARD: u32 = 3;
    /// The range reads as zeroes afterwards.
    pub const WRITE_ZEROES: u32 = 4;
    /// Describe the extent that begins at `offset` into `out` (a [`BlockStatus`](super::BlockStatus)).
    pub const BLOCK_STATUS: u32 = 5;
    /// The range will be read soon. Since 1.1.
    pub const CACHE: u32 = 6;
    /// The node is `offset` bytes long from now on; what is new reads as zeroes. Since 1.2.
    pub const RESIZE: u32 = 7;
    /// The parent says what it is about to do: `offset` is one of [`event`](super::event). A hint for those who test
    /// formats; nobody else minds. Since 1.2.
    pub const EVENT: u32 = 8;
    /// How many operations this version of the ABI has.
    pub const COUNT: usize = 9;
    /// Their names, by number.
    pub const NAMES: [&str; COUNT] =
        ["read", "write", "flush", "discard", "write_zeroes", "block_status", "cache", "resize", "event"];
}

/// Bits of [`Request::flags`].
pub mod flag {
    /// Durable when the operation completes (write, write_zeroes, discard).
    pub const FUA: u32 = 1;
    /// The data that a reader sees does not change (copy-on-read, stream, rebuild). It holds for the node that
    /// is addressed and, with a [`scope`](super::Request::scope), for that node and all above it only.
    pub const UNCHANGED: u32 = 2;
    /// Zeroes may be stored by giving back the space.
    pub const MAY_UNMAP: u32 = 4;
    /// Fail with `ENOTSUP` rather than fall back to writing zeroes slowly.
    pub const NO_FALLBACK: u32 = 8;
    /// Reserved: exclusive over the range.
    pub const SERIALISING: u32 = 16;
    /// Reserved: the memory is registered with the ring.
    pub const REGISTERED: u32 = 32;
    /// The data may be stored compressed (write). Who cannot do so stores it as it is. Since 1.2.
    pub const COMPRESSED: u32 = 64;
    /// Zeroes inside of what is stored are to be told, too, where the file below knows its holes (block_status). Who cannot
    /// say calls all of it data. Since 1.3.
    pub const PRECISE: u32 = 128;
    /// All that have a meaning.
    pub const KNOWN: u32 = FUA | UNCHANGED | MAY_UNMAP | NO_FALLBACK | COMPRESSED | PRECISE;
    /// Those that had one before 1.2: what a filter knows that does not say what it knows.
    pub const KNOWN_BEFORE_1_2: u32 = FUA | UNCHANGED | MAY_UNMAP | NO_FALLBACK;
}

/// What a format is about to do: numbers for [`op::EVENT`].
///
/// Source: QEMU qapi/block-core.json, `BlkdebugEvent`, whose names and order these are.
pub mod event {
    /// The names, by number.
    pub const NAMES: [&str; 48] = [
        "l1_update",
        "l1_grow_alloc_table",
        "l1_grow_write_table",
        "l1_grow_activate_table",
        "l2_load",
        "l2_update",
        "l2_update_compressed",
        "l2_alloc_cow_read",
        "l2_alloc_write",
        "read_aio",
        "read_backing_aio",
        "read_compressed",
        "write_aio",
        "write_compressed",
        "vmstate_load",
        "vmstate_save",
        "cow_read",
        "cow_write",
        "reftable_load",
        "reftable_grow",
        "reftable_update",
        "refblock_load",
        "refblock_update",
        "refblock_update_part",
        "refblock_alloc",
        "refblock_alloc_hookup",
        "refblock_alloc_write",
        "refblock_alloc_write_blocks",
        "refblock_alloc_write_table",
        "refblock_alloc_switch_table",
        "cluster_alloc",
        "cluster_alloc_bytes",
        "cluster_free",
        "flush_to_os",
        "flush_to_disk",
        "pwritev_rmw_head",
        "pwritev_rmw_after_head",
        "pwritev_rmw_tail",
        "pwritev_rmw_after_tail",
        "pwritev",
        "pwritev_zero",
        "pwritev_done",
        "empty_image_prepare",
        "l1_shrink_write_table",
        "l1_shrink_free_l2_clusters",
        "cor_write",
        "cluster_alloc_space",
        "none",
    ];

    const fn equal(a: &[u8], b: &[u8]) -> bool {
        let mut at = 0;
        while at < a.len() && at < b.len() && a[at] == b[at] {
            at += 1;
        }
        at == a.len() && at == b.len()
    }

    /// The number of an event, by a name that there is (asserted): for constants.
    pub const fn number(name: &str) -> u64 {
        let mut at = 0;
        while !equal(NAMES[at].as_bytes(), name.as_bytes()) {
            at += 1;
        }
        at as u64
    }
}

/// One request: a cache line, valid together with everything that it points to until the operation ends.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct Request {
    /// One of [`op`].
    pub op: u32,
    /// Bits of [`flag`].
    pub flags: u32,
    /// The first byte of the range.
    pub offset: u64,
    /// Bytes in the range. For read and write it equals the sum of the lengths in `iov`.
    pub length: u64,
    /// The memory of a read or write; else null.
    pub iov: *const IoVec,
    /// How many entries `iov` has.
    pub iovcnt: u32,
    /// Zero.
    pub reserved0: u32,
    /// Where a block_status puts its answer; else null.
    pub out: *mut u8,
    /// With [`flag::UNCHANGED`]: the id of the node from which upward nothing changes; 0: the node addressed.
    pub scope: u64,
    /// A number that ties trace events of one request together.
    pub trace_id: u64,
}

const _: () = assert!(size_of::<Request>() == 64);

/// Bits of [`BlockStatus::flags`].
pub mod status {
    /// The extent reads as zeroes.
    pub const ZERO: u32 = 1;
    /// The extent has data of its own (it may still read as zeroes).
    pub const DATA: u32 = 2;
    /// [`map`](super::BlockStatus::map) says where the extent lies in the node's file, and it lies there as it reads.
    pub const MAPPED: u32 = 4;
    /// The data is stored compressed.
    pub const COMPRESSED: u32 = 8;
}

/// An extent, as block_status reports it: the first one of the range asked for.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStatus {
    /// Bits of [`status`].
    pub flags: u32,
    /// In which layer the data is: 1 this one, 2 its backing, ..., 0 in none (it then reads as zeroes).
    pub depth: u32,
    /// Bytes from the request's offset; at least 1, at most the request's length.
    pub length: u64,
    /// With [`status::MAPPED`]: the offset in the file below.
    pub map: u64,
    /// Zero.
    pub reserved: u64,
}

/// Bits of [`Info::flags`].
pub mod info {
    /// Writes are refused.
    pub const READ_ONLY: u32 = 1;
    /// write_zeroes with `NO_FALLBACK` has a chance.
    pub const FAST_ZERO: u32 = 2;
    /// discard gives space back.
    pub const DISCARD: u32 = 4;
    /// Writes with [`flag::COMPRESSED`](super::flag::COMPRESSED) are stored so. Since 1.2.
    pub const COMPRESSES: u32 = 8;
}

/// What a node is like for its parents: size and limits. One value that prints and compares.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Bytes.
    pub size_bytes: u64,
    /// Offsets and lengths must be multiples of this; a power of two, at least 1.
    pub request_alignment: u32,
    /// Bits of [`info`].
    pub flags: u32,
    /// The longest read or write taken at once; 0: no limit.
    pub transfer_bytes_max: u64,
    /// The unit of allocation, 0 if there is none; the default granularity of bitmaps comes from it.
    pub cluster_bytes: u32,
    /// The alignment that memory must have; a power of two, at least 1.
    pub memory_alignment: u32,
    /// Zero.
    pub reserved: [u64; 2],
}

impl Default for Info {
    fn default() -> Self {
        Self {
            size_bytes: 0,
            request_alignment: 1,
            flags: 0,
            transfer_bytes_max: 0,
            cluster_bytes: 0,
            memory_alignment: 1,
            reserved: [0; 2],
        }
    }
}

/// What a filter declares about itself: bits of `FilterDesc::effects`.
pub mod effect {
    /// The bytes that pass are changed (encryption, say): the filter is no filter in the strict sense.
    pub const CHANGES_DATA: u64 = 1;
    /// Offsets below differ from those above.
    pub const CHANGES_OFFSETS: u64 = 2;
    /// It writes on its own account (copy-on-read, say).
    pub const OWN_WRITES: u64 = 4;
    /// It must not be inserted above a node in use.
    pub const NOT_LIVE: u64 = 8;
}

/// What a parent may do to a child, as [`FilterOps::permissions`](crate::FilterOps) says it: bits.
pub mod permission {
    /// Read data that makes sense.
    pub const CONSISTENT_READ: u32 = 1;
    /// Write.
    pub const WRITE: u32 = 2;
    /// Write what does not change the data seen.
    pub const WRITE_UNCHANGED: u32 = 4;
    /// Change the size.
    pub const RESIZE: u32 = 8;
}

/// What is done with an object (see [`FilterDesc::object`](crate::FilterDesc)).
pub mod object {
    /// Would one with these properties be taken?
    pub const CHECK: u32 = 0;
    /// Make one.
    pub const CREATE: u32 = 1;
    /// Change some properties.
    pub const SET: u32 = 2;
    /// Ask for all properties.
    pub const GET: u32 = 3;
    /// End it.
    pub const DELETE: u32 = 4;
}

/// What becomes of operations that a filter knew but left out: values of `FilterDesc::default`.
pub mod default {
    /// They go to the child as they are.
    pub const PASS: u32 = 0;
    /// They are emulated through the ones that the filter has, else refused.
    pub const DENY: u32 = 1;
}
