//! The file of one job.

use crate::stores::store_error;
use driveline_bitmap::{Bitmap, Durability, Ledger};
use driveline_graph::{Error, Kind, Result};
use driveline_jobs::{JobRecord, Page};
use driveline_store::{BootId, Fingerprint, LogOptions, Options, Spec, Store};
use parking_lot::Mutex;
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::SystemTime,
};

/// What the owner section begins with. The length of the record follows (4 bytes, big endian), the record, and the fingerprint
/// of the images, to the end.
const MAGIC: &[u8; 8] = b"DRVLJOB1";

/// The file of one job, open and locked.
#[derive(Debug)]
pub(super) struct Book {
    path: PathBuf,
    store: Mutex<Option<Store>>,
    files: Fingerprint,
    /// Its job lives. Before that nothing may say so: who is killed meanwhile must find the images changed again.
    alive: AtomicBool,
}

impl Book {
    pub(super) fn create(
        path: &Path,
        record: &JobRecord,
        files: Fingerprint,
        boot_id: BootId,
    ) -> Result<Arc<Self>> {
        let options =
            Options { drive_size: 0, boot_id, owner: encode(record, &files), log: LogOptions::default() };
        let store = Store::create(path, &options).map_err(store_error)?;
        let book = Self::of(store, files);
        book.live();
        Ok(book)
    }

    pub(super) fn of(store: Store, files: Fingerprint) -> Arc<Self> {
        let (path, store, alive) = (store.path(), Mutex::new(Some(store)), AtomicBool::new(false));
        Arc::new(Self { path, store, files, alive })
    }

    pub(super) fn is(&self, path: &Path) -> bool {
        self.path == path
    }

    fn live(&self) {
        self.alive.store(true, Relaxed);
        self.beat(SystemTime::now());
    }

    pub(super) fn beat(&self, now: SystemTime) {
        if let Some(store) = self.store.lock().as_ref().filter(|_| self.alive.load(Relaxed)) {
            store.heartbeat(now);
        }
    }

    fn with<T>(&self, what: impl FnOnce(&Store) -> driveline_store::Result<T>) -> Result<T> {
        let store = self.store.lock();
        let store = store.as_ref().ok_or_else(|| Error::new(Kind::NotFound, "the job is over"))?;
        what(store).map_err(store_error)
    }
}

impl Page for Book {
    fn write(&self, record: &JobRecord) -> Result<()> {
        self.with(|store| store.set_owner(&encode(record, &self.files)))?;
        self.live();
        Ok(())
    }

    fn keep(&self, bitmap: &Bitmap) -> Result<Arc<dyn Ledger>> {
        let spec = Spec {
            record: bitmap.record(),
            granularity: bitmap.granularity(),
            view: bitmap.view(),
            durability: Durability::Process,
        };
        self.with(|store| store.add(&spec))
    }

    fn remove(&self) -> Result<()> {
        // The lock goes last: nobody finds a file that is about to go.
        let store = self.store.lock().take();
        let removed = remove(&self.path);
        drop(store);
        removed
    }
}

/// Removes a file durably. One that is not there is removed.
pub(super) fn remove(path: &Path) -> Result<()> {
    let removed = fs::remove_file(path).and_then(|()| match path.parent() {
        Some(directory) => fs::File::open(directory)?.sync_all(),
        None => Ok(()),
    });
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(error.raw_os_error().unwrap_or(5), format_args!("removing {}", path.display())))
        }
        _ => Ok(()),
    }
}

fn encode(record: &JobRecord, files: &Fingerprint) -> Vec<u8> {
    let record = record.encode();
    let mut bytes = MAGIC.to_vec();
    bytes.extend((record.len() as u32).to_be_bytes());
    bytes.extend(record);
    bytes.extend(files.encode());
    bytes
}

/// Reads the owner section.
///
/// Errors: what is wrong with it.
pub(super) fn decode(bytes: &[u8]) -> Result<(JobRecord, Fingerprint)> {
    let parts = || {
        let (length, rest) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<4>()?;
        let (record, files) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        Some((record, Fingerprint::decode(files)?))
    };
    let cut = || Error::new(Kind::Corrupt, "it is not the record of a job, or is cut off");
    let (record, files) = parts().ok_or_else(cut)?;
    Ok((JobRecord::decode(record)?, files))
}
