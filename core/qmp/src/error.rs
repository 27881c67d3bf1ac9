//! What a command fails with: one of QMP's classes, and a text for people.

use serde::Serialize;
use std::fmt;

/// The outcome of a command.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// QMP's classes of errors. Clients match on these alone; the text may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Class {
    /// Everything that has no class of its own.
    GenericError,
    /// No such command, or not at this point of the session.
    CommandNotFound,
    /// No such device (QMP's older commands).
    DeviceNotFound,
    /// No such block job.
    DeviceNotActive,
    /// A feature of KVM is missing. Part of the protocol; nothing here returns it.
    KVMMissingCap,
}

/// An error of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Error {
    /// What clients match on.
    pub class: Class,
    /// What people read: where it went wrong and what was expected.
    pub desc: String,
}

impl Error {
    /// An error of a class.
    pub fn new(class: Class, desc: impl fmt::Display) -> Self {
        Self { class, desc: desc.to_string() }
    }

    /// An error without a class of its own.
    pub fn generic(desc: impl fmt::Display) -> Self {
        Self::new(Class::GenericError, desc)
    }

    /// Neither a drive nor a node of that name, in QEMU's words.
    pub(crate) fn no_node(name: &str) -> Self {
        Self::generic(format_args!("Cannot find device='{name}' nor node-name='{name}'"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for Error {}

/// The text of an error as QEMU's clients know it: without the option, which QEMU does not say, and without the number of
/// an error of the system.
pub(crate) fn plain(error: &driveline_graph::Error) -> String {
    let text = error.node().map_or_else(|| error.message().to_owned(), |_| error.to_string());
    without_number(&text).to_owned()
}

/// A text without the number of an error of the system at its end.
pub(crate) fn without_number(text: &str) -> &str {
    let number = text.rfind(" (os error ").filter(|_| text.ends_with(')'));
    number.map_or(text, |at| &text[..at])
}

impl From<driveline_graph::Error> for Error {
    fn from(error: driveline_graph::Error) -> Self {
        Self::generic(error)
    }
}
