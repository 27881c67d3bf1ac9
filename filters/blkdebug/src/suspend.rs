//! Points where requests wait until somebody outside lets them go on.

use driveline_sdk::{Error, Result, sleep};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// How often a suspended request looks whether its file is gone.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// A point, which is a file: requests are suspended while it exists.
///
/// A plugin has no other control channel, and a file needs nothing on the other side but a shell.
#[derive(Debug)]
pub(crate) struct Point {
    file: PathBuf,
    /// Who arrives after the file was removed makes it again, for himself and not for those who wait still.
    generation: Mutex<u64>,
}

impl Point {
    /// A point at which nothing is suspended yet.
    pub(crate) fn new(control: &Path, tag: &str) -> Result<Self> {
        let file = control.join(tag);
        match fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::option("control", format_args!("{}: {error}", file.display())))
            }
            _ => Ok(Self { file, generation: Mutex::new(0) }),
        }
    }

    pub(crate) async fn suspend(&self) -> Result<()> {
        let arrived = self.arrive()?;
        while self.is_suspended(arrived)? {
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    fn arrive(&self) -> Result<u64> {
        let mut generation = self.generation.lock().unwrap_or_else(PoisonError::into_inner);
        match fs::File::create_new(&self.file) {
            Ok(_) => *generation += 1,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(self.error(&error)),
        }
        Ok(*generation)
    }

    fn is_suspended(&self, arrived: u64) -> Result<bool> {
        let generation = self.generation.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(*generation == arrived && self.file.try_exists().map_err(|error| self.error(&error))?)
    }

    fn error(&self, error: &io::Error) -> Error {
        Error::new(error.raw_os_error().unwrap_or(5), format_args!("{}: {error}", self.file.display()))
    }
}
