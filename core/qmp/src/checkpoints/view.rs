//! Views of a checkpoint: the data of its drives as it was at that moment, on exports of their own, with what changed since an
//! earlier checkpoint.
//!
//! ```text
//!   drive ─▶ copy-before-write ─▶ what was there
//!                 │  └──────▶ scratch: what is written over meanwhile
//!   export ─▶ snapshot-access            └ bitmap: since-MONDAY
//! ```
//!
//! The scratch file has no name once it is open, so that nothing of it outlives the program.

use super::Create;
use crate::{
    control::{NbdExport, RemoveMode},
    error::{Error, Result},
    image,
    monitor::Monitor,
    transaction::{Action, run},
};
use driveline_checkpoints as checkpoints;
use driveline_graph::{BoxFuture, CreatedImage, Graph, NewImage, Options, check_name};
use driveline_jobs::{Completion, Start};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

/// What is wanted of a view.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct ViewOptions {
    /// The directory of scratch files; without it, that of the drive's lowest image.
    scratch: Option<String>,
    /// Show what changed since that checkpoint, as a bitmap.
    base: Option<String>,
    /// Serve it over NBD, on the server that runs; so it is unless this is false.
    export: Option<bool>,
}

/// The view of one drive.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct View {
    pub(super) drive: String,
    /// The node that shows the moment.
    pub(super) node_name: String,
    /// The id of its export, which is its name for clients as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) export: Option<String>,
    /// The bitmap of what changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmap: Option<String>,
    /// Can the moment still be read?
    pub(super) state: ViewState,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<String>,
    #[serde(skip)]
    pub(super) filter: String,
    #[serde(skip)]
    scratch: String,
    #[serde(skip)]
    pub(super) scratch_directory: PathBuf,
}

impl View {
    /// The drive, as it was named.
    pub(super) fn drive(&self) -> &str {
        &self.drive
    }

    /// Is it that drive's?
    pub(super) fn is_of(&self, drive: &str) -> bool {
        self.drive == drive
    }
}

/// What a view is good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ViewState {
    /// It shows its moment.
    #[default]
    Serving,
    /// What a guest overwrote could not be kept, so nothing can be read of it any more.
    Lost,
}

/// Views that are there, by checkpoint. Those that are being made or ended have none in the list.
pub(crate) type Views = Mutex<BTreeMap<String, Vec<View>>>;

/// The name of a checkpoint whose view is being made, or ended: nobody else has it as long as this lives.
struct Reserved<'a> {
    all: &'a Views,
    name: String,
}

impl<'a> Reserved<'a> {
    /// Reserves a name, unless it has a view.
    fn new(all: &'a Views, name: &str) -> Option<Self> {
        let mut there = all.lock();
        if there.contains_key(name) {
            return None;
        }
        there.insert(name.to_owned(), Vec::new());
        Some(Self { all, name: name.to_owned() })
    }

    /// Takes the views of a name, which stays reserved.
    fn take(all: &'a Views, name: &str) -> Option<(Self, Vec<View>)> {
        let views = all.lock().get_mut(name).map(std::mem::take).filter(|views| !views.is_empty())?;
        Some((Self { all, name: name.to_owned() }, views))
    }

    /// These are its views.
    fn keep(self, views: Vec<View>) {
        self.all.lock().insert(self.name.clone(), views);
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut there = self.all.lock();
        if there.get(&self.name).is_some_and(Vec::is_empty) {
            there.remove(&self.name);
        }
    }
}

/// A checkpoint and its view, in one change.
struct WithView {
    create: Create,
    options: ViewOptions,
    /// Files that were made, until they are open.
    made: Vec<CreatedImage>,
    views: Arc<Mutex<Vec<View>>>,
}

/// Makes a checkpoint with a view of all of its drives, or nothing.
pub(super) async fn create(monitor: &Monitor, create: Create, options: ViewOptions) -> Result<Vec<View>> {
    let name = create.name.clone();
    // Exports and nodes are named after it.
    check_name(&name).map_err(|error| Error::generic(error.message()))?;
    let Some(reserved) = Reserved::new(monitor.views(), &name) else {
        return Err(Error::generic(format_args!("Checkpoint '{name}' has a view already")));
    };
    let is_exported = options.export.unwrap_or(true);
    let views = Arc::new(Mutex::new(Vec::new()));
    let drives = create.drives.clone();
    let action = WithView { create, options, made: Vec::new(), views: views.clone() };
    run(monitor, &mut [Box::new(action)], Completion::Individual).await?;
    let mut views = std::mem::take(&mut *views.lock());
    for view in views.iter_mut().filter(|_| is_exported) {
        let export = export(&name, view);
        match monitor.control().add_export(export).await {
            Ok(()) => view.export = Some(export_id(&name, &view.drive)),
            Err(error) => {
                let undone = take_back(monitor, &name, &drives, &views).await;
                if let Err(error) = undone {
                    tracing::error!(target: "driveline::qmp", "a checkpoint that was not made: {error}");
                    // They are still there, so somebody must be able to release them.
                    reserved.keep(views);
                }
                return Err(error);
            }
        }
    }
    reserved.keep(views.clone());
    Ok(views)
}

/// Ends the view of a checkpoint. The checkpoint stays.
pub(super) async fn release(monitor: &Monitor, name: &str) -> Result<()> {
    let Some((reserved, views)) = Reserved::take(monitor.views(), name) else {
        return Err(Error::generic(format_args!("Checkpoint '{name}' has no view")));
    };
    let ended = end(monitor, &views).await;
    if ended.is_err() {
        reserved.keep(views);
    }
    ended
}

async fn take_back(monitor: &Monitor, name: &str, drives: &[String], views: &[View]) -> Result<()> {
    end(monitor, views).await?;
    let graph = monitor.graph();
    let mut change = graph.change().await;
    for drive in drives {
        checkpoints::delete(graph, &mut change, drive, name)?;
    }
    Ok(change.commit().await?)
}

/// Takes views away: what serves them first, and then all nodes in one change.
async fn end(monitor: &Monitor, views: &[View]) -> Result<()> {
    let (graph, control) = (monitor.graph(), monitor.control());
    for id in views.iter().filter_map(|view| view.export.as_deref()) {
        if control.exports().iter().any(|export| export.id == id) {
            control.remove_export(id, RemoveMode::Hard).await?;
        }
    }
    let mut change = graph.change().await;
    for view in views {
        for (_, bitmap) in graph.bitmap_places(&view.node_name)? {
            change.remove_bitmap(&view.node_name, bitmap.name().as_str())?;
        }
        change.remove_emptied_node(&view.node_name)?;
        // Bitmaps that the drive got meanwhile are at its root, which is the filter.
        let below = graph.view_node(&view.filter)?.children.first().map(|child| child.node.clone());
        for (node, bitmap) in graph.bitmap_places(&view.filter)? {
            if let Some(below) = below.as_deref().filter(|_| *node == *view.filter) {
                change.move_bitmap(&view.filter, bitmap.name().as_str(), below)?;
            }
        }
        change.remove_emptied_filter(&view.filter)?;
        change.remove_node(&view.scratch)?;
    }
    Ok(change.commit().await?)
}

impl Action for WithView {
    fn stage<'a>(&'a mut self, monitor: &'a Monitor, start: &'a mut Start) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            // First, so that the bitmaps of the epochs are where the drive has its bitmaps, below the filters of views.
            self.create.stage(monitor, start).await?;
            for drive in self.create.drives.clone() {
                let view = self.stage_one(monitor.graph(), start, &drive).await?;
                self.views.lock().push(view);
            }
            Ok(())
        })
    }

    fn undo<'a>(&'a mut self, _: &'a Monitor) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            self.views.lock().clear();
            forget(self.made.drain(..));
        })
    }

    fn made<'a>(&'a mut self, _: &'a Monitor) -> BoxFuture<'a, ()> {
        Box::pin(async move { forget(self.made.drain(..)) })
    }
}

impl WithView {
    async fn stage_one(&mut self, graph: &Graph, start: &mut Start, drive: &str) -> Result<View> {
        let layout = start.layout();
        let path = scratch_path(self.options.scratch.as_deref(), graph, drive, &self.create.name)?;
        let scratch_directory = path.parent().map(Path::to_owned).unwrap_or_default();
        let path = path.to_string_lossy().into_owned();
        if Path::new(&path).exists() {
            return Err(Error::generic(format_args!("the scratch file '{path}' is there already")));
        }
        let size_bytes = layout.size_bytes(drive)?;
        let new = NewImage { path: path.clone(), format: "raw".to_owned(), size_bytes, backing: None };
        self.made.push(graph.create_image(&new).await?);
        let change = start.change();
        let file = object(json!({ "driver": "file", "path": path }));
        let scratch = change.add_node(graph.parse(file, &[])?).await?.name().to_owned();
        let filter = object(
            json!({ "driver": "copy-before-write", "target": scratch, "on-cbw-error": "break-snapshot" }),
        );
        let filter = change.insert_filter(filter, drive).await?.name().to_owned();
        let node = object(json!({ "driver": "snapshot-access", "file": filter }));
        let node = change.add_node(parse_beside(graph, node, &[&filter])?).await?.name().to_owned();
        let mut view = View {
            drive: drive.to_owned(),
            node_name: node,
            export: None,
            bitmap: None,
            state: ViewState::Serving,
            reason: None,
            filter,
            scratch,
            scratch_directory,
        };
        if let Some(base) = &self.options.base {
            let bitmap = format!("since-{base}");
            // Until now, which is this checkpoint: its own epoch is in the making.
            checkpoints::add_delta(graph, change, (drive, base, None), (&view.node_name, &bitmap))?;
            view.bitmap = Some(bitmap);
        }
        Ok(view)
    }
}

fn parse_beside(graph: &Graph, node: Options, beside: &[&str]) -> Result<driveline_graph::Definition> {
    Ok(graph.parse(node, beside)?)
}

/// The files have no names any more; what has them open goes on.
fn forget(made: impl Iterator<Item = CreatedImage>) {
    for image in made {
        if let Err(error) = image.remove() {
            tracing::warn!(target: "driveline::qmp", "the scratch file of a checkpoint: {error}");
        }
    }
}

fn scratch_path(said: Option<&str>, graph: &Graph, drive: &str, checkpoint: &str) -> Result<PathBuf> {
    let lowest = graph.chain(drive)?.pop().and_then(|node| image::filename(&graph.layout(), node.name()));
    let beside = lowest.as_deref().map(Path::new).filter(|file| file.is_file()).and_then(Path::parent);
    let directory = said.map(PathBuf::from).or_else(|| beside.map(Path::to_owned)).ok_or_else(|| {
        let text = format_args!(
            "drive '{drive}' has no regular file that a scratch file could be beside; expected 'scratch', a directory"
        );
        Error::generic(text)
    })?;
    Ok(directory.join(format!("{drive}.{checkpoint}.scratch")))
}

fn export_id(checkpoint: &str, drive: &str) -> String {
    format!("{checkpoint}-{drive}")
}

fn export(checkpoint: &str, view: &View) -> NbdExport {
    let id = export_id(checkpoint, &view.drive);
    NbdExport {
        name: id.clone(),
        id,
        node_name: view.node_name.clone(),
        description: Some(format!("{} as it was at checkpoint {checkpoint}", view.drive)),
        writable: false,
        writethrough: false,
        thread: None,
        allow_inactive: false,
        bitmaps: view.bitmap.iter().map(|bitmap| (None, bitmap.clone())).collect(),
        allocation_depth: false,
    }
}

fn object(value: serde_json::Value) -> Options {
    match value {
        serde_json::Value::Object(object) => object,
        _ => Options::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two monitors made checkpoints of one name on different drives at once. Both found that it had no view, and the second
    /// one's took the place of the first one's, whose nodes nobody could release any more.
    #[test]
    fn a_view_has_its_name_alone_from_its_begin_to_its_end() {
        let all = Views::default();
        let reserved = Reserved::new(&all, "monday").unwrap();
        assert!(Reserved::new(&all, "monday").is_none() && Reserved::take(&all, "monday").is_none());
        drop(reserved);
        let view = View {
            drive: "vda".into(),
            node_name: "node".into(),
            export: None,
            bitmap: None,
            state: ViewState::Serving,
            reason: None,
            filter: "filter".into(),
            scratch: "scratch".into(),
            scratch_directory: PathBuf::new(),
        };
        Reserved::new(&all, "monday").expect("the first one failed").keep(vec![view]);
        assert!(Reserved::new(&all, "monday").is_none());
        let (reserved, views) = Reserved::take(&all, "monday").unwrap();
        assert!(Reserved::new(&all, "monday").is_none() && Reserved::take(&all, "monday").is_none());
        reserved.keep(views);
        drop(Reserved::take(&all, "monday").unwrap());
        assert!(all.lock().is_empty());
    }
}
