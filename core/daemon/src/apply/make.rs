//! A plan carried out: what is served ends first and begins last, and in between is one change of the graph. What cannot be taken
//! back comes when nothing can fail any more that was not tried before.

use super::{
    back::Done,
    plan::{Plan, Step},
    stage::stage,
    state::{ExportShape, State},
};
use crate::{
    commands::harmless,
    config::{Address, Config, DriveSection},
    daemon::{Inner, new_bitmap},
    exports::Reserved,
    moved,
};
use driveline_graph::{Graph, Result};
use driveline_qmp::Event;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

impl Inner {
    /// Does what a plan says. If anything fails, what was done is taken back: then the graph is as it was, and clients of
    /// exports that were to change or to go have to connect anew. What can be refused before that, is.
    pub(super) async fn make(self: &Arc<Self>, plan: &Plan, config: &Config, before: &State) -> Result<()> {
        let reserved = self.rehearse(plan, config, before).await?;
        let (plan, last) = (plan.without_last(&self.graph), plan.last(&self.graph));
        self.exports.keep_sockets(self.sockets_that_stay(&plan));
        let mut done = Done::default();
        let made = self.make_first(&plan, config, before, reserved, &mut done).await;
        if made.is_err() {
            self.take_back(config, before, done).await;
        }
        self.exports.close_unused_sockets().await;
        made?;
        self.make_last(&last, config, before).await
    }

    /// Finds out what would be refused, without any effect: sockets are taken, and new nodes are opened read-only and without locks.
    /// No server is connected to, so what it would refuse, and what is above it, is found out when the plan is made.
    pub(super) async fn rehearse(&self, plan: &Plan, config: &Config, before: &State) -> Result<Reserved> {
        let ended: BTreeSet<&str> = plan.ended_exports().collect();
        let begun: Vec<&ExportShape> = plan.begun_exports().collect();
        for shape in &begun {
            self.exports.check(&shape.at, &shape.export, &ended)?;
        }
        let reserved = self.exports.reserve(begun.iter().map(|shape| &shape.at))?;
        for step in &plan.steps {
            // (Those of a drive that is new are found where they are.)
            if let Step::Store { drive, place } = step
                && !matches!(place, crate::config::StorePlace::Qcow2(node) if !before.nodes.contains_key(node))
            {
                self.stores.check_rebind(drive, place)?;
            }
        }
        let plan = &plan.without_servers();
        let mut change = self.graph.change().await;
        change.set_directory(&config.directory);
        for id in ended {
            change.detach_user(&format!("export '{id}'"));
        }
        // These go with the bitmaps.
        for owner in before.drives.keys().map(|name| format!("drive '{name}'")) {
            change.detach_user(&format!("bitmaps of {owner}"));
        }
        for owner in before.nodes.keys().map(|name| format!("node '{name}'")) {
            change.detach_user(&format!("bitmaps of {owner}"));
        }
        let staged = stage(&self.graph, &mut change, plan, before, harmless, None).await;
        let staged = staged.and_then(|()| moved::refuse(config, &change.layout()));
        let staged = staged.and_then(|()| plan.refuse_in_use(&self.graph.layout(), &change.layout()));
        change.give_up().await;
        staged.map(|()| reserved)
    }

    async fn make_first(
        self: &Arc<Self>,
        plan: &Plan,
        config: &Config,
        before: &State,
        reserved: Reserved,
        done: &mut Done,
    ) -> Result<()> {
        for id in plan.ended_exports() {
            if let Some((at, export)) = self.exports.configured(id) {
                self.end_export(id, false).await?;
                done.ended.push(ExportShape { at, export });
            }
        }
        self.change_graph(plan, config, before, done).await?;
        let begun = plan.begun_exports().cloned();
        self.exports.start(begun.map(|shape| (shape.at, shape.export)).collect(), reserved).await
    }

    pub(super) async fn change_graph(
        self: &Arc<Self>,
        plan: &Plan,
        config: &Config,
        before: &State,
        done: &mut Done,
    ) -> Result<()> {
        let closed = plan.steps.iter().filter_map(|step| match step {
            Step::Close(name, _) => Some(name.clone()),
            _ => None,
        });
        let mut going = self.stores.going(&closed.collect::<Vec<_>>()).await?;
        let mut change = self.graph.change().await;
        change.set_directory(&config.directory);
        let staged = stage(&self.graph, &mut change, plan, before, |new| new, Some(&mut going)).await;
        let staged = staged.and_then(|()| moved::refuse(config, &change.layout()));
        let led = plan.steps.iter().filter_map(|step| match step {
            Step::Lead { drive, .. } => Some(drive.as_str()),
            _ => None,
        });
        let led = self.stores.by_file.lead(led);
        let made = match staged {
            Ok(()) => change.make().await,
            Err(error) => {
                change.give_up().await;
                Err(error)
            }
        };
        let ended = going.end(made.is_ok()).await;
        made?.closed.and(ended)?;
        drop(led);
        let made = plan.steps.iter().filter_map(|step| match step {
            Step::NewBitmap { drive, name, .. } => Some((drive.clone(), name.clone())),
            _ => None,
        });
        done.bitmaps.extend(made);
        // Before those of images are: what a drive's image has is the drive's.
        for step in &plan.steps {
            let Step::NewDrive(name, _) = step else { continue };
            if let Some(section) = config.drives.iter().find(|drive| drive.name.get_ref() == name) {
                done.drives.push(name.clone());
                self.new_drive_bitmaps(section, done).await?;
            }
        }
        self.stores.find_added().await;
        self.find_jobs().await;
        for step in &plan.steps {
            if let Step::Store { drive, place } = step {
                let was = self.stores.place_now(drive)?;
                self.stores.rebind(drive, place).await?;
                done.moved.push((drive.clone(), was));
            }
        }
        Ok(())
    }

    /// Bitmaps of a drive that is new: those that are found where they are kept, and those that are not.
    async fn new_drive_bitmaps(&self, drive: &DriveSection, done: &mut Done) -> Result<()> {
        let found = self.stores.find_drive(drive).await?;
        let name = drive.name.get_ref();
        let mut change = self.graph.change().await;
        let mut made = Vec::new();
        for bitmap in drive.bitmaps.iter().filter(|bitmap| !found.contains(bitmap.name.get_ref())) {
            change.add_bitmap(name, new_bitmap(bitmap))?;
            made.push((name.clone(), bitmap.name.get_ref().clone()));
        }
        change.commit().await?;
        done.bitmaps.extend(made);
        Ok(())
    }

    /// Ends an export, with `safe` only if nobody is connected, and tells monitors.
    pub(crate) async fn end_export(&self, id: &str, safe: bool) -> Result<()> {
        self.exports.remove(id, safe).await?;
        self.tell(&Event::ExportDeleted { id: id.to_owned() });
        Ok(())
    }

    /// Sockets on which something ends and something begins, protected in the same way: whoever listens there goes on, and so do
    /// the sockets of a service manager that lead to the same exports.
    fn sockets_that_stay(&self, plan: &Plan) -> BTreeSet<Address> {
        let mut tls: BTreeMap<&Address, Vec<&Option<String>>> = BTreeMap::new();
        for shape in plan.begun_exports() {
            tls.entry(&shape.at).or_default().push(&shape.export.tls);
        }
        let ended: Vec<_> = plan.ended_exports().filter_map(|id| self.exports.configured(id)).collect();
        let same = |at: &Address, wanted: &Vec<&Option<String>>| {
            let mut before = ended.iter().filter(|(ended_at, _)| ended_at == at).peekable();
            before.peek().is_some() && before.all(|(_, export)| wanted.iter().all(|tls| **tls == export.tls))
        };
        tls.iter().filter(|(at, wanted)| same(at, wanted)).map(|(at, _)| (*at).clone()).collect()
    }

    /// Bitmaps end for good, and drives with them. By now all else is done.
    async fn make_last(self: &Arc<Self>, last: &Plan, config: &Config, before: &State) -> Result<()> {
        if last.steps.is_empty() {
            return Ok(());
        }
        let mut bitmaps = last.clone();
        bitmaps.steps.retain(|step| matches!(step, Step::EndBitmap { .. }));
        self.change_graph(&bitmaps, config, before, &mut Done::default()).await?;
        let mut rest = last.clone();
        rest.steps.retain(|step| !matches!(step, Step::EndBitmap { .. }));
        if rest.steps.is_empty() {
            return Ok(());
        }
        for step in &rest.steps {
            if let Step::EndDrive(name) = step {
                self.stores.close_files(self.stores.leave(name).await?)?;
            }
        }
        self.change_graph(&rest, config, before, &mut Done::default()).await
    }
}

impl Plan {
    pub(super) fn ended_exports(&self) -> impl Iterator<Item = &str> {
        self.steps.iter().filter_map(|step| match step {
            Step::EndExport(id) | Step::ChangeExport(id, ..) => Some(id.as_str()),
            _ => None,
        })
    }

    fn begun_exports(&self) -> impl Iterator<Item = &ExportShape> {
        self.steps.iter().filter_map(|step| match step {
            Step::NewExport(_, shape) | Step::ChangeExport(_, shape, _) => Some(shape),
            _ => None,
        })
    }

    /// The bitmaps of a drive that end in this plan.
    pub(super) fn ended_bitmaps(&self, of: &str) -> BTreeSet<&str> {
        let ended = self.steps.iter().filter_map(|step| match step {
            Step::EndBitmap { drive, name } if drive == of => Some(name.as_str()),
            _ => None,
        });
        ended.collect()
    }

    /// What cannot be taken back: bitmaps that end, drives that end with them, and the nodes below those.
    fn last(&self, graph: &Graph) -> Self {
        let below = self.below_last(graph);
        self.only(|step| self.is_last(step, &below))
    }

    fn without_last(&self, graph: &Graph) -> Self {
        let below = self.below_last(graph);
        self.only(|step| !self.is_last(step, &below))
    }

    fn only(&self, of: impl Fn(&Step) -> bool) -> Self {
        let steps = self.steps.iter().filter(|step| of(step)).cloned().collect();
        Self { steps, ..Self::default() }
    }

    fn is_last(&self, step: &Step, below: &BTreeSet<String>) -> bool {
        match step {
            Step::EndBitmap { .. } => true,
            Step::EndDrive(name) => !self.ended_bitmaps(name).is_empty(),
            Step::Close(name, _) => below.contains(name),
            _ => false,
        }
    }

    fn below_last(&self, graph: &Graph) -> BTreeSet<String> {
        let drives = self.steps.iter().filter_map(|step| match step {
            Step::EndDrive(name) if !self.ended_bitmaps(name).is_empty() => Some(name),
            _ => None,
        });
        let mut rest: Vec<String> =
            drives.filter_map(|drive| Some(graph.node_or_drive(drive).ok()?.name().to_owned())).collect();
        let mut below = BTreeSet::new();
        while let Some(name) = rest.pop() {
            if let Ok(view) = graph.view_node(&name)
                && below.insert(name)
            {
                rest.extend(view.children.iter().map(|child| child.node.to_string()));
            }
        }
        below
    }
}
