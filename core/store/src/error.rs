//! What can be wrong with a store, each with the file, what was found and what was expected.

use std::io;
use std::path::PathBuf;

use driveline_bitmap::BitmapName;

use crate::Uuid;

/// Why something could not be done with a store. Nothing changed when one of these is returned, but for what its text says.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried: "write the header of".
        what: &'static str,
        /// The file of the store.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody has it open, this process or another one.
    #[error("{path} is in use: another process, or a bitmap of this one, holds its lock")]
    Locked {
        /// The file of the store.
        path: PathBuf,
    },
    /// It is some other file.
    #[error("{path} is no store of bitmaps: it begins with {found}, expected \"DRVLSTOR\"")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        found: String,
    },
    /// It was written by a later version.
    #[error("{path} has version {found} of the format, expected {expected}")]
    Version {
        /// The file of the store.
        path: PathBuf,
        /// The version that it has.
        found: u32,
        /// The version that is known.
        expected: u32,
    },
    /// Both headers are damaged so much that not even the bitmaps' names can be told.
    #[error("{path}: both headers are damaged and no bitmap can be told from them ({reason})")]
    NamesLost {
        /// The file of the store.
        path: PathBuf,
        /// What is wrong with the headers.
        reason: String,
    },
    /// It is a store, but of something else.
    #[error("{path} is store {found}, expected {expected}")]
    Uuid {
        /// The file of the store.
        path: PathBuf,
        /// Which store it is.
        found: Uuid,
        /// Which store was expected.
        expected: Uuid,
    },
    /// It is an old copy.
    #[error("{path} is generation {found} of its store, expected at least {expected}")]
    Generation {
        /// The file of the store.
        path: PathBuf,
        /// The generation that it has.
        found: u64,
        /// The oldest generation that was expected.
        expected: u64,
    },
    /// It counts no more.
    #[error("{path} counts no more: its bitmaps moved to {by_path} (store {by})")]
    Superseded {
        /// The file of the store.
        path: PathBuf,
        /// The store that counts in its place.
        by: Uuid,
        /// Where that was made.
        by_path: PathBuf,
    },
    /// It is a copy that never came to count.
    #[error("{path} does not count: it is a copy of {from_path} (store {from}), {reason}")]
    Incoming {
        /// The file of the store.
        path: PathBuf,
        /// The store that it was copied from.
        from: Uuid,
        /// Where that was.
        from_path: PathBuf,
        /// Why it does not count.
        reason: String,
    },
    /// The header has no room for what should be in it.
    #[error("the header of {path} would take {found} bytes, expected at most {expected}")]
    HeaderFull {
        /// The file of the store.
        path: PathBuf,
        /// Bytes that it would take.
        found: usize,
        /// Bytes that there are.
        expected: usize,
    },
    /// An option has a value that makes no sense.
    #[error("{option} is {found}, expected {expected}")]
    Option {
        /// Which one.
        option: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
    /// It is not what this can be done to.
    #[error("cannot {operation} {path}: {reason}")]
    State {
        /// What was asked for.
        operation: &'static str,
        /// The file of the store.
        path: PathBuf,
        /// What is in the way.
        reason: &'static str,
    },
}

/// The result of an operation on a store.
pub type Result<T> = core::result::Result<T, Error>;

impl Error {
    /// The system's number for it.
    pub(crate) fn errno(&self) -> i32 {
        let rustix_io = rustix::io::Errno::IO.raw_os_error();
        match self {
            Error::Io { source, .. } => source.raw_os_error().unwrap_or(rustix_io),
            Error::HeaderFull { .. } => rustix::io::Errno::NOSPC.raw_os_error(),
            _ => rustix_io,
        }
    }

    /// The same for who knows bitmaps only.
    pub(crate) fn of_bitmap(&self, name: &BitmapName) -> driveline_bitmap::Error {
        let text = match self {
            Error::Io { source, .. } => format!("{self}: {source}"),
            _ => self.to_string(),
        };
        driveline_bitmap::Error::Store { name: name.to_string(), text, errno: self.errno() }
    }
}
