//! What goes wrong with a graph: a kind to match on, where, and what was expected.

use std::{fmt, sync::Arc};

/// The outcome of something done to a graph.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Kinds of errors, few and open-ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// A name that nothing has.
    NotFound,
    /// A name that something has already.
    Exists,
    /// An option, argument or configuration that cannot be.
    Invalid,
    /// A permission that another user does not share.
    NotPermitted,
    /// It is in use.
    Busy,
    /// The driver cannot do it.
    NotSupported,
    /// A range that is not inside the node.
    OutOfRange,
    /// An image that is not what it should be.
    Corrupt,
    /// No space.
    NoSpace,
    /// The world failed: a read, a write, an open.
    Io,
}

impl Kind {
    /// The errno that says it best.
    pub fn errno(self) -> i32 {
        match self {
            Kind::NotFound => 2,
            Kind::Exists => 17,
            Kind::Invalid | Kind::OutOfRange => 22,
            Kind::NotPermitted => 1,
            Kind::Busy => 16,
            Kind::NotSupported => 95,
            Kind::NoSpace => 28,
            Kind::Corrupt | Kind::Io => 5,
        }
    }

    /// The kind of an errno.
    pub fn of_errno(errno: i32) -> Self {
        match errno {
            1 | 13 => Kind::NotPermitted,
            2 => Kind::NotFound,
            11 | 16 => Kind::Busy,
            17 => Kind::Exists,
            22 => Kind::Invalid,
            27 | 28 | 122 => Kind::NoSpace,
            95 => Kind::NotSupported,
            _ => Kind::Io,
        }
    }
}

/// An error: kind, where, what.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: Kind,
    errno: i32,
    node: Option<Arc<str>>,
    key: Option<Arc<str>>,
    message: Arc<str>,
}

impl Error {
    /// An error with a text that says what was expected.
    pub fn new(kind: Kind, message: impl fmt::Display) -> Self {
        let message = message.to_string().into();
        Self(Box::new(Inner { kind, errno: kind.errno(), node: None, key: None, message }))
    }

    /// An error of the world: an errno, and what was being done.
    pub fn io(errno: i32, doing: impl fmt::Display) -> Self {
        let os = std::io::Error::from_raw_os_error(errno);
        let mut error = Self::new(Kind::of_errno(errno), format_args!("{doing}: {os}"));
        error.0.errno = errno;
        error
    }

    /// An error of the world that has a text already.
    pub fn io_text(errno: i32, text: impl fmt::Display) -> Self {
        let mut error = Self::new(Kind::of_errno(errno), text);
        error.0.errno = errno;
        error
    }

    /// The same, at a node (the innermost one that is named stays).
    #[must_use]
    pub fn at(mut self, node: &str) -> Self {
        self.0.node.get_or_insert_with(|| node.into());
        self
    }

    /// The same, about an option of the node.
    #[must_use]
    pub fn key(mut self, key: &str) -> Self {
        if !key.is_empty() {
            self.0.key = Some(key.into());
        }
        self
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// A positive errno.
    pub fn errno_code(&self) -> i32 {
        self.0.errno
    }

    /// The node at fault.
    pub fn node(&self) -> Option<&str> {
        self.0.node.as_deref()
    }

    /// The option at fault.
    pub fn option(&self) -> Option<&str> {
        self.0.key.as_deref()
    }

    /// What is wrong, without where.
    pub fn message(&self) -> &str {
        &self.0.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(node) = &self.0.node {
            write!(f, "node '{node}': ")?;
        }
        if let Some(key) = &self.0.key {
            write!(f, "option '{key}': ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {}

impl From<driveline_op::Error> for Error {
    fn from(error: driveline_op::Error) -> Self {
        let text = error.to_string();
        let mut out = Self::new(Kind::of_errno(error.code()), text);
        out.0.errno = error.code();
        out
    }
}

impl From<driveline_bitmap::Error> for Error {
    fn from(error: driveline_bitmap::Error) -> Self {
        use driveline_bitmap::Error as Bitmap;
        if let Bitmap::Store { errno, .. } = error {
            let mut out = Self::new(Kind::of_errno(errno), error);
            out.0.errno = errno;
            return out;
        }
        let kind = match error {
            Bitmap::NotFound { .. } => Kind::NotFound,
            Bitmap::NameTaken { .. } => Kind::Exists,
            Bitmap::Refused { .. } => Kind::Busy,
            _ => Kind::Invalid,
        };
        Self::new(kind, error)
    }
}
