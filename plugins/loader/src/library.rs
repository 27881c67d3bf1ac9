//! Opening a library, one check after the other, and keeping it.

use crate::{LoadError, PluginDriver, driver, elf, host, layout};
use abi_stable::{
    library::{AbiHeader, AbiHeaderRef, LibHeader, ROOT_MODULE_LOADER_NAME_WITH_NUL, RootModule},
    sabi_types::VersionNumber,
};
use driveline_abi::PluginModRef;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    fs::{File, Metadata},
    mem::ManuallyDrop,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

/// A library that passed all checks. It stays for the life of the process.
#[derive(Debug)]
pub struct Plugin {
    /// The file that it was loaded from.
    pub path: PathBuf,
    /// The version of the ABI that it was built for.
    pub abi_version: String,
    pub(crate) drivers: Vec<Arc<PluginDriver>>,
    module: Module,
}

#[derive(Clone, Copy)]
struct Module(PluginModRef);

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Module")
    }
}

impl Plugin {
    /// Its filters.
    pub fn drivers(&self) -> &[Arc<PluginDriver>] {
        &self.drivers
    }
}

/// A file as the system knows it: two paths to it are one plugin.
type FileId = (u64, u64);
/// What changes when a file is written to.
type Stamp = (u64, i64, i64);

static LOADED: Mutex<Option<HashMap<FileId, (Stamp, &'static Plugin)>>> = Mutex::new(None);

fn stamp(metadata: &Metadata) -> Stamp {
    (metadata.size(), metadata.mtime(), metadata.mtime_nsec())
}

/// Loads a plugin, or finds it among those that are loaded: a path, a symbolic link and a hard link to one file are
/// one plugin, a copy is another. A new file under an old name is another, too, so both versions can be in use.
pub fn load(path: &Path) -> Result<&'static Plugin, LoadError> {
    let unreadable = |why: String| LoadError::Unreadable { path: path.to_owned(), why };
    let io = |error: std::io::Error| unreadable(error.to_string());
    // Looked at before it is opened: to open a pipe would wait.
    if !path.metadata().map_err(io)?.is_file() {
        return Err(unreadable("expected a regular file".into()));
    }
    let file = File::open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    let (id, stamp) = ((metadata.dev(), metadata.ino()), stamp(&metadata));
    // Held to the end: nobody loads the same file at the same time.
    let mut loaded = LOADED.lock();
    let loaded = loaded.get_or_insert_default();
    if let Some((then, plugin)) = loaded.get(&id) {
        return if *then == stamp { Ok(plugin) } else { Err(LoadError::Changed { path: path.to_owned() }) };
    }
    elf::check(&file, metadata.size())
        .map_err(|found| LoadError::NotALibrary { path: path.to_owned(), found })?;
    let plugin: &'static Plugin = Box::leak(Box::new(open(path, file)?));
    loaded.insert(id, (stamp, plugin));
    Ok(plugin)
}

/// Opens, checks and starts a library.
fn open(path: &Path, file: File) -> Result<Plugin, LoadError> {
    // By descriptor: for a path that it has seen the linker returns what it loaded then, though another file is
    // there now. The number stays taken, so that it never names another library.
    let by_descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
    // SAFETY: the file's constructors run. That is what it means to load a plugin: the administrator trusts it.
    let library = unsafe { Library::open(Some(&by_descriptor), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
        let why = match &error {
            libloading::Error::DlOpen { source, .. } => source.to_string(),
            other => other.to_string(),
        };
        LoadError::Linker {
            path: path.to_owned(),
            why: why.replace(&format!("{by_descriptor}: "), "").replace(&by_descriptor, "it"),
        }
    })?;
    match checked(path, &library) {
        Ok((module, version)) => {
            std::mem::forget(file);
            // From here on the library may have threads, and the program pointers into it.
            let _library = ManuallyDrop::new(library);
            start(path, module, version)
        }
        Err(error) => {
            drop(library);
            close_or_keep(&by_descriptor, file);
            Err(error)
        }
    }
}

/// Gives the descriptor's number back, unless the linker kept the library under that name.
fn close_or_keep(by_descriptor: &str, file: File) {
    const RTLD_NOLOAD: std::ffi::c_int = libc::RTLD_NOLOAD;
    // SAFETY: loads nothing.
    let kept = unsafe { Library::open(Some(by_descriptor), RTLD_NOW | RTLD_NOLOAD) };
    if kept.is_ok() {
        std::mem::forget(file);
    }
}

/// The checks on an open library, up to what must not be undone. It may be closed if they fail.
fn checked(path: &Path, library: &Library) -> Result<(PluginModRef, VersionNumber), LoadError> {
    let not_a_plugin = |found: String| LoadError::NotAPlugin { path: path.to_owned(), found };
    // SAFETY: where the symbol exists it is a `static LibHeader`, whose address is that of its first member.
    let header: AbiHeaderRef =
        match unsafe { library.get::<AbiHeaderRef>(ROOT_MODULE_LOADER_NAME_WITH_NUL.as_bytes()) } {
            Ok(symbol) => *symbol,
            Err(_) => {
                return Err(not_a_plugin(
                    "a library without a plugin's header, which export_filters! writes".into(),
                ));
            }
        };
    if header.magic_string != AbiHeader::VALUE.magic_string {
        return Err(not_a_plugin("a library with another header under its name".into()));
    }
    if !header.is_valid() {
        let (major, minor) = (header.abi_major, header.abi_minor);
        return Err(not_a_plugin(format!(
            "a library built with abi_stable {major}.{minor} (it must be {}.{})",
            AbiHeader::VALUE.abi_major,
            AbiHeader::VALUE.abi_minor
        )));
    }
    let header: &'static LibHeader =
        header.upgrade().map_err(|error| not_a_plugin(one_line(&error.to_string())))?;
    let name = header.root_mod_consts().name();
    if name.as_str() != PluginModRef::NAME {
        return Err(not_a_plugin(format!("a '{}'", one_line(name.as_str()))));
    }
    let theirs =
        header.version_strings().parsed().map_err(|_| not_a_plugin("no version of the ABI".into()))?;
    let ours = PluginModRef::VERSION_STRINGS.parsed().expect("our own version parses");
    if theirs.major != ours.major {
        let (expected, found) = (ours.to_string(), theirs.to_string());
        return Err(LoadError::Version { path: path.to_owned(), expected, found });
    }
    let types =
        header.layout().ok_or_else(|| not_a_plugin("a plugin that does not describe its types".into()))?;
    layout::check(types, ours, theirs).map_err(|first| LoadError::Layout {
        path: path.to_owned(),
        found: theirs.to_string(),
        first,
    })?;
    // SAFETY: the layout was checked just now.
    let module = unsafe { header.unchecked_layout::<PluginModRef>() }
        .map_err(|error| not_a_plugin(one_line(&error.to_string())))?;
    if !module.panics_unwind() {
        return Err(LoadError::PanicsAbort { path: path.to_owned() });
    }
    Ok((module, theirs))
}

/// Gives the plugin its host and looks at its filters.
fn start(path: &Path, module: PluginModRef, version: VersionNumber) -> Result<Plugin, LoadError> {
    (module.init())(host::api())
        .into_result()
        .map_err(|error| LoadError::Start { path: path.to_owned(), why: one_line(&error.message) })?;
    let path: Arc<Path> = path.into();
    let mut drivers: Vec<Arc<PluginDriver>> = Vec::new();
    for description in (module.filters())().iter() {
        let refuse = |why: String| LoadError::Filter {
            path: path.to_path_buf(),
            filter: one_line(description.name().as_str()),
            why,
        };
        let driver = PluginDriver::new(path.clone(), *description).map_err(refuse)?;
        if drivers.iter().any(|other| other.name() == driver.name()) {
            return Err(refuse("expected each name once, found it twice".into()));
        }
        drivers.push(Arc::new(driver));
    }
    if drivers.is_empty() {
        return Err(LoadError::NotAPlugin {
            path: path.to_path_buf(),
            found: "a plugin without filters".into(),
        });
    }
    driver::announce(&path, &drivers);
    Ok(Plugin { path: path.to_path_buf(), abi_version: version.to_string(), drivers, module: Module(module) })
}

/// Tells all plugins that the program's log filter has changed.
pub fn log_refresh() {
    let plugins: Vec<_> =
        LOADED.lock().iter().flat_map(|loaded| loaded.values().map(|(_, plugin)| *plugin)).collect();
    for plugin in plugins {
        (plugin.module.0.log_refresh())();
    }
}

fn one_line(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = text.char_indices().nth(300) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}
