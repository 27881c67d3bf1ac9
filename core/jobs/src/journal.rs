//! Where jobs are written down, and what a job has of that.
//!
//! ```text
//!   staged ─▶ record on disk ─▶ the change is made ─▶ at work ──▶ its end is made, drained ──▶ record gone
//!               (starting)                       (finding, working)   (pivoted, completed, cancelled)
//! ```
//!
//! A record that is found at the next start is of a job that was interrupted. Its progress is a bitmap that is kept beside
//! it; see `safe.rs` for what may become clean there, and when.

use crate::{
    job::Job,
    record::{JobArgs, JobImage, JobRecord, OnRestart, Phase},
    start::Start,
};
use driveline_bitmap::{Bitmap, BitmapName, Bits, Granularity, Ledger, Record, View};
use driveline_graph::{Kind, Layout, Options, Result, Role};
use parking_lot::Mutex;
use serde_json::Value;
use std::{fmt, path::PathBuf, sync::Arc};

/// Writes jobs down.
pub trait Journal: fmt::Debug + Send + Sync + 'static {
    /// What becomes of jobs on a drive that do not say it themselves.
    fn on_restart(&self, drive: &str) -> OnRestart;

    /// Writes down a job that begins. It is on disk when this returns.
    ///
    /// Errors: [`Kind::Exists`] if a job of that id was interrupted and is not decided about; then this one does not begin.
    /// There is no place for it, or it cannot be written: then the job runs all the same, and ends with the program.
    fn begin(&self, record: &JobRecord) -> Result<Arc<dyn Page>>;
}

/// Where one job is written down.
pub trait Page: fmt::Debug + Send + Sync {
    /// Writes it anew, durably. On an error the old record stays.
    fn write(&self, record: &JobRecord) -> Result<()>;

    /// Keeps a bitmap there, which survives the end of the process.
    fn keep(&self, bitmap: &Bitmap) -> Result<Arc<dyn Ledger>>;

    /// The job is over.
    fn remove(&self) -> Result<()>;
}

/// A job that was found written down.
#[derive(Debug)]
pub struct FoundJob {
    /// What was written of it.
    pub record: JobRecord,
    /// Where.
    pub page: Arc<dyn Page>,
    /// The bitmaps that were kept there.
    pub bitmaps: Vec<FoundBitmap>,
    /// Of a backup with a bitmap: what guests wrote since it was frozen. `None`: it is not known.
    pub since: Option<Bits>,
    /// Why nothing is known of what guests have written since: the machine went down, or somebody changed the images.
    pub lost: Option<String>,
}

/// A bitmap that was kept for a job.
#[derive(Debug)]
pub struct FoundBitmap {
    /// What keeps it.
    pub ledger: Arc<dyn Ledger>,
    /// What was known of it.
    pub record: Record,
    /// Bytes a bit.
    pub granularity: Granularity,
    /// What is dirty.
    pub bits: Bits,
}

/// What a job has in its journal.
#[derive(Debug)]
pub(crate) struct Kept {
    page: Arc<dyn Page>,
    record: Mutex<JobRecord>,
    found: Mutex<Vec<FoundBitmap>>,
    /// It goes on with what was found.
    pub(crate) is_restart: bool,
    pub(crate) since: Mutex<Option<Bits>>,
    /// See [`FoundJob::lost`].
    pub(crate) lost: Option<String>,
}

impl Kept {
    /// Is its progress to be kept?
    pub(crate) fn resumes(&self) -> bool {
        self.record.lock().on_restart == OnRestart::Resume
    }

    pub(crate) fn phase(&self) -> Phase {
        self.record.lock().phase
    }

    /// Says how far it has come.
    pub(crate) fn set_phase(&self, phase: Phase) -> Result<()> {
        self.write(|record| record.phase = phase)
    }

    /// Says what its user has changed. If that fails it is as it was after a restart, and nothing else.
    pub(crate) fn note(&self, change: impl FnOnce(&mut JobRecord)) {
        self.warn(self.write(change));
    }

    /// Says that it is over, while no guest writes: from then on nobody marks what guests write.
    ///
    /// Errors: it cannot be said in any way; then it must not be over.
    pub(crate) fn end(&self, phase: Phase) -> Result<()> {
        self.set_phase(phase).or_else(|error| {
            self.warn(Err(error));
            self.page.remove()
        })
    }

    fn write(&self, change: impl FnOnce(&mut JobRecord)) -> Result<()> {
        let mut record = self.record.lock();
        let mut changed = record.clone();
        change(&mut changed);
        self.page.write(&changed)?;
        *record = changed;
        Ok(())
    }

    /// The change was made that the job begins in.
    pub(crate) fn began(&self, group: Option<&str>) {
        let begun = self.write(|record| {
            record.unwatched = false;
            record.foreign_target = false;
            if record.phase == Phase::Starting {
                record.phase = Phase::Finding;
                record.group = group.map(str::to_owned);
            }
        });
        self.warn(begun);
    }

    /// The job is over, or never was.
    pub(crate) fn remove(&self) {
        self.warn(self.page.remove());
    }

    pub(crate) fn warn(&self, result: Result<()>) {
        if let Err(error) = result {
            tracing::warn!(job = self.record.lock().id, "what is written down of a job: {error}");
        }
    }

    /// What it has found to do does not count: it looks again.
    pub(crate) fn look_again(&self) {
        self.record.lock().phase = Phase::Finding;
    }

    /// A bitmap of the job's own: the one that was found, or a new one. `or_all`: after a restart all of it is dirty, if nothing is
    /// known of it, or of what guests have written since.
    pub(crate) fn bitmap(
        &self,
        name: BitmapName,
        granularity: u64,
        size_bytes: u64,
        or_all: bool,
    ) -> Result<Arc<Bitmap>> {
        if let Some(found) = self.take_found(&name) {
            if found.record.length != size_bytes {
                let (was, name) = (found.record.length, name.as_str());
                let text = format_args!("bitmap '{name}' is of {was} bytes; expected {size_bytes}");
                return Err(driveline_graph::Error::new(Kind::Invalid, text));
            }
            let bitmap = Bitmap::new(name, found.granularity, size_bytes).with_view(View::Node);
            let bitmap = bitmap.found(found.ledger, &found.record, &found.bits);
            if or_all && self.lost.is_some() {
                bitmap.mark_unconditionally(0..size_bytes);
            }
            return Ok(Arc::new(bitmap));
        }
        let bitmap = Bitmap::new(name, Granularity::new(granularity)?, size_bytes).with_view(View::Node);
        if self.resumes() {
            let kept = self.page.keep(&bitmap).and_then(|ledger| Ok(bitmap.keep_in(ledger)?));
            if kept.is_err() {
                // The job goes on, and ends with the program.
                self.record.lock().on_restart = OnRestart::Drop;
            }
            self.warn(kept);
        }
        if or_all && self.is_restart {
            bitmap.mark_unconditionally(0..size_bytes);
        }
        Ok(Arc::new(bitmap))
    }

    /// Was a bitmap of that name found?
    pub(crate) fn has_found(&self, name: &BitmapName) -> bool {
        self.found.lock().iter().any(|found| found.record.name == *name)
    }

    fn take_found(&self, name: &BitmapName) -> Option<FoundBitmap> {
        let mut found = self.found.lock();
        let at = found.iter().position(|found| found.record.name == *name)?;
        Some(found.swap_remove(at))
    }
}

impl Start {
    /// Writes the reserved job down, which copies from `source` to `target`. `None`: it ends with the program.
    pub(crate) fn write_down(
        &mut self,
        job: &Arc<Job>,
        on_restart: Option<OnRestart>,
        args: JobArgs,
        (source, target): (&str, Option<&str>),
    ) -> Result<Option<Arc<Kept>>> {
        let kept = match self.restarting.take() {
            Some(FoundJob { record, page, bitmaps, since, lost }) => {
                if record.paused {
                    job.pause_first();
                }
                Some(Kept {
                    page,
                    record: Mutex::new(record),
                    found: Mutex::new(bitmaps),
                    is_restart: true,
                    since: Mutex::new(since),
                    lost,
                })
            }
            None => self.new_page(job, on_restart, args, source, target)?,
        };
        let kept = kept.map(Arc::new);
        if let Some(kept) = &kept {
            let _ = job.kept.set(kept.clone());
        }
        Ok(kept)
    }

    fn new_page(
        &self,
        job: &Job,
        on_restart: Option<OnRestart>,
        args: JobArgs,
        source: &str,
        target: Option<&str>,
    ) -> Result<Option<Kept>> {
        let Some(journal) = self.jobs.journal() else { return Ok(None) };
        let layout = self.layout();
        let drive = layout.drive_of(source);
        let of_drive = || drive.as_deref().map(|drive| journal.on_restart(drive));
        let on_restart = on_restart.or_else(of_drive).unwrap_or_default();
        let mut record = JobRecord::new(&job.common.id, args, on_restart, image(&layout, source));
        if let Some(target) = target {
            record.target = Some(image(&layout, target));
            if !layout.reaches(source, target) {
                record.target_is_implicit = layout.view_node(target).is_ok_and(|view| view.implicit);
                record.open_target = Some(definition(&layout, target, source));
            }
        }
        match journal.begin(&record) {
            Ok(page) => Ok(Some(Kept {
                page,
                record: Mutex::new(record),
                found: Mutex::default(),
                is_restart: false,
                since: Mutex::default(),
                lost: None,
            })),
            Err(error) if error.kind() == Kind::Exists => Err(error),
            Err(error) => {
                tracing::info!(job = record.id, "it will not go on after a restart: {error}");
                Ok(None)
            }
        }
    }
}

/// An image by its node and file.
pub(crate) fn image(layout: &Layout, node: &str) -> JobImage {
    JobImage { node: node.to_owned(), file: file_of(layout, node) }
}

/// The file that the data of a node are in, if they are in one.
pub(crate) fn file_of(layout: &Layout, node: &str) -> Option<PathBuf> {
    let mut view = layout.view_node(node).ok()?;
    loop {
        if let Some(path) = view.node.open_node().filename() {
            return Some(std::path::absolute(&path).unwrap_or(path));
        }
        let child = view.children.iter().find(|child| child.role != Role::Backing)?;
        view = layout.view_node(&child.node).ok()?;
    }
}

/// How a node would be opened again, with all that is below it in place. What `source` shows as well is there by its name.
fn definition(layout: &Layout, node: &str, source: &str) -> Options {
    let Ok(view) = layout.view_node(node) else { return Options::new() };
    let mut definition = view.node.options().clone();
    for (key, value) in view.common.to_options() {
        definition.entry(key).or_insert(value);
    }
    // A path is relative to where the program was started, which may be elsewhere the next time.
    if let Some(path) = view.node.open_node().filename() {
        let path = std::path::absolute(&path).unwrap_or(path);
        for key in ["path", "filename"] {
            if definition.contains_key(key) {
                definition.insert(key.into(), path.to_string_lossy().into());
            }
        }
    }
    if !node.starts_with('#') {
        definition.insert("node-name".into(), node.into());
    }
    definition.insert("driver".into(), view.node.driver_name().into());
    definition.insert("read-only".into(), view.read_only.into());
    for spec in &view.node.driver().description().children {
        let members = view.children.iter().filter(|child| child.name == spec.name);
        for child in members {
            let below = match layout.reaches(source, &child.node) {
                true => Value::from(&*child.node),
                false => definition_of_child(layout, &child.node, source),
            };
            definition.insert(spec.name.to_string(), below);
        }
        // What the image says itself is not meant.
        if !spec.required && !spec.list && !definition.contains_key(&*spec.name) && spec.role == Role::Backing
        {
            definition.insert(spec.name.to_string(), Value::Null);
        }
    }
    definition
}

fn definition_of_child(layout: &Layout, node: &str, source: &str) -> Value {
    definition(layout, node, source).into()
}
