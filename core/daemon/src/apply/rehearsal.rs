//! What a rehearsal leaves out, and what it looks at because it opens without locks.

use super::{
    plan::{Plan, Step},
    state::{Child, Shape},
};
use driveline_graph::{Error, Kind, Layout, NodeView, Result, Role};
use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::MetadataExt,
    path::PathBuf,
};

impl Plan {
    /// Without what only a server can tell: to be connected to has an effect on it, and one that takes a single client has had it then.
    /// So nodes that are its clients are not opened, nor those above them, and what would lead to them is not tried.
    pub(super) fn without_servers(&self) -> Self {
        let opened = |step: &Step| matches!(step, Step::Open(..));
        let mut far: BTreeSet<&str> = BTreeSet::new();
        loop {
            let found = self.steps.iter().filter_map(|step| match step {
                Step::Open(name, shape) if is_far(shape, &far) => Some(name.as_str()),
                _ => None,
            });
            let found: BTreeSet<&str> = found.collect();
            if found == far {
                break;
            }
            far = found;
        }
        let leads = |step: &&Step| match step {
            Step::NewDrive(_, drive) => far.contains(drive.root.as_str()),
            Step::Lead { after, .. } => far.contains(after.as_str()),
            _ => false,
        };
        let led: BTreeSet<&str> = self.steps.iter().filter(leads).filter_map(Step::drive).collect();
        let is_left_out = |step: &Step| match step {
            Step::Open(name, _) => far.contains(name.as_str()),
            Step::Reopen(_, shape, _) => is_far(shape, &far),
            Step::Repoint { after, .. } => after.as_ref().is_some_and(|after| far.contains(after.as_str())),
            step => step.drive().is_some_and(|drive| led.contains(drive)),
        };
        // What is not led away from a node is in the way of its end.
        let in_the_way = self.steps.iter().any(|step| !opened(step) && is_left_out(step));
        let left_out = |step: &Step| is_left_out(step) || in_the_way && matches!(step, Step::Close(..));
        let steps = self.steps.iter().filter(|step| !left_out(step)).cloned().collect();
        Self { steps, ..Self::default() }
    }

    /// Refuses to open an image that is written through another node, which gives it up only when the change is made.
    ///
    /// Errors: those that its file's lock would have in the end.
    pub(super) fn refuse_in_use(&self, before: &Layout, after: &Layout) -> Result<()> {
        let mut in_use: BTreeMap<(u64, u64), (PathBuf, NodeView)> = BTreeMap::new();
        for view in before.nodes() {
            let name = view.node.name();
            let stops = after.view_node(name).is_ok_and(|after| after.read_only);
            if let Some((file, path, is_written)) = image_file(before, &view)
                && is_written
                && !stops
            {
                in_use.insert(file, (path, view));
            }
        }
        for step in &self.steps {
            let Step::Open(name, shape) = step else { continue };
            let Ok(view) = after.view_node(name) else { continue };
            let there = image_file(after, &view).and_then(|(file, ..)| in_use.get(&file));
            if let Some((path, user)) = there
                && self.takes_locks(shape)
            {
                let user = user.node.name();
                let when = match after.view_node(user) {
                    Ok(_) => "",
                    Err(_) => ", which is closed only afterwards; while it runs, a node keeps its name",
                };
                let text = format_args!("'{}' is in use by node '{user}'{when}", path.display());
                return Err(Error::new(Kind::Busy, text).at(name).key("file"));
            }
        }
        Ok(())
    }

    /// Is the file of a new image locked, once it is opened for good?
    fn takes_locks(&self, shape: &Shape) -> bool {
        let opened = |wanted: &String| {
            self.steps.iter().find_map(|step| match step {
                Step::Open(name, shape) if name == wanted => Some(shape),
                _ => None,
            })
        };
        let file = match shape.children.get("file") {
            Some(Child::Inside(shape)) => Some(&**shape),
            Some(Child::Named(name)) => opened(name),
            None | Some(Child::None) => None,
        };
        let shares = shape.options.get("force-share").and_then(|value| value.as_bool()).unwrap_or_default();
        let locks =
            |file: &Shape| file.options.get("locking").and_then(|value| value.as_str()) != Some("off");
        !shares && file.is_some_and(locks)
    }
}

impl Step {
    /// The drive that it is about.
    fn drive(&self) -> Option<&str> {
        match self {
            Step::NewDrive(name, _) | Step::EndDrive(name) => Some(name),
            Step::Lead { drive, .. } | Step::Holder { drive, .. } | Step::Store { drive, .. } => Some(drive),
            Step::NewBitmap { drive, .. } | Step::Record { drive, .. } | Step::EndBitmap { drive, .. } => {
                Some(drive)
            }
            _ => None,
        }
    }
}

/// Is it a server's client, or above one?
fn is_far(shape: &Shape, far: &BTreeSet<&str>) -> bool {
    let below = |child: &Child| match child {
        Child::Named(name) => far.contains(name.as_str()),
        Child::Inside(shape) => is_far(shape, far),
        Child::None => false,
    };
    shape.driver == "nbd" || shape.children.values().any(below)
}

/// The file of an image of a format, which nobody else may write to: what it is, its name, and whether it is locked for writing.
fn image_file(layout: &Layout, view: &NodeView) -> Option<((u64, u64), PathBuf, bool)> {
    let storage = view.children.iter().find(|child| child.role == Role::Storage)?;
    let file = layout.view_node(&storage.node).ok()?;
    let path = file.node.open_node().filename()?;
    let there = std::fs::metadata(&path).ok()?;
    let locks = file.node.open_node().details()["locks"]["used"].take();
    let is_written = locks.as_str().is_some_and(|used| used.split(", ").any(|used| used == "write"));
    Some(((there.dev(), there.ino()), path, is_written))
}
