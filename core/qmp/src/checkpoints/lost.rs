//! Views whose moment is lost: what a guest overwrote could not be kept, so the guest was let go on and the view is not.

use super::view::{View, ViewState};
use crate::{events::Event, monitor::Monitor};
use driveline_graph::Graph;

/// The point in time that `node` showed is lost. Monitors hear of it if it was that of a view.
pub(crate) fn past_lost(monitor: &Monitor, node: &str, why: &str) {
    let of_node = |view: &&View| view.filter == node;
    let found = monitor
        .views()
        .lock()
        .iter()
        .find_map(|(checkpoint, views)| Some((checkpoint.clone(), views.iter().find(of_node)?.clone())));
    let Some((checkpoint, view)) = found else {
        tracing::warn!(target: "driveline::qmp", "the point in time that node '{node}' kept is lost: {why}");
        return;
    };
    let reason = reason(&view, why);
    tracing::warn!(
        target: "driveline::qmp",
        "checkpoint '{checkpoint}': the view '{}' of drive '{}' is lost: {reason}",
        view.export.as_deref().unwrap_or(&view.node_name),
        view.drive
    );
    monitor.emit(&Event::ViewLost {
        checkpoint,
        drive: view.drive,
        node: view.node_name,
        export: view.export,
        reason,
    });
}

/// The view as it is now.
pub(super) fn looked_at(graph: &Graph, view: &View) -> View {
    let details = graph.view_node(&view.filter).map(|filter| filter.node.open_node().details());
    let details = details.unwrap_or_default();
    let mut view = view.clone();
    if details["broken"] == true {
        let why = details["broken-because"].as_str().unwrap_or("what a write overwrites could not be copied");
        view.reason = Some(reason(&view, why));
        view.state = ViewState::Lost;
    }
    view
}

/// Why it is lost, and where there may have been no room.
fn reason(view: &View, why: &str) -> String {
    format!("{why}; the target was a scratch file in {}", view.scratch_directory.display())
}
