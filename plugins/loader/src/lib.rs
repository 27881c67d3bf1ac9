//! Filter plugins: found, opened, checked, and made into drivers.
//!
//! A plugin is a shared library built with `driveline-sdk`. Before anything of one is used, its file is looked at, its
//! header read, its version compared and the layout of every type on the boundary checked, in that order; what
//! fails says so in one line that names the file, what was expected and what was found. A library that made it
//! to its own `init` is never closed again: pointers to it may be anywhere. (What a corrupt file does to the dynamic
//! linker cannot be contained in a process; [`probe`] looks at a file in another one.)
//!
//! It is not the graph: what becomes of operations that a filter lacks is decided there, from a driver's
//! [`Description`](driveline_graph::Description). It is not the SDK, which is the other side of the boundary.
//!
//! Three nouns:
//! * [`Plugin`]: a library that passed, kept for the life of the process;
//! * [`PluginDriver`]: one of its filters, as the graph's [`Driver`](driveline_graph::Driver);
//! * [`HostServices`]: what filters may ask of the program: time, and to be told of panics.
//!
//! ```no_run
//! use driveline_loader::{Loader, search_path};
//! let mut loader = Loader::new();
//! loader.load_all(&search_path(&[]));
//! for driver in loader.drivers() {
//!     println!("{} {}", driver.name(), driver.path().display());
//! }
//! for problem in loader.problems() {
//!     eprintln!("{problem}");
//! }
//! ```

mod driver;
mod elf;
mod error;
pub mod host;
mod layout;
mod library;
mod probe;
mod report;
mod search;

pub use driver::PluginDriver;
pub use error::LoadError;
pub use host::HostServices;
pub use library::{Plugin, load, log_refresh};
pub use probe::{Verdict, answer_probe, probe};
pub use report::{FilterReport, PluginReport, inspect};
pub use search::{Loader, Problem, search_path};
