//! The NBD protocol as bytes: what a message means, and how it is written.
//!
//! This is a codec and nothing more. It reads no socket, keeps no state between messages and never allocates for
//! a request or a reply; whoever owns the connection feeds it whole messages. Both directions are here, for the
//! server encodes what a client decodes, and a test that plays both ends proves each by the other.
//!
//! Three nouns:
//! * **codes and flags** ([`Command`], [`OptionCode`], [`CommandFlags`], ...): newtypes over the integer on the wire. Any
//!   value is representable, because a peer may send any value.
//! * **headers** ([`Request`], [`ChunkHeader`], [`OptionHeader`], ...): fixed size, decoded from and encoded to arrays.
//! * **meanings** ([`OptionRequest`], [`OptionReply`], [`Chunk`]): variable size; they borrow their strings and
//!   data from the bytes they were decoded from.
//!
//! ```
//! use driveline_wire::{Command, CommandFlags, Cookie, Headers, Request};
//!
//! let request = Request {
//!     flags: CommandFlags::FUA,
//!     command: Command::WRITE,
//!     cookie: Cookie(7),
//!     offset: 4096,
//!     length: 512,
//! };
//! let mut bytes = Vec::new();
//! request.encode(Headers::Compact, &mut bytes);
//! assert_eq!(bytes.len(), Headers::Compact.request_length());
//! assert_eq!(driveline_wire::parse(Headers::Compact, &bytes), Ok(request));
//! ```
//!
//! Source: `doc/proto.md` of the NBD project, and its branch `extension-ext-header` for what is called
//! *extended* here.

#![forbid(unsafe_code)]

mod chunk;
mod code;
mod errno;
mod flags;
#[doc(hidden)]
pub mod fuzz;
mod handshake;
mod option;
mod option_reply;
mod reader;
mod request;
mod status;

pub use chunk::{Chunk, ChunkHeader, SimpleReply};
pub use code::{ChunkType, Command, ContextId, Cookie, InfoType, OptionCode, ReplyCode};
pub use errno::Errno;
pub use flags::{AllocationFlags, ClientFlags, CommandFlags, HandshakeFlags, ReplyFlags, TransmissionFlags};
pub use handshake::{ExportNameReply, Greeting, OptionHeader, OptionReplyHeader};
pub use option::{InfoRequest, MetaContextRequest, OptionRequest};
pub use option_reply::{BlockSizes, Info, OptionReply};
pub use reader::Malformed;
pub use request::{Headers, Request, parse};
pub use status::{Extent, ExtentWidth, Extents, StatusPayload};

/// First eight bytes that a server sends, `NBDMAGIC`.
pub const INIT_PASSWD: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of a newstyle server, and the first eight of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Begins every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Begins a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Begins a chunk of an extended reply.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// No string of the protocol may be longer.
pub const STRING_LENGTH_MAX: usize = 4096;
/// The payload that every server should accept, and the most that this one does.
pub const PAYLOAD_LENGTH_MAX: u32 = 32 << 20;
/// The most extents that one block status chunk should carry.
pub const EXTENTS_MAX: usize = 1 << 20;
/// The TCP port that IANA reserves for NBD.
pub const PORT: u16 = 10809;
