//! A job that was interrupted goes on: what it worked on is found again, whatever its nodes are called now.

use crate::{
    backup::{BackupArgs, COPIED, LEFT_OUT},
    commit::CommitArgs,
    journal::{FoundJob, file_of},
    mirror::MirrorArgs,
    record::{JobArgs, JobImage, JobRecord, Phase},
    start::Start,
    stream::{Base, StreamArgs},
};
use driveline_graph::{DriverKind, Error, Kind, Layout, Result, Role};
use std::sync::Arc;

/// What became of a job that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Restarted {
    /// It is staged, and goes on with the change. Its id.
    Staged(String),
    /// There is nothing left to do, for this reason.
    Finished(String),
    /// It cannot go on and never will, for this reason.
    Lost(String),
}

/// What the drive of a job shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shows {
    Source,
    Target,
    Another,
}

impl Start {
    /// Stages a job that was found written down, so that it goes on where it was. A mirror copies over a target that somebody else has
    /// changed ([`JobRecord::foreign_target`]), or that may have been the drive's already, only if its user `insists`.
    ///
    /// Errors: that; what it works on is not there or cannot be opened; what was found is untouched.
    pub async fn restart(&mut self, mut found: FoundJob, insists: bool) -> Result<Restarted> {
        // These note their end before it takes effect: a drive that shows the target of one at work was led there by its user.
        let pivots = matches!(found.record.args, JobArgs::Mirror(_) | JobArgs::Commit(_));
        let is_begun = matches!(found.record.phase, Phase::Finding | Phase::Working | Phase::Pivoting);
        let shows = if pivots && is_begun { Some(self.shows(&found.record)?) } else { None };
        if let (Phase::Pivoting, Some(Shows::Source)) = (found.record.phase, &shows) {
            let text = undecided(&found.record);
            if !insists {
                return Err(Error::new(Kind::Invalid, text));
            }
            found.record.phase = Phase::Working;
            found.lost.get_or_insert(text);
        }
        let record = &found.record;
        if let (true, Some(Shows::Target)) = (record.unwatched || record.phase != Phase::Pivoting, &shows) {
            return Ok(Restarted::Lost(behind(record)));
        }
        match record.phase {
            Phase::Starting => return Ok(Restarted::Lost("it had not begun when the program ended".into())),
            Phase::Pivoting if shows == Some(Shows::Target) => return Ok(Restarted::Finished(shown(record))),
            Phase::Pivoting => return Err(shows_another(record)),
            Phase::Completed => return Ok(Restarted::Finished("it was about to say so".into())),
            Phase::Cancelled => return Ok(Restarted::Lost("it had been cancelled, or had failed".into())),
            Phase::Finding | Phase::Working => {}
        }
        if let (JobArgs::Backup(_), Some(lost)) = (&record.args, &found.lost) {
            let text = format!("its point in time is lost: {lost}");
            return Ok(Restarted::Lost(text));
        }
        let has = |name| found.bitmaps.iter().any(|found| found.record.name.as_str() == name);
        if matches!(record.args, JobArgs::Backup(_)) && !(has(COPIED) && has(LEFT_OUT)) {
            return Ok(Restarted::Lost("nothing is known of what it has copied".into()));
        }
        let layout = self.layout();
        let device = record.args.device().to_owned();
        if layout.node_or_drive(&device).is_err() {
            return Err(missing_device(&device));
        }
        if let Some(node) = point_in_time(&layout, layout.node_or_drive(&device)?.name()) {
            let text = format!("the point in time that '{node}' showed ended with the program");
            return Ok(Restarted::Lost(text));
        }
        if let (JobArgs::Mirror(_), Some(target), true) =
            (&record.args, &record.target, record.foreign_target && !insists)
        {
            let target = said(target);
            let text = format_args!(
                "somebody else has changed {target}, which it copies to; resumed, it copies all over that"
            );
            return Err(Error::new(Kind::Invalid, text));
        }
        let found_args = match record.args.clone() {
            JobArgs::Stream(args) => stream(&layout, record, args)?.map(JobArgs::Stream),
            JobArgs::Commit(args) => commit(&layout, record, args)?.map(JobArgs::Commit),
            JobArgs::Mirror(args) => match self.source_and_target(record).await? {
                Ok(target) => Ok(JobArgs::Mirror(MirrorArgs { target, ..args })),
                Err(over) => Err(over),
            },
            JobArgs::Backup(args) => match self.source_and_target(record).await? {
                Ok(target) => Ok(JobArgs::Backup(BackupArgs { target, ..args })),
                Err(over) => Err(over),
            },
        };
        let args = match found_args {
            Ok(args) => args,
            Err(over) => return Ok(Restarted::Finished(over)),
        };
        let id = Some(found.record.id.clone());
        found.record.args = args.clone();
        self.restarting = Some(found);
        let staged = match args {
            JobArgs::Stream(args) => self.stream(StreamArgs { job_id: id, ..args }).await,
            JobArgs::Commit(args) => self.commit(CommitArgs { job_id: id, ..args }).await,
            JobArgs::Mirror(args) => self.mirror(MirrorArgs { job_id: id, ..args }).await,
            JobArgs::Backup(args) => self.backup(BackupArgs { job_id: id, ..args }).await,
        };
        self.restarting = None;
        staged.map(Restarted::Staged)
    }

    /// What the drive or node of a job shows.
    ///
    /// Errors: it is not there.
    fn shows(&self, record: &JobRecord) -> Result<Shows> {
        let (layout, device) = (self.layout(), record.args.device());
        let chain = layout.chain(device).map_err(|_| missing_device(device))?;
        let is = |image: &JobImage| is_image(&layout, chain[0].name(), image);
        Ok(match is(&record.source) {
            true => Shows::Source,
            false if record.target.as_ref().is_some_and(is) => Shows::Target,
            false => Shows::Another,
        })
    }

    /// The target of a mirror or backup, opened if it is not there. `Err`: the job is over.
    async fn source_and_target(&mut self, record: &JobRecord) -> Result<std::result::Result<String, String>> {
        let layout = self.layout();
        let device = record.args.device();
        let target = record.target.as_ref();
        let target = target.ok_or_else(|| Error::new(Kind::Corrupt, "its record names no target"))?;
        let top = layout.chain(device)?[0].name().to_owned();
        if !is_image(&layout, &top, &record.source) {
            if is_image(&layout, &top, target) {
                return Ok(Err(format!("its target is what '{device}' shows")));
            }
            return Err(shows_another(record));
        }
        if layout.node(&target.node).is_ok() && is_image(&layout, &target.node, target) {
            return Ok(Ok(target.node.clone()));
        }
        if let Some(node) = anywhere(&layout, target) {
            return Ok(Ok(node));
        }
        let Some(definition) = &record.open_target else {
            let text = format_args!("{}, which it copies to, is not there", said(target));
            return Err(Error::new(Kind::NotFound, text));
        };
        let change = self.change();
        let definition = change.parse(definition.clone())?;
        let node = match record.target_is_implicit {
            true => change.add_implicit(definition).await?,
            false => change.add_node(definition).await?,
        };
        Ok(Ok(node.name().to_owned()))
    }
}

/// The node in a data path that shows a point in time: what was copied of that is not of the one that it shows now.
fn point_in_time(layout: &Layout, node: &str) -> Option<Arc<str>> {
    let view = layout.view_node(node).ok()?;
    view.children.iter().filter(|child| child.role != Role::Target).find_map(|child| match child.role {
        Role::PointInTime => Some(view.node.name().into()),
        _ => point_in_time(layout, &child.node),
    })
}

/// Jobs of one group that were found, all of them: if some are at their common end and others are not, none has ended. What that
/// takes effect in was not made, and nobody has written meanwhile: they go on from where all of them are at work.
pub fn undo_half_end(group: &mut [FoundJob]) {
    let is_at_end = |found: &FoundJob| matches!(found.record.phase, Phase::Pivoting | Phase::Completed);
    let is_at_work = |found: &FoundJob| matches!(found.record.phase, Phase::Finding | Phase::Working);
    if group.iter().any(is_at_work) {
        for found in group.iter_mut().filter(|found| is_at_end(found)) {
            found.record.phase = Phase::Working;
        }
    }
}

fn shows_another(record: &JobRecord) -> Error {
    let (device, source) = (record.args.device(), said(&record.source));
    Error::new(
        Kind::Invalid,
        format_args!("'{device}' does not show {source} any more, which it copies from"),
    )
}

fn missing_device(device: &str) -> Error {
    Error::new(Kind::NotFound, format_args!("there is no drive or node '{device}', which it works on"))
}

/// Why a job whose target is there, and equal, does not go on by itself: its drive may have been there already.
fn undecided(record: &JobRecord) -> String {
    let target = record.target.as_ref().map(said).unwrap_or_default();
    format!(
        "{target} was about to take the place of {} when the program ended, which the drive shows still; resumed, the job copies over \
         what may have been written to {target} since",
        said(&record.source)
    )
}

/// Why a job whose end took effect is not started again.
fn shown(record: &JobRecord) -> String {
    let (device, target) = (record.args.device(), record.target.as_ref().map(said).unwrap_or_default());
    format!("{target} took the place of what '{device}' showed")
}

/// Why a job is given up whose drive was led to a target that is not equal.
fn behind(record: &JobRecord) -> String {
    let (device, target) = (record.args.device(), record.target.as_ref().map(said).unwrap_or_default());
    let why = match record.unwatched {
        true => "which was served after the job was interrupted: what was written since is there alone",
        false => "which was not copied to its end",
    };
    format!("'{device}' shows {target} now instead of {}, {why}", said(&record.source))
}

fn stream(
    layout: &Layout,
    record: &JobRecord,
    args: StreamArgs,
) -> Result<std::result::Result<StreamArgs, String>> {
    let top = in_chain(layout, &args.device, &record.source)?;
    let below = layout.chain(&top)?;
    let base = match &record.target {
        Some(base) => Some(in_chain(layout, &args.device, base)?),
        None => None,
    };
    if below.get(1).map(|node| node.name()) == base.as_deref() {
        return Ok(Err(format!("{} has nothing between it and its base any more", said(&record.source))));
    }
    let shows = layout.chain(&args.device)?[0].name() == top;
    let device = if shows { args.device.clone() } else { top };
    Ok(Ok(StreamArgs { device, base: base.map(Base::Node), ..args }))
}

fn commit(
    layout: &Layout,
    record: &JobRecord,
    args: CommitArgs,
) -> Result<std::result::Result<CommitArgs, String>> {
    let base = record.target.as_ref();
    let base = base.ok_or_else(|| Error::new(Kind::Corrupt, "its record names no base"))?;
    let base = in_chain(layout, &args.device, base)?;
    let Ok(top) = in_chain(layout, &args.device, &record.source) else {
        return Ok(Err(format!("{} is not in the chain any more", said(&record.source))));
    };
    Ok(Ok(CommitArgs { top_node: Some(top), top: None, base_node: Some(base), base: None, ..args }))
}

/// The image of a chain that was meant.
fn in_chain(layout: &Layout, device: &str, image: &JobImage) -> Result<String> {
    let chain = layout.chain(device)?;
    let found = chain.iter().find(|node| is_image(layout, node.name(), image));
    let missing =
        || Error::new(Kind::NotFound, format_args!("{} is not in the chain of '{device}'", said(image)));
    found.map(|node| node.name().to_owned()).ok_or_else(missing)
}

fn is_image(layout: &Layout, node: &str, image: &JobImage) -> bool {
    match &image.file {
        Some(_) => file_of(layout, node) == image.file,
        None => node == image.node,
    }
}

/// The format node of an image, wherever it is.
fn anywhere(layout: &Layout, image: &JobImage) -> Option<String> {
    image.file.as_ref()?;
    let nodes = layout.nodes();
    let mut formats = nodes.iter().filter(|view| view.node.driver().description().kind == DriverKind::Format);
    let found = formats.find(|view| is_image(layout, view.node.name(), image));
    found.map(|view| view.node.name().to_owned())
}

fn said(image: &JobImage) -> String {
    match &image.file {
        Some(file) => file.display().to_string(),
        None => format!("node '{}'", image.node),
    }
}
