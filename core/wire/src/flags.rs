//! Sets of bits with names.

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign, Not};

macro_rules! flags {
    ($(#[$meta:meta])* $name:ident: $int:ty { $($(#[$doc:meta])* $flag:ident = $bit:expr;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$doc])* pub const $flag: $name = $name(1 << $bit);)*

            /// No flag.
            pub const EMPTY: $name = $name(0);
            /// Every flag that has a name.
            pub const KNOWN: $name = $name(0 $(| 1 << $bit)*);

            /// Whether all flags of `other` are set.
            pub const fn contains(self, other: $name) -> bool {
                self.0 & other.0 == other.0
            }

            /// `self` and `other` if `condition`, else `self` alone.
            #[must_use]
            pub const fn with(self, other: $name, condition: bool) -> $name {
                if condition { $name(self.0 | other.0) } else { self }
            }

            /// What is set beyond `allowed`.
            #[must_use]
            pub const fn beyond(self, allowed: $name) -> $name {
                $name(self.0 & !allowed.0)
            }

            /// Whether nothing is set.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }
        }

        impl BitOr for $name {
            type Output = $name;
            fn bitor(self, other: $name) -> $name {
                $name(self.0 | other.0)
            }
        }

        impl BitOrAssign for $name {
            fn bitor_assign(&mut self, other: $name) {
                self.0 |= other.0;
            }
        }

        impl BitAnd for $name {
            type Output = $name;
            fn bitand(self, other: $name) -> $name {
                $name(self.0 & other.0)
            }
        }

        impl Not for $name {
            type Output = $name;
            fn not(self) -> $name {
                $name(!self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut separator = "";
                $(if self.contains($name::$flag) {
                    write!(f, "{separator}{}", stringify!($flag))?;
                    separator = "|";
                })*
                let unnamed = self.beyond($name::KNOWN);
                if !unnamed.is_empty() || self.is_empty() {
                    write!(f, "{separator}{:#x}", unnamed.0)?;
                }
                Ok(())
            }
        }
    };
}

flags! {
    /// What the server can do in the handshake.
    HandshakeFlags: u16 {
        /// Options are answered one by one.
        FIXED_NEWSTYLE = 0;
        /// The 124 zeroes after `EXPORT_NAME` may be left out.
        NO_ZEROES = 1;
    }
}

flags! {
    /// What the client takes up of [`HandshakeFlags`].
    ClientFlags: u32 {
        /// As [`HandshakeFlags::FIXED_NEWSTYLE`].
        FIXED_NEWSTYLE = 0;
        /// As [`HandshakeFlags::NO_ZEROES`].
        NO_ZEROES = 1;
    }
}

flags! {
    /// What an export can do.
    TransmissionFlags: u16 {
        /// Always set.
        HAS_FLAGS = 0;
        /// Writes are refused.
        READ_ONLY = 1;
        /// [`Command::FLUSH`](super::Command::FLUSH) works.
        SEND_FLUSH = 2;
        /// [`CommandFlags::FUA`] works.
        SEND_FUA = 3;
        /// Seeks are slow.
        ROTATIONAL = 4;
        /// [`Command::TRIM`](super::Command::TRIM) works.
        SEND_TRIM = 5;
        /// [`Command::WRITE_ZEROES`](super::Command::WRITE_ZEROES) works.
        SEND_WRITE_ZEROES = 6;
        /// [`CommandFlags::DF`] works.
        SEND_DF = 7;
        /// A flush on one connection covers writes of all.
        CAN_MULTI_CONN = 8;
        /// Reserved for an extension that nobody speaks.
        SEND_RESIZE = 9;
        /// [`Command::CACHE`](super::Command::CACHE) works.
        SEND_CACHE = 10;
        /// [`CommandFlags::FAST_ZERO`] works.
        SEND_FAST_ZERO = 11;
        /// A block status request may name its contexts in a payload.
        BLOCK_STATUS_PAYLOAD = 12;
    }
}

flags! {
    /// How a request is to be done.
    CommandFlags: u16 {
        /// Durable before it is answered.
        FUA = 0;
        /// Zeroes must stay allocated.
        NO_HOLE = 1;
        /// Answer a read with one content chunk.
        DF = 2;
        /// Answer with one extent per context.
        REQ_ONE = 3;
        /// Zero fast or not at all.
        FAST_ZERO = 4;
        /// The length is that of a payload (extended headers only).
        PAYLOAD_LEN = 5;
    }
}

flags! {
    /// Flags of a reply chunk.
    ReplyFlags: u16 {
        /// The last chunk of its reply.
        DONE = 0;
    }
}

flags! {
    /// Status of an extent in the context `base:allocation`.
    AllocationFlags: u64 {
        /// Nothing is allocated; writing may fail for lack of space.
        HOLE = 0;
        /// Reads as zeroes.
        ZERO = 1;
    }
}
