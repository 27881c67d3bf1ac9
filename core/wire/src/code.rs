//! Numbers with names: commands, options, reply types.
//!
//! Each is a newtype and not an enum, since a peer may send a number that no one has named yet, and the answer to that
//! is a reply, not a decoding failure.

use std::fmt;

macro_rules! codes {
    ($(#[$meta:meta])* $name:ident: $int:ty { $($(#[$doc:meta])* $code:ident = $value:expr;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$doc])* pub const $code: $name = $name($value);)*

            /// The name in proto.md without its prefix, for a value that has one.
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $($name::$code => Some(stringify!($code)),)*
                    _ => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "{}({:#x})", stringify!($name), self.0),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self, f)
            }
        }
    };
}

codes! {
    /// What a request of the transmission phase asks for (`NBD_CMD_*`).
    Command: u16 {
        /// Read a range.
        READ = 0;
        /// Write a range; the data follows the header.
        WRITE = 1;
        /// End the session; there is no reply.
        DISC = 2;
        /// Make all completed writes durable.
        FLUSH = 3;
        /// Hint that a range is not needed: discard.
        TRIM = 4;
        /// Hint that a range will be read soon.
        CACHE = 5;
        /// Write zeroes without sending them.
        WRITE_ZEROES = 6;
        /// Ask for the selected metadata contexts of a range.
        BLOCK_STATUS = 7;
        /// Reserved for an extension that nobody speaks.
        RESIZE = 8;
    }
}

codes! {
    /// What an option of the handshake asks for (`NBD_OPT_*`).
    OptionCode: u32 {
        /// Choose an export and start transmission, without a way to refuse.
        EXPORT_NAME = 1;
        /// End the session.
        ABORT = 2;
        /// Name all exports.
        LIST = 3;
        /// Withdrawn.
        PEEK_EXPORT = 4;
        /// Upgrade the connection to TLS.
        STARTTLS = 5;
        /// Describe one export.
        INFO = 6;
        /// Describe one export and start transmission.
        GO = 7;
        /// Use structured replies.
        STRUCTURED_REPLY = 8;
        /// Name the metadata contexts of an export.
        LIST_META_CONTEXT = 9;
        /// Choose the metadata contexts for block status.
        SET_META_CONTEXT = 10;
        /// Use extended headers.
        EXTENDED_HEADERS = 11;
    }
}

codes! {
    /// What the reply to an option says (`NBD_REP_*`). Errors have bit 31 set.
    ReplyCode: u32 {
        /// Done, nothing (more) to say.
        ACK = 1;
        /// One export of a list.
        SERVER = 2;
        /// One aspect of an export.
        INFO = 3;
        /// One metadata context.
        META_CONTEXT = 4;
        /// The option is not known here.
        ERR_UNSUP = ERROR_BIT | 1;
        /// The option is forbidden here.
        ERR_POLICY = ERROR_BIT | 2;
        /// The option is malformed or out of place.
        ERR_INVALID = ERROR_BIT | 3;
        /// The platform cannot do this.
        ERR_PLATFORM = ERROR_BIT | 4;
        /// TLS has to come first.
        ERR_TLS_REQD = ERROR_BIT | 5;
        /// No such export.
        ERR_UNKNOWN = ERROR_BIT | 6;
        /// The server is going away.
        ERR_SHUTDOWN = ERROR_BIT | 7;
        /// The client has to ask for block sizes.
        ERR_BLOCK_SIZE_REQD = ERROR_BIT | 8;
        /// The option or its answer is too large.
        ERR_TOO_BIG = ERROR_BIT | 9;
        /// Extended headers have to come first, or rule this out.
        ERR_EXT_HEADER_REQD = ERROR_BIT | 10;
    }
}

const ERROR_BIT: u32 = 1 << 31;

impl ReplyCode {
    /// Whether the option failed. Unknown errors are errors too.
    pub const fn is_error(self) -> bool {
        self.0 & ERROR_BIT != 0
    }
}

codes! {
    /// Which aspect of an export (`NBD_INFO_*`).
    InfoType: u16 {
        /// Size and transmission flags.
        EXPORT = 0;
        /// The canonical name.
        NAME = 1;
        /// A text for humans.
        DESCRIPTION = 2;
        /// Minimum and preferred block size, largest payload.
        BLOCK_SIZE = 3;
    }
}

codes! {
    /// What a chunk of a structured or extended reply carries (`NBD_REPLY_TYPE_*`). Errors have bit 15 set.
    ChunkType: u16 {
        /// Nothing: the reply is complete.
        NONE = 0;
        /// Data of a read.
        OFFSET_DATA = 1;
        /// A range of a read that is all zeroes.
        OFFSET_HOLE = 2;
        /// Extents of one metadata context, 32 bits wide.
        BLOCK_STATUS = 5;
        /// Extents of one metadata context, 64 bits wide.
        BLOCK_STATUS_EXT = 6;
        /// The request failed.
        ERROR = 1 << 15 | 1;
        /// The request failed at an offset.
        ERROR_OFFSET = 1 << 15 | 2;
    }
}

impl ChunkType {
    /// Whether the request failed. Unknown errors are errors too.
    pub const fn is_error(self) -> bool {
        self.0 & 1 << 15 != 0
    }
}

/// The client's name for a request in flight; the server gives it back untouched. Older texts call it *handle*.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cookie(pub u64);

/// The session's number for a selected metadata context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContextId(pub u32);
