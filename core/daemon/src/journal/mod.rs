//! Jobs that survive a restart: what is written down of them, and what becomes of those that are found.
//!
//! Each job has a file beside its image, `IMAGE.ID.dljob`, from before its first change to anything until it is over. It is a
//! [`driveline_store::Store`]: its owner section is the record of the job, and its bitmaps are how far the job has come. So what
//! is true of bitmaps is true of progress: kill -9 takes nothing from it, and after a power cut nothing is known.
//!
//! ```text
//!   start of a job     top.qcow2.job0.dljob     record, #mirror-job0
//!   kill -9
//!   next start         found ─▶ its nodes are found by their files ─▶ goes on, before anybody is served
//! ```

mod find;
mod page;
mod restart;

use self::page::Book;
use crate::{config::Config, stores::Stores};
use driveline_graph::{Error, Graph, Kind, Result};
use driveline_jobs::{JobRecord, Journal, OnRestart, Page};
use driveline_store::BootId;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::SystemTime,
};

/// All jobs of the program that are written down.
#[derive(Debug)]
pub(crate) struct Journals {
    graph: Graph,
    boot_id: BootId,
    stores: Weak<Stores>,
    /// What becomes of jobs on a drive, if the configuration says it.
    policies: Mutex<BTreeMap<String, OnRestart>>,
    /// Those of jobs that live.
    books: Mutex<Vec<Weak<Book>>>,
    interrupted: Mutex<Vec<Interrupted>>,
    /// Files that could not be opened when their images were there: guests may have written since, and nobody could note it there.
    missed: Mutex<BTreeSet<PathBuf>>,
    /// The jobs that were there at the start have been decided about; others may come with their images.
    looks: AtomicBool,
    /// One at a time decides about a job that was interrupted.
    turn: async_lock::Mutex<()>,
}

/// A job that was found written down when the program started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interrupted {
    /// Its id; if that cannot be read, as its file is called.
    pub id: String,
    /// What it does.
    pub kind: Option<&'static str>,
    /// The drive or node that it was started on.
    pub device: Option<String>,
    /// What became of it.
    pub outcome: Outcome,
    /// Why, where that is a question.
    pub reason: Option<String>,
    /// How many bytes were left to copy when it went on, if its progress says that.
    pub left: Option<u64>,
    /// The file.
    pub file: PathBuf,
}

/// What became of a job that was interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on.
    Resumed,
    /// There was nothing left to do.
    Finished,
    /// It was given up, by its user's wish or because nothing can be done with it.
    Dropped,
    /// It cannot go on as things are. Its file is kept, for the user to decide.
    Failed,
}

impl Outcome {
    /// Its word in QMP.
    pub fn word(self) -> &'static str {
        match self {
            Outcome::Resumed => "resumed",
            Outcome::Finished => "finished",
            Outcome::Dropped => "dropped",
            Outcome::Failed => "failed",
        }
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind.map(|kind| format!(" ({kind})")).unwrap_or_default();
        write!(f, "job '{}'{kind} was interrupted: ", self.id)?;
        match self.outcome {
            Outcome::Resumed => f.write_str("it goes on")?,
            Outcome::Finished => f.write_str("it had finished")?,
            Outcome::Dropped => f.write_str("it is dropped")?,
            Outcome::Failed => write!(f, "it cannot go on, and {} is kept", self.file.display())?,
        }
        self.reason.as_ref().map_or(Ok(()), |reason| write!(f, ": {reason}"))
    }
}

impl Journals {
    /// For the jobs of a graph, of this boot.
    pub(crate) fn new(graph: &Graph, stores: &Arc<Stores>) -> Arc<Self> {
        let (policies, books, interrupted, missed, looks, turn) = Default::default();
        let (graph, boot_id, stores) = (graph.clone(), stores.boot_id(), Arc::downgrade(stores));
        Arc::new(Self { graph, boot_id, stores, policies, books, interrupted, missed, looks, turn })
    }

    /// Takes what a configuration says of drives.
    pub(crate) fn configure(&self, config: &Config) {
        let said = config.drives.iter();
        let said = said.filter_map(|drive| Some((drive.name.get_ref().clone(), drive.on_restart?)));
        *self.policies.lock() = said.collect();
    }

    /// Images come one by one from now on, until [`Journals::restart_all`].
    pub(crate) fn hold(&self) {
        self.looks.store(false, SeqCst);
    }

    /// The jobs that were found.
    pub(crate) fn interrupted(&self) -> Vec<Interrupted> {
        self.interrupted.lock().clone()
    }

    /// Says that the program lives.
    pub(crate) fn beat(&self, now: SystemTime) {
        self.books.lock().retain(|book| match book.upgrade() {
            Some(book) => {
                book.beat(now);
                true
            }
            None => false,
        });
    }

    /// Where a job is written down: beside its image, or where the bitmaps of its drive are.
    fn place(&self, record: &JobRecord) -> Result<PathBuf> {
        let file = record.source.file.as_ref().filter(|file| file.is_file());
        if let Some(file) = file {
            let mut name = file.as_os_str().to_owned();
            name.push(format!(".{}.{ENDING}", record.id));
            return Ok(name.into());
        }
        let drive = self.graph.drive_of(&record.source.node);
        let store = drive.as_deref().zip(self.stores.upgrade());
        let beside = store.and_then(|(drive, stores)| Some((drive, stores.path_of(drive)?)));
        if let Some((drive, path)) = beside
            && let Some(directory) = path.parent().filter(|directory| directory.is_dir())
        {
            return Ok(directory.join(format!("{drive}.{}.{ENDING}", record.id)));
        }
        let text = "there is no regular file that it could be written down beside";
        Err(Error::new(Kind::NotSupported, text))
    }
}

/// How the files of jobs end.
const ENDING: &str = "dljob";

impl Journal for Journals {
    fn on_restart(&self, drive: &str) -> OnRestart {
        self.policies.lock().get(drive).copied().unwrap_or_default()
    }

    fn begin(&self, record: &JobRecord) -> Result<Arc<dyn Page>> {
        let path = self.place(record)?;
        if path.exists() {
            let text = format_args!(
                "a job '{}' was interrupted, and {} is kept: resume or drop it first",
                record.id,
                path.display()
            );
            return Err(Error::new(Kind::Exists, text));
        }
        let files = self.files_of(record);
        // Whoever looks for files meanwhile finds this one, and has to learn whose it is.
        let mut books = self.books.lock();
        let book = Book::create(&path, record, files, self.boot_id)?;
        books.push(Arc::downgrade(&book));
        Ok(book)
    }
}
