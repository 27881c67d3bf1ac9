//! The drivers of a program: those built in, and filters from plugins.

use driveline_drivers::{
    CopyBeforeWriteDriver, FileDriver, MemoryDriver, NbdDriver, NullDriver, QuorumDriver, RawDriver,
    SnapshotAccessDriver, qcow2::Qcow2Driver,
};
use driveline_graph::{Driver, DriverKind, Graph, GraphOptions};
use driveline_loader::{Loader, PluginDriver, Problem, search_path};
use driveline_transport::TlsRegistry;
use std::{
    collections::BTreeSet,
    env,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Makes the built-in drivers known to a graph.
pub fn register_builtin(graph: &Graph) {
    register_builtin_with(graph, &TlsRegistry::default());
}

/// The same; nodes find credentials for TLS in `tls`.
pub fn register_builtin_with(graph: &Graph, tls: &TlsRegistry) {
    let drivers: Vec<Arc<dyn Driver>> = vec![
        Arc::new(FileDriver::default()),
        Arc::new(FileDriver::host_device()),
        Arc::new(MemoryDriver::default()),
        Arc::new(NbdDriver::new(tls.clone())),
        Arc::new(NullDriver::default()),
        Arc::new(RawDriver::default()),
        Arc::new(CopyBeforeWriteDriver::default()),
        Arc::new(SnapshotAccessDriver::default()),
        Arc::new(Qcow2Driver::default()),
        Arc::new(QuorumDriver::default()),
    ];
    let null = NullDriver::of_qemu().into_iter().map(|driver| Arc::new(driver) as Arc<dyn Driver>);
    for driver in drivers.into_iter().chain(null) {
        graph.register(driver).expect("built-in drivers come first, and have names of their own");
    }
}

/// The drivers of images and of what they are in. All others are filters: those of plugins, and some that are built in.
pub(crate) fn kinds_of_data() -> BTreeSet<String> {
    let graph = Graph::new(GraphOptions::default());
    register_builtin(&graph);
    let data = graph.drivers().into_iter().filter(|driver| driver.kind != DriverKind::Filter);
    data.map(|driver| driver.name.to_string()).collect()
}

/// Filters that were found, and what kept others from being used.
#[derive(Debug, Default)]
pub struct Filters {
    /// One for each name.
    pub drivers: Vec<Arc<PluginDriver>>,
    /// Plugins that were asked for by path and cannot be used: the path, and why.
    pub refused: Vec<(PathBuf, String)>,
    /// What is worth a warning.
    pub warnings: Vec<String>,
}

/// Where filters are looked for: what is `given`, `DRIVELINE_PLUGIN_PATH`, and beside the program. A program that cargo
/// put into `target/PROFILE/deps` (a test) finds those in `target/PROFILE`, too.
pub fn places(given: &[PathBuf]) -> Vec<PathBuf> {
    let mut places = search_path(given);
    let program = env::current_exe().ok();
    let directory = program.as_deref().and_then(Path::parent);
    if let Some(directory) = directory.filter(|directory| directory.ends_with("deps"))
        && let Some(above) = directory.parent()
    {
        places.push(above.to_owned());
    }
    places
}

/// Loads the filters of `given` (libraries, or directories of them) and of the other [`places`].
pub fn load_filters(given: &[PathBuf]) -> Filters {
    let mut loader = Loader::new();
    let mut filters = Filters::default();
    let (libraries, directories): (Vec<_>, Vec<_>) = given.iter().cloned().partition(|path| path.is_file());
    for library in libraries {
        if let Err(error) = loader.load(&library) {
            filters.refused.push((library, error.to_string()));
        }
    }
    let (there, missing): (Vec<_>, Vec<_>) = directories.into_iter().partition(|path| path.is_dir());
    let no_directory = |path| (path, "there is no such directory or library".to_owned());
    filters.refused.extend(missing.into_iter().map(no_directory));
    loader.load_all(&places(&there));
    for problem in loader.problems() {
        match problem {
            // A filter of the given path that comes before the one beside the program is there to do so.
            Problem::HiddenFile { .. } | Problem::HiddenFilter { .. } => tracing::debug!("{problem}"),
            problem => filters.warnings.push(problem.to_string()),
        }
    }
    filters.drivers = loader.drivers().to_vec();
    filters
}

/// Makes filters known to a graph. One with the name of a built-in driver is left out, with a warning.
pub fn register_filters(graph: &Graph, filters: &mut Filters) {
    for driver in &filters.drivers {
        if let Err(error) = graph.register(driver.clone()) {
            filters.warnings.push(format!("plugin {}: {error}", driver.path().display()));
        }
    }
}
