//! A cursor over received bytes, and everything that can be wrong with them.

use super::STRING_LENGTH_MAX;

/// Why bytes are not the message that they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The message ends inside a field.
    #[error("message ends {missing} bytes too early")]
    Truncated {
        /// How many bytes the field still needed.
        missing: usize,
    },
    /// Bytes follow the last field.
    #[error("{length} bytes too many at the end of the message")]
    Trailing {
        /// How many.
        length: usize,
    },
    /// The message does not begin with its magic number.
    #[error("magic number is {found:#x}, expected {expected:#x}")]
    Magic {
        /// What begins such a message.
        expected: u64,
        /// What stood there.
        found: u64,
    },
    /// A string is longer than [`STRING_LENGTH_MAX`].
    #[error("string of {length} bytes, at most {STRING_LENGTH_MAX} are allowed")]
    StringTooLong {
        /// The length that the peer announced.
        length: usize,
    },
    /// A string is not UTF-8 or contains NUL.
    #[error("string is not UTF-8 without NUL")]
    NotText,
    /// A field has a value that its message rules out.
    #[error("{field} must not be {value}")]
    Field {
        /// The field's name in proto.md.
        field: &'static str,
        /// What stood there.
        value: u64,
    },
}

/// Reads fields from the front of a message.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes }
    }

    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        match self.bytes.split_at_checked(length) {
            Some((head, rest)) => {
                self.bytes = rest;
                Ok(head)
            }
            None => Err(Malformed::Truncated { missing: length - self.bytes.len() }),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        match self.bytes.split_first_chunk::<N>() {
            Some((head, rest)) => {
                self.bytes = rest;
                Ok(*head)
            }
            None => Err(Malformed::Truncated { missing: N - self.bytes.len() }),
        }
    }

    pub(super) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn magic_u32(&mut self, expected: u32) -> Result<(), Malformed> {
        let found = self.u32()?;
        if found == expected {
            Ok(())
        } else {
            Err(Malformed::Magic { expected: expected.into(), found: found.into() })
        }
    }

    pub(super) fn magic_u64(&mut self, expected: u64) -> Result<(), Malformed> {
        let found = self.u64()?;
        if found == expected { Ok(()) } else { Err(Malformed::Magic { expected, found }) }
    }

    /// A string whose length is already known.
    ///
    /// The limit is checked before the end of the message, so that a string announced as too long is called that.
    pub(super) fn string(&mut self, length: usize) -> Result<&'a str, Malformed> {
        if length > STRING_LENGTH_MAX {
            return Err(Malformed::StringTooLong { length });
        }
        let bytes = self.take(length)?;
        match std::str::from_utf8(bytes) {
            Ok(text) if !bytes.contains(&0) => Ok(text),
            _ => Err(Malformed::NotText),
        }
    }

    /// A string behind a 32-bit length.
    pub(super) fn string_u32(&mut self) -> Result<&'a str, Malformed> {
        let length = self.u32()? as usize;
        self.string(length)
    }

    /// Everything that is left, as one string.
    pub(super) fn string_rest(&mut self) -> Result<&'a str, Malformed> {
        self.string(self.bytes.len())
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len()
    }

    /// The message must be used up.
    pub(super) fn finish(self) -> Result<(), Malformed> {
        match self.bytes.len() {
            0 => Ok(()),
            length => Err(Malformed::Trailing { length }),
        }
    }
}

/// Appends `text` behind its 32-bit length.
pub(super) fn put_string_u32(out: &mut Vec<u8>, text: &str) {
    debug_assert!(text.len() <= STRING_LENGTH_MAX);
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}
