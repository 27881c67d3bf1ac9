//! Finding plugins, and which of several filters of one name is meant.

use crate::{LoadError, Plugin, PluginDriver, load};
use std::{
    env,
    ffi::{OsStr, OsString},
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The variable that names directories of plugins, as `PATH` names those of programs.
const VARIABLE: &str = "DRIVELINE_PLUGIN_PATH";

/// Where plugins are looked for, in order: the directories given, those of `DRIVELINE_PLUGIN_PATH`, and the one that
/// the program is in.
pub fn search_path(given: &[PathBuf]) -> Vec<PathBuf> {
    let named = env::var_os(VARIABLE).unwrap_or_default();
    let beside = env::current_exe().ok().and_then(|program| program.parent().map(Path::to_owned));
    let named = env::split_paths(&named).filter(|directory| !directory.as_os_str().is_empty());
    let mut directories: Vec<PathBuf> = Vec::new();
    for directory in given.iter().cloned().chain(named).chain(beside) {
        if !directories.contains(&directory) {
            directories.push(directory);
        }
    }
    directories
}

/// What is not as it might be; none of it keeps other plugins from being used.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Problem {
    /// A plugin was not loaded.
    Load(LoadError),
    /// A directory could not be read.
    Directory {
        /// Which.
        path: PathBuf,
        /// What the system says.
        why: String,
    },
    /// A file has the name of one that was found before.
    HiddenFile {
        /// The file.
        path: PathBuf,
        /// The one found before.
        by: PathBuf,
    },
    /// A filter has the name of one that was found before.
    HiddenFilter {
        /// Its name.
        name: String,
        /// The file that it is in.
        path: PathBuf,
        /// The one that is used.
        by: PathBuf,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Load(error) => error.fmt(f),
            Problem::Directory { path, why } => write!(f, "plugin directory {}: {why}", path.display()),
            Problem::HiddenFile { path, by } => {
                write!(f, "plugin {}: not used, {} comes first", path.display(), by.display())
            }
            Problem::HiddenFilter { name, path, by } => {
                write!(
                    f,
                    "plugin {}: its filter '{name}' is not used, {} comes first",
                    path.display(),
                    by.display()
                )
            }
        }
    }
}

/// The drivers of a program's plugins, by name.
#[derive(Debug, Default)]
pub struct Loader {
    drivers: Vec<Arc<PluginDriver>>,
    files: Vec<(OsString, PathBuf)>,
    problems: Vec<Problem>,
}

impl Loader {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Loads a plugin. Of its filters those whose names are new become drivers of this loader; the others are in
    /// the plugin still, for who means just this file.
    pub fn load(&mut self, path: &Path) -> Result<&'static Plugin, LoadError> {
        let plugin = load(path)?;
        for driver in plugin.drivers() {
            match self.driver(driver.name()) {
                Some(used) if Arc::ptr_eq(used, driver) => {}
                Some(used) => {
                    let (name, path) = (driver.name().to_owned(), path.to_owned());
                    let by = used.path().to_owned();
                    self.problems.push(Problem::HiddenFilter { name, path, by });
                }
                None => self.drivers.push(driver.clone()),
            }
        }
        Ok(plugin)
    }

    /// Loads all plugins of a directory, in the order of their names. A bad one does not keep others out.
    pub fn load_dir(&mut self, directory: &Path) {
        let entries = fs::read_dir(directory).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let mut names: Vec<OsString> = match entries {
            Ok(entries) => {
                entries.into_iter().map(|entry| entry.file_name()).filter(|name| is_plugin(name)).collect()
            }
            Err(error) => {
                self.problems.push(Problem::Directory { path: directory.to_owned(), why: error.to_string() });
                return;
            }
        };
        names.sort();
        for name in names {
            let path = directory.join(&name);
            if let Some((_, by)) = self.files.iter().find(|(other, _)| *other == name) {
                if !same_file(&path, by) {
                    self.problems.push(Problem::HiddenFile { path, by: by.clone() });
                }
                continue;
            }
            self.files.push((name, path.clone()));
            if let Err(error) = self.load(&path) {
                self.problems.push(Problem::Load(error));
            }
        }
    }

    /// Loads all plugins of several directories; see [`search_path`].
    pub fn load_all(&mut self, directories: &[PathBuf]) {
        for directory in directories {
            self.load_dir(directory);
        }
    }

    /// The driver of that name.
    pub fn driver(&self, name: &str) -> Option<&Arc<PluginDriver>> {
        self.drivers.iter().find(|driver| driver.name() == name)
    }

    /// All drivers.
    pub fn drivers(&self) -> &[Arc<PluginDriver>] {
        &self.drivers
    }

    /// What was not as it might be.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

fn is_plugin(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with("libdriveline_filter_") && name.ends_with(".so"))
}

fn same_file(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}
