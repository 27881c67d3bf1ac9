//! What one client may make the server hold. Beyond these the server stops reading until it has caught up.

/// Requests of one session that are not answered yet, or whose answer is not sent yet.
pub const REQUESTS_MAX: usize = 128;
/// Bytes of payload that those requests may hold together. One request alone may always hold its own.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 20;
/// Answers are sent when this many wait, though more requests could be read first ...
pub(crate) const BATCH_REPLIES: usize = 64;
/// ... or when they are this long.
pub(crate) const BATCH_BYTES: usize = 512 << 10;
/// The longest data of an option that is looked at.
pub(crate) const OPTION_BYTES_MAX: usize = 128 << 10;
/// The longest data that is read only to be thrown away; whoever sends more is cut off.
pub(crate) const SKIP_BYTES_MAX: u64 = 64 << 20;
/// The most bytes of extents in one block status reply, all contexts together.
pub(crate) const STATUS_BYTES_MAX: usize = 1 << 20;
/// Buffers for payload that a session keeps for its next requests.
pub(crate) const KEPT_BYTES: usize = 16 << 20;
