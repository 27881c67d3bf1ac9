//! The edits of the graph that a plan asks for, in one change.

use super::{
    plan::{Plan, Step},
    state::{Child, Shape, State, holder_of},
};
use crate::stores::Going;
use driveline_bitmap::View;
use driveline_graph::{Change, Definition, Error, Graph, Kind, Layout, NewBitmap, Options, Result, Role};
use driveline_jobs::HOLDER_DRIVER;
use std::collections::BTreeSet;

/// Puts all edits of the graph into one change. Nodes come before whoever refers to them, and go after. `edit` may alter the
/// definitions of new nodes first. `going` puts the bitmaps of nodes away that go.
pub(super) async fn stage(
    graph: &Graph,
    change: &mut Change,
    plan: &Plan,
    before: &State,
    edit: impl Fn(Definition) -> Definition,
    going: Option<&mut Going>,
) -> Result<()> {
    let new = |step: &Step| match step {
        Step::Open(name, shape) => Some(definition(name, shape)),
        _ => None,
    };
    let definitions: Vec<Options> = plan.steps.iter().filter_map(new).collect();
    let names: Vec<String> =
        definitions.iter().filter_map(|d| Some(d.get("node-name")?.as_str()?.to_owned())).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let parsed = definitions.into_iter().map(|definition| graph.parse(definition, &names).map(&edit));
    change.add_nodes(parsed.collect::<Result<_>>()?).await?;
    for step in &plan.steps {
        let staged = match step {
            Step::EndDrive(name) => end_drive(graph, change, name, &plan.ended_bitmaps(name)),
            step => stage_step(graph, change, step, before).await,
        };
        staged.map_err(|error| at(error, step))?;
    }
    // From the top down: a node goes when nobody refers to it any more.
    let mut closing: Vec<&str> = plan
        .steps
        .iter()
        .filter_map(|step| match step {
            Step::Close(name, _) => Some(name.as_str()),
            _ => None,
        })
        .collect();
    if let Some(going) = going {
        // What images hold goes home before they are closed.
        closing.iter().try_for_each(|name| going.put_away(change, name).map(drop))?;
    }
    while !closing.is_empty() {
        let mut last = None;
        let left = closing.len();
        closing.retain(|name| match change.remove_emptied_node(name) {
            Ok(()) => false,
            Err(error) => {
                last = Some(error);
                true
            }
        });
        if let (true, Some(error)) = (closing.len() == left, last) {
            return Err(error);
        }
    }
    Ok(())
}

async fn stage_step(graph: &Graph, change: &mut Change, step: &Step, before: &State) -> Result<()> {
    match step {
        Step::Reopen(name, shape, _) => {
            let mut shape = shape.clone();
            // What the file leaves out about children is as it is.
            for (child, is) in &before.nodes[name].children {
                shape.children.entry(child.clone()).or_insert_with(|| is.clone());
            }
            let definition = change.parse(definition(name, &shape))?;
            change.reopen(definition)
        }
        Step::Repoint { node, child, after, .. } => change.set_child(node, child, after.as_deref()),
        Step::NewDrive(name, drive) => {
            change.set_drive(name, &drive.root)?;
            if drive.permanent_holder { holder(change, name).await } else { Ok(()) }
        }
        Step::TakeOut(name, _) => take_out(graph, change, name),
        Step::PutBack(_, inserted) => {
            change.insert_filter(inside(&inserted.shape), &inserted.above).await.map(drop)
        }
        Step::Lead { drive, before, after } => lead(graph, change, drive, before, after).await,
        Step::Holder { drive, permanent: true } => {
            holder(change, drive).await?;
            // Those of the drive's nodes record what is done to them there.
            for (node, bitmap) in graph.bitmap_places(drive)? {
                if bitmap.view() == View::Drive {
                    change.move_bitmap(&node, bitmap.name().as_str(), &holder_of(drive))?;
                }
            }
            Ok(())
        }
        Step::Holder { drive, permanent: false } => {
            let holder = holder_of(drive);
            for (node, bitmap) in graph.bitmap_places(drive)? {
                if *node == *holder {
                    change.bring_home(&holder, bitmap.name().as_str(), drive)?;
                }
            }
            change.remove_emptied_filter(&holder)
        }
        Step::NewBitmap { drive, name, shape } => {
            let new = NewBitmap {
                name: name.clone(),
                granularity: shape.granularity,
                view: shape.view,
                recording: shape.recording,
                durability: shape.durability,
            };
            change.add_bitmap(drive, new)
        }
        Step::Record { drive, name, recording: true } => change.enable_bitmap(drive, name),
        Step::Record { drive, name, recording: false } => change.disable_bitmap(drive, name),
        Step::EndBitmap { drive, name } => change.remove_bitmap(drive, name),
        Step::Open(..) | Step::Close(..) | Step::EndDrive(_) | Step::Store { .. } => Ok(()),
        Step::NewExport(..) | Step::ChangeExport(..) | Step::EndExport(..) => Ok(()),
    }
}

/// A filter goes that has no name. Bitmaps that it has are those of the data below it.
fn take_out(graph: &Graph, change: &mut Change, name: &str) -> Result<()> {
    let data = graph.chain(name)?.remove(0);
    for bitmap in graph.view_node(name)?.bitmaps {
        change.move_bitmap(name, bitmap.name().as_str(), data.name())?;
    }
    change.remove_emptied_filter(name)
}

/// A drive leads to another node. Its bitmaps know what changed in the data that it had: so that has to stay, below
/// other filters perhaps, and they go to the new root where their own node goes away. What no file names and stays (a holder
/// for good, the filter of a view) stays above that.
async fn lead(graph: &Graph, change: &mut Change, drive: &str, from: &str, to: &str) -> Result<()> {
    let places = graph.bitmap_places(drive)?;
    let data = graph.chain(drive)?.remove(0);
    if !places.is_empty() && change.first_format(to)? != data.id() {
        let message = format_args!(
            "drive '{drive}' has bitmaps, which say nothing of the data of '{to}'; remove them first"
        );
        return Err(Error::new(Kind::Invalid, message));
    }
    let stay = above(&change.layout(), drive, from);
    match stay.last() {
        Some((node, child)) => change.set_child(node, child, Some(to))?,
        None => change.set_drive(drive, to)?,
    }
    for (node, bitmap) in places {
        let stays = *node == *data.name() || stay.iter().any(|(name, _)| **name == *node);
        // One of a filter that was taken out is on its way already.
        if !stays && change.has_node(&node) {
            change.move_bitmap(&node, bitmap.name().as_str(), to)?;
        }
    }
    Ok(())
}

/// The filters between a drive and a node, from the top down, each with the child that leads on.
fn above(layout: &Layout, drive: &str, node: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let root = layout.drives().into_iter().find(|view| *view.name == *drive).map(|view| view.root);
    let mut at = root.map(|root| root.to_string()).filter(|root| root != node);
    while let Some(name) = at {
        let Ok(view) = layout.view_node(&name) else { return Vec::new() };
        let Some(next) = view.children.iter().find(|child| child.role == Role::Filtered) else {
            return Vec::new();
        };
        found.push((name, next.name.clone()));
        at = Some(next.node.to_string()).filter(|below| below != node);
    }
    found
}

/// A drive's bitmaps end with it, so there must be none but those that are put away, and those that end in the same plan.
fn end_drive(graph: &Graph, change: &mut Change, name: &str, ending: &BTreeSet<&str>) -> Result<()> {
    let bitmaps = graph.bitmaps(name)?;
    let left = bitmaps.iter().map(|bitmap| bitmap.name());
    let left: Vec<String> =
        left.filter(|bitmap| !ending.contains(bitmap.as_str())).map(|bitmap| format!("'{bitmap}'")).collect();
    if !left.is_empty() {
        let message = format_args!(
            "drive '{name}' has bitmaps ({}), which would end with it; remove them first",
            left.join(", ")
        );
        return Err(Error::new(Kind::Busy, message));
    }
    let holder = holder_of(name);
    if graph.node(&holder).is_ok_and(|node| node.driver_name() == HOLDER_DRIVER) {
        change.remove_filter(&holder)?;
    }
    change.remove_drive(name)
}

async fn holder(change: &mut Change, drive: &str) -> Result<()> {
    let mut holder = Options::new();
    holder.insert("driver".into(), HOLDER_DRIVER.into());
    holder.insert("node-name".into(), holder_of(drive).into());
    change.insert_filter(holder, drive).await.map(drop)
}

/// A node as the graph reads it.
fn definition(name: &str, shape: &Shape) -> Options {
    let mut definition = inside(shape);
    definition.insert("node-name".into(), name.into());
    definition
}

fn inside(shape: &Shape) -> Options {
    let mut definition = shape.options.clone();
    definition.insert("driver".into(), shape.driver.as_str().into());
    if let Some(name) = &shape.name {
        definition.insert("node-name".into(), name.as_str().into());
    }
    if let Some(read_only) = shape.read_only {
        definition.insert("read-only".into(), read_only.into());
    }
    for (child, of) in &shape.children {
        let value = match of {
            Child::Named(name) => name.as_str().into(),
            Child::Inside(shape) => inside(shape).into(),
            Child::None => serde_json::Value::Null,
        };
        definition.insert(child.clone(), value);
    }
    definition
}

/// An error that names no node is about what the step names.
fn at(error: Error, step: &Step) -> Error {
    match (error.node(), step) {
        (None, Step::Reopen(name, ..) | Step::Repoint { node: name, .. }) => error.at(name),
        _ => error,
    }
}
