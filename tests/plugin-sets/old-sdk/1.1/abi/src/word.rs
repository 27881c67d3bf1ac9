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
    /// How many operations this version of the ABI has.
    pub const COUNT: usize = 7;
    /// Their names, by number.
    pub const NAMES: [&str; COUNT] =
        ["read", "write", "flush", "discard", "write_zeroes", "block_status", "cache"];
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

/// What becomes of operations that a filter knew but left out: values of `FilterDesc::default`.
pub mod default {
    /// They go to the child as they are.
    pub const PASS: u32 = 0;
    /// They are emulated through the ones that the filter has, else refused.
    pub const DENY: u32 = 1;
}
