//! From what runs to what a file says: the steps between them, as a list that can be read before anything is done.

use super::state::{BitmapShape, Child, DriveShape, ExportShape, Inserted, Shape, State};
use driveline_drivers::Bytes;
use std::{collections::BTreeMap, fmt};

/// Steps, in the order in which they are shown. They are made together, in one change of the graph.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    /// What cannot be done while it runs, and why. A plan with one is not carried out.
    pub(crate) refused: Vec<Refused>,
    /// What no file has and stays all the same, a line each.
    pub(crate) kept: Vec<String>,
}

/// One step.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Step {
    /// A node is opened.
    Open(String, Shape),
    /// A node is opened anew with other options, in its place.
    Reopen(String, Shape, Vec<Difference>),
    /// A node gets another child.
    Repoint { node: String, child: String, before: Option<String>, after: Option<String> },
    /// A node is closed.
    Close(String, String),
    /// A filter that was put in without a name is taken out. What it is, and what it is above.
    TakeOut(String, Inserted),
    /// It is put in again, because the plan that took it out could not be carried out.
    PutBack(String, Inserted),
    /// There is a new drive.
    NewDrive(String, DriveShape),
    /// A drive leads to another node.
    Lead { drive: String, before: String, after: String },
    /// A drive is forgotten. Its images stay.
    EndDrive(String),
    /// A drive gets a holder for good, or loses it.
    Holder { drive: String, permanent: bool },
    /// The bitmaps of a drive are kept elsewhere.
    Store { drive: String, place: crate::config::StorePlace },
    /// A drive gets a bitmap, clean.
    NewBitmap { drive: String, name: String, shape: BitmapShape },
    /// A bitmap records from now on, or no more.
    Record { drive: String, name: String, recording: bool },
    /// A bitmap is removed for good. Only if that was asked for.
    EndBitmap { drive: String, name: String },
    /// Something is served.
    NewExport(String, ExportShape),
    /// It is served in another way; clients have to connect anew.
    ChangeExport(String, ExportShape, Vec<Difference>),
    /// It is not served any more.
    EndExport(String),
}

/// What differs: where, what it is, and what it is to be. Empty: it is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    pub(crate) at: String,
    pub(crate) before: String,
    pub(crate) after: String,
}

/// Something that cannot be done while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    /// The table of the file: `drive`, and the name there.
    pub(crate) table: &'static str,
    pub(crate) name: String,
    pub(crate) why: String,
}

/// The steps from `running` to `wanted`. Bitmaps that the file does not name are kept, unless they are to be `pruned`.
pub(crate) fn plan(running: &State, wanted: &State, prune: bool) -> Plan {
    let mut plan = Plan::default();
    for (name, shape) in &wanted.nodes {
        match running.nodes.get(name) {
            None => plan.steps.push(Step::Open(name.clone(), shape.clone())),
            Some(before) => plan.node(name, before, shape),
        }
    }
    for name in gone(&running.inserted, &wanted.inserted) {
        let inserted = &running.inserted[name];
        match &inserted.stays {
            None => plan.steps.push(Step::TakeOut(name.clone(), inserted.clone())),
            Some(why) => {
                let driver = &inserted.shape.driver;
                plan.kept.push(format!("= node {name} ({driver}) stays: {why}"));
            }
        }
    }
    // From the lowest to the uppermost, whose numbers are in that order.
    for name in gone(&wanted.inserted, &running.inserted) {
        plan.steps.push(Step::PutBack(name.clone(), wanted.inserted[name].clone()));
    }
    for (name, drive) in &wanted.drives {
        match running.drives.get(name) {
            None => plan.steps.push(Step::NewDrive(name.clone(), drive.clone())),
            Some(before) => plan.drive(name, before, drive, prune),
        }
    }
    for name in gone(&running.drives, &wanted.drives) {
        plan.end_drive(name, &running.drives[name], prune);
    }
    for name in gone(&running.nodes, &wanted.nodes) {
        plan.steps.push(Step::Close(name.clone(), running.nodes[name].driver.clone()));
    }
    for (name, export) in &wanted.exports {
        match running.exports.get(name) {
            None => plan.steps.push(Step::NewExport(name.clone(), export.clone())),
            Some(before) if before == export => {}
            Some(before) => {
                let step =
                    Step::ChangeExport(name.clone(), export.clone(), export_differences(before, export));
                plan.steps.push(step);
            }
        }
    }
    for name in gone(&running.exports, &wanted.exports) {
        plan.steps.push(Step::EndExport(name.clone()));
    }
    plan
}

fn gone<'a, T>(running: &'a BTreeMap<String, T>, wanted: &BTreeMap<String, T>) -> Vec<&'a String> {
    running.keys().filter(|name| !wanted.contains_key(*name)).collect()
}

impl Plan {
    fn node(&mut self, name: &str, before: &Shape, after: &Shape) {
        let mut found = Vec::new();
        differences(
            before,
            after,
            before.read_only.filter(|_| before.is_auto_read_only()).or(Some(false)),
            "",
            &mut found,
        );
        // Children that have names of their own can be exchanged while the node stays as it is.
        let (children, rest): (Vec<_>, Vec<_>) = found.into_iter().partition(|found| found.is_child);
        if !rest.is_empty() {
            let all = rest.into_iter().chain(children).map(|found| found.difference).collect();
            return self.steps.push(Step::Reopen(name.to_owned(), after.clone(), all));
        }
        for Found { difference: Difference { at, before, after }, .. } in children {
            let some = |text: String| (!text.is_empty()).then_some(text);
            let step =
                Step::Repoint { node: name.to_owned(), child: at, before: some(before), after: some(after) };
            self.steps.push(step);
        }
    }

    fn end_drive(&mut self, name: &str, before: &DriveShape, prune: bool) {
        let names =
            |of: Vec<&String>| of.iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ");
        let why = if !before.checkpoints.is_empty() {
            let checkpoints = names(before.checkpoints.iter().collect());
            format!("it has checkpoints ({checkpoints}), which would end with it; delete them first")
        } else if !before.bitmaps.is_empty() && !prune {
            let bitmaps = names(before.bitmaps.keys().collect());
            format!(
                "it has bitmaps ({bitmaps}), which would end with it; remove them first, or ask for that with \
                 --prune-bitmaps"
            )
        } else {
            let drive = || name.to_owned();
            let ended = before.bitmaps.keys();
            self.steps.extend(ended.map(|name| Step::EndBitmap { drive: drive(), name: name.clone() }));
            return self.steps.push(Step::EndDrive(drive()));
        };
        self.refused.push(Refused { table: "drive", name: name.to_owned(), why });
    }

    fn drive(&mut self, name: &str, before: &DriveShape, after: &DriveShape, prune: bool) {
        let drive = || name.to_owned();
        if before.root != after.root {
            let (before, after) = (before.root.clone(), after.root.clone());
            self.steps.push(Step::Lead { drive: drive(), before, after });
        }
        if before.permanent_holder != after.permanent_holder {
            self.steps.push(Step::Holder { drive: drive(), permanent: after.permanent_holder });
        }
        if let Some(place) = &after.store
            && before.store.as_ref() != Some(place)
        {
            self.steps.push(Step::Store { drive: drive(), place: place.clone() });
        }
        for (bitmap, shape) in &after.bitmaps {
            let Some(is) = before.bitmaps.get(bitmap) else {
                self.steps.push(Step::NewBitmap { drive: drive(), name: bitmap.clone(), shape: *shape });
                continue;
            };
            let other_granularity = shape.granularity.is_some_and(|bytes| is.granularity != Some(bytes));
            if other_granularity || is.view != shape.view || is.durability != shape.durability {
                let what = if other_granularity {
                    "granularity"
                } else if is.view != shape.view {
                    "view"
                } else {
                    "durability"
                };
                let why = format!(
                    "bitmap '{bitmap}' is there with another {what}, which cannot change; remove it first, or give the new one another name"
                );
                self.refused.push(Refused { table: "drive", name: drive(), why });
            } else if is.recording != shape.recording {
                let step = Step::Record { drive: drive(), name: bitmap.clone(), recording: shape.recording };
                self.steps.push(step);
            }
        }
        if prune {
            for bitmap in gone(&before.bitmaps, &after.bitmaps) {
                self.steps.push(Step::EndBitmap { drive: drive(), name: bitmap.clone() });
            }
        }
    }
}

/// A difference between nodes. It is one of the node's own children by name, or something that the node has to be opened anew for.
struct Found {
    difference: Difference,
    is_child: bool,
}

/// What differs between nodes. What the wanted one leaves out about children is the image's own business.
fn differences(before: &Shape, after: &Shape, above: Option<bool>, at: &str, found: &mut Vec<Found>) {
    let mut note = |key: &str, before: String, after: String, is_child: bool| {
        let at = if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") };
        found.push(Found { difference: Difference { at, before, after }, is_child });
    };
    if before.driver != after.driver {
        note("driver", before.driver.clone(), after.driver.clone(), false);
    }
    if before.name != after.name {
        let name = |shape: &Shape| shape.name.clone().unwrap_or_default();
        note("node-name", name(before), name(after), false);
    }
    let (is, wanted) = (before.read_only.or(above), after.read_only.or(above));
    // One that becomes read-only by itself may be that just now, and will be writable when it has to.
    let follows = before.is_auto_read_only() && after.is_auto_read_only() && wanted == Some(false);
    if is.unwrap_or(false) != wanted.unwrap_or(false) && !follows {
        let word = |is: Option<bool>| is.unwrap_or(false).to_string();
        note("read-only", word(is), word(wanted), false);
    }
    let keys =
        before.options.keys().chain(after.options.keys().filter(|key| !before.options.contains_key(*key)));
    for key in keys {
        let (is, wanted) = (before.options.get(key), after.options.get(key));
        if is != wanted {
            let text = |value: Option<&serde_json::Value>| value.map(ToString::to_string).unwrap_or_default();
            note(key, text(is), text(wanted), false);
        }
    }
    let own = at.is_empty();
    let mut inside = Vec::new();
    for (child, wanted) in &after.children {
        match (before.children.get(child), wanted) {
            (Some(Child::Named(is)), Child::Named(wanted)) if is == wanted => {}
            (Some(Child::Named(is)), Child::Named(wanted)) => note(child, is.clone(), wanted.clone(), own),
            (Some(Child::Inside(is)), Child::Inside(wanted)) => inside.push((child, is, wanted)),
            (None | Some(Child::None), Child::None) => {}
            (is, wanted) => {
                let text = |child: Option<&Child>| match child {
                    None | Some(Child::None) => String::new(),
                    Some(Child::Named(name)) => name.clone(),
                    Some(Child::Inside(shape)) => format!("({})", shape.driver),
                };
                note(child, text(is), text(Some(wanted)), false);
            }
        }
    }
    for (child, is, wanted) in inside {
        let at = if at.is_empty() { child.clone() } else { format!("{at}.{child}") };
        // A node that is defined in place is read-only as the one around it, unless it says otherwise.
        let by_itself = after.read_only != Some(false) || child == "backing" || is.is_auto_read_only();
        let above = if by_itself { is.read_only } else { Some(false) };
        differences(is, wanted, above, &at, found);
    }
}

fn export_differences(before: &ExportShape, after: &ExportShape) -> Vec<Difference> {
    let members = |of: &ExportShape| {
        let export = &of.export;
        [
            ("shows", export.target.clone()),
            ("at", of.at.to_string()),
            ("name", export.name.clone()),
            ("writable", export.writable.to_string()),
            ("bitmaps", export.bitmaps.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>().join(", ")),
            ("allocation-depth", export.allocation_depth.to_string()),
            ("description", export.description.clone()),
            ("tls", export.tls.clone().unwrap_or_default()),
        ]
    };
    let pairs = members(before).into_iter().zip(members(after));
    let differ = pairs.filter(|(before, after)| before != after);
    differ.map(|((at, before), (_, after))| Difference { at: at.to_owned(), before, after }).collect()
}

impl Step {
    /// The node or drive that it changes, where a job could count on it.
    pub(super) fn changes(&self) -> Option<&str> {
        match self {
            Step::Reopen(name, ..) | Step::Repoint { node: name, .. } | Step::Close(name, _) => Some(name),
            Step::TakeOut(name, _) => Some(name),
            Step::Lead { drive, .. } | Step::EndDrive(drive) | Step::Holder { drive, .. } => Some(drive),
            Step::Store { drive, .. } | Step::EndBitmap { drive, .. } => Some(drive),
            _ => None,
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |text: &str| if text.is_empty() { "none".to_owned() } else { text.to_owned() };
        write!(f, "{}: {} -> {}", self.at, word(&self.before), word(&self.after))
    }
}

/// As a line of a diff: `+` comes, `-` goes, `~` changes.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |differences: &[Difference]| {
            differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        };
        match self {
            Step::Open(name, shape) => write!(f, "+ node {name} ({})", shape.driver),
            Step::Reopen(name, _, differences) => {
                write!(f, "~ node {name}, opened anew  {}", list(differences))
            }
            Step::Repoint { node, child, before, after } => {
                let word = |node: &Option<String>| node.clone().unwrap_or_else(|| "none".to_owned());
                write!(f, "~ node {node}  {child}: {} -> {}", word(before), word(after))
            }
            Step::Close(name, driver) => write!(f, "- node {name} ({driver})"),
            Step::TakeOut(name, inserted) => {
                write!(f, "- node {name} ({}), which was put above {}", inserted.shape.driver, inserted.above)
            }
            Step::PutBack(_, inserted) => {
                write!(f, "+ node ({}) above {}", inserted.shape.driver, inserted.above)
            }
            Step::NewDrive(name, drive) => write!(f, "+ drive {name}  root {}", drive.root),
            Step::Lead { drive, before, after } => write!(f, "~ drive {drive}  root: {before} -> {after}"),
            Step::EndDrive(name) => write!(f, "- drive {name}"),
            Step::Holder { drive, permanent: true } => write!(f, "~ drive {drive}  gets a holder for good"),
            Step::Holder { drive, permanent: false } => write!(f, "~ drive {drive}  loses its holder"),
            Step::Store { drive, place } => write!(f, "~ drive {drive}  bitmaps are kept in {place}"),
            Step::NewBitmap { drive, name, shape } => {
                write!(f, "+ bitmap {drive}/{name}")?;
                match shape.granularity {
                    Some(bytes) => write!(f, "  {}, clean", Bytes(bytes)),
                    None => write!(f, "  clean"),
                }
            }
            Step::Record { drive, name, recording } => {
                write!(f, "~ bitmap {drive}/{name}  recording: {} -> {recording}", !recording)
            }
            Step::EndBitmap { drive, name } => write!(f, "- bitmap {drive}/{name}  for good"),
            Step::NewExport(id, export) => {
                write!(f, "+ export {id}  shows {} at {}", export.export.target, export.at)
            }
            Step::ChangeExport(id, _, differences) => {
                write!(f, "~ export {id}, clients connect anew  {}", list(differences))
            }
            Step::EndExport(id) => write!(f, "- export {id}  clients are disconnected"),
        }
    }
}

#[cfg(test)]
mod tests;
