//! What an operation fails with.

use crate::shim::node_name;
use driveline_abi::{Status, op};
use std::fmt;

/// The failure of an operation: an errno, and perhaps a text for the log.
///
/// Only the errno travels upwards (see [`Status`]); the text is logged, with the node's name, where the operation ends.
pub struct Error {
    errno: i32,
    /// On the heap, so that the result of an operation stays small.
    detail: Option<Box<Detail>>,
}

struct Detail {
    key: Box<str>,
    message: Box<str>,
}

/// The outcome of an operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// `EIO`.
    pub const IO: Self = Self::errno(5);
    /// `EINVAL`.
    pub const INVALID: Self = Self::errno(22);
    /// `ENOSPC`.
    pub const NO_SPACE: Self = Self::errno(28);
    /// `ENOTSUP`.
    pub const NOT_SUPPORTED: Self = Self::errno(95);
    /// `EPERM`.
    pub const NOT_PERMITTED: Self = Self::errno(1);
    /// `ENOMEM`.
    pub const NO_MEMORY: Self = Self::errno(12);

    /// An error with nothing to add to its number (a positive errno; others read as `EIO`).
    pub const fn errno(errno: i32) -> Self {
        Self { errno: if errno > 0 { errno } else { 5 }, detail: None }
    }

    /// An error that says more; the text goes to the log.
    pub fn new(errno: i32, message: impl fmt::Display) -> Self {
        let detail = Detail { key: "".into(), message: message.to_string().into() };
        Self { detail: Some(Box::new(detail)), ..Self::errno(errno) }
    }

    /// The same error, saying more; the text goes to the log.
    ///
    /// ```
    /// let refused = driveline_op::Error::NOT_PERMITTED.because("the label is read-only");
    /// assert_eq!(refused.to_string(), "the label is read-only (Operation not permitted (os error 1))");
    /// ```
    #[must_use]
    pub fn because(self, message: impl fmt::Display) -> Self {
        Self::new(self.errno, message)
    }

    /// `EINVAL` about an option of the node.
    pub fn option(key: &str, message: impl fmt::Display) -> Self {
        let detail = Detail { key: key.into(), message: message.to_string().into() };
        Self { detail: Some(Box::new(detail)), ..Self::INVALID }
    }

    /// `EINVAL` with a text.
    pub fn invalid(message: impl fmt::Display) -> Self {
        Self::new(22, message)
    }

    /// The errno.
    pub fn code(&self) -> i32 {
        self.errno
    }

    /// The text, without the errno.
    pub fn message(&self) -> Option<&str> {
        self.detail.as_deref().map(|detail| &*detail.message)
    }

    /// The option at fault, if it is about one.
    pub fn key(&self) -> Option<&str> {
        self.detail.as_deref().map(|detail| &*detail.key).filter(|key| !key.is_empty())
    }

    /// The number that crosses the boundary; the text is logged, because it stays behind.
    pub(crate) fn into_status(self, cookie: u64, operation: u32) -> Status {
        if let Some(message) = self.message() {
            let operation = op::NAMES[operation as usize];
            tracing::warn!(node = node_name(cookie), operation, errno = self.errno, "{message}");
        }
        Status(-self.errno)
    }

    /// The error of a status that is neither done nor pending. A panic below reads as `EIO`.
    pub(crate) fn of(status: Status) -> Self {
        if status == Status::PANICKED { Self::IO } else { Self::errno(status.0.wrapping_neg()) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let os = std::io::Error::from_raw_os_error(self.errno);
        match (self.key(), self.message()) {
            (Some(key), Some(message)) => write!(f, "option '{key}': {message}"),
            (None, Some(message)) => write!(f, "{message} ({os})"),
            _ => write!(f, "{os}"),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self::errno(errno),
            None => Self::new(5, error),
        }
    }
}
