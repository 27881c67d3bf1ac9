//! Why a plugin was not loaded.

use std::path::PathBuf;

/// Why a plugin was not loaded: which file, what was expected, what was found; one line.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// There is no such file, or it cannot be read.
    #[error("plugin {path}: {why}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        why: String,
    },
    /// It is not a whole shared library for this machine.
    #[error("plugin {path}: expected a shared library for this machine, found {found}", path = path.display())]
    NotALibrary {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: String,
    },
    /// The dynamic linker refuses it.
    #[error("plugin {path}: the dynamic linker says: {why}", path = path.display())]
    Linker {
        /// The file.
        path: PathBuf,
        /// What the linker says.
        why: String,
    },
    /// A shared library, but no plugin of ours.
    #[error("plugin {path}: expected a Driveline filter plugin, found {found}", path = path.display())]
    NotAPlugin {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: String,
    },
    /// Built for another major version of the ABI.
    #[error(
        "plugin {path}: expected filter ABI {expected}, found {found}; rebuild it with an SDK for ABI {major}.x",
        path = path.display(), major = expected.split('.').next().unwrap_or_default()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// This program's.
        expected: String,
        /// The plugin's.
        found: String,
    },
    /// It says that it speaks our ABI, but its types are others.
    #[error(
        "plugin {path}: it says filter ABI {found}, but its types differ from this program's at {first}",
        path = path.display()
    )]
    Layout {
        /// The file.
        path: PathBuf,
        /// The version that it claims.
        found: String,
        /// The innermost difference.
        first: String,
    },
    /// It would take the program down with its first panic.
    #[error("plugin {path}: expected a build with panic = \"unwind\", found panic = \"abort\"", path = path.display())]
    PanicsAbort {
        /// The file.
        path: PathBuf,
    },
    /// Its own start failed.
    #[error("plugin {path}: its start failed: {why}", path = path.display())]
    Start {
        /// The file.
        path: PathBuf,
        /// What it says.
        why: String,
    },
    /// A filter in it cannot be.
    #[error("plugin {path}: filter '{filter}': {why}", path = path.display())]
    Filter {
        /// The file.
        path: PathBuf,
        /// The filter.
        filter: String,
        /// What is wrong.
        why: String,
    },
    /// The file was overwritten after it was loaded, so nobody knows what is in memory.
    #[error(
        "plugin {path}: it was changed in place after it was loaded; put new versions there by renaming",
        path = path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
    },
}
