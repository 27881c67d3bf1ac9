//! What can be wrong with a bitmap operation, each with what was expected.

use crate::Operation;

/// Why a bitmap operation was refused. Nothing changed when one of these is returned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name without a character.
    #[error("a bitmap's name is empty, expected 1 to 1023 bytes")]
    NameEmpty,
    /// A name that no image format could keep.
    #[error("bitmap name '{start}...' has {length} bytes, expected 1 to 1023")]
    NameTooLong {
        /// The first characters of the name.
        start: String,
        /// How long it is, in bytes.
        length: usize,
    },
    /// Not a power of two, or outside of what is allowed.
    #[error("granularity {found} is not a power of two between 512B and 2GiB")]
    Granularity {
        /// The text or number that was given.
        found: String,
    },
    /// Two bitmaps of one node may not share a name.
    #[error("a bitmap '{name}' exists already, expected a name that is not in use")]
    NameTaken {
        /// The name that is in use.
        name: String,
    },
    /// No bitmap with this name.
    #[error("there is no bitmap '{name}', expected {}", one_of(.present))]
    NotFound {
        /// The name that was looked for.
        name: String,
        /// The names that would have been found.
        present: Vec<String>,
    },
    /// The bitmap's state does not allow the operation.
    #[error("cannot {operation} bitmap '{name}': it is {found}, expected {expected}")]
    Refused {
        /// The bitmap.
        name: String,
        /// What was asked for.
        operation: Operation,
        /// What the bitmap is, including who uses it.
        found: String,
        /// What it would have to be.
        expected: &'static str,
    },
    /// A merge needs a source and a target of one length.
    #[error(
        "cannot merge bitmap '{source_name}' of {source_length} bytes into '{target_name}' of \
         {target_length} bytes, expected equal lengths"
    )]
    LengthsDiffer {
        /// The bitmap to merge from; empty for bits without a name.
        source_name: String,
        /// Bytes that it covers.
        source_length: u64,
        /// The bitmap to merge into; empty for bits without a name.
        target_name: String,
        /// Bytes that it covers.
        target_length: u64,
    },
    /// What keeps a persistent bitmap could not be written.
    #[error("cannot keep bitmap '{name}': {text}")]
    Store {
        /// The bitmap.
        name: String,
        /// What was done where, and what the system said.
        text: String,
        /// The system's error number.
        errno: i32,
    },
}

/// The result of a bitmap operation.
pub type Result<T> = core::result::Result<T, Error>;

fn one_of(present: &[String]) -> String {
    match present {
        [] => "none: no bitmap is attached here".to_owned(),
        [one] => format!("'{one}'"),
        several => format!("one of '{}'", several.join("', '")),
    }
}
