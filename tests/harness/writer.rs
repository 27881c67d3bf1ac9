//! A guest that writes all the time, and what it knows of its disk.

use super::Guest;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::JoinHandle,
};

/// What changes are counted in, in bytes.
pub(crate) const GRANULE: usize = 65536;

/// What the guest knows: its disk, and what it wrote since the last backup.
pub(crate) struct Disk {
    /// How it reaches the disk. Whoever moves the disk puts another one here.
    pub(crate) guest: Option<Guest>,
    pub(crate) bytes: Vec<u8>,
    /// Granules.
    pub(crate) written: BTreeSet<usize>,
    /// Nothing is written until this is false again.
    pub(crate) frozen: bool,
    writes: usize,
    ended: bool,
}

/// The guest. Whoever holds its lock has it between two writes.
pub(crate) struct Writer {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

struct Shared {
    disk: Mutex<Disk>,
    /// Told of writes, of a guest that may go on, and of its end.
    changed: Condvar,
}

/// Whoever waits for writes hears that there will be none, too.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.changed.notify_all();
    }
}

impl Writer {
    /// A guest of an export whose content is known. It writes to the first quarter of it, so that an incremental is small.
    pub(crate) fn start(guest: Guest, bytes: Vec<u8>) -> Self {
        let disk = Disk {
            guest: Some(guest),
            bytes,
            written: BTreeSet::new(),
            frozen: false,
            writes: 0,
            ended: false,
        };
        let shared = Arc::new(Shared { disk: Mutex::new(disk), changed: Condvar::new() });
        let thread = std::thread::spawn({
            let end = End(shared.clone());
            move || {
                let shared = &*end.0;
                let mut random = StdRng::seed_from_u64(4);
                loop {
                    let disk = shared.disk.lock().unwrap();
                    let may_go_on = |disk: &mut Disk| disk.frozen && !disk.ended;
                    let mut disk = shared.changed.wait_while(disk, may_go_on).unwrap();
                    if disk.ended {
                        return;
                    }
                    disk.write(&mut random);
                    drop(disk);
                    shared.changed.notify_all();
                    // A lock that is wanted is had: the guest is not the only one.
                    std::thread::yield_now();
                }
            }
        });
        Self { shared, thread }
    }

    pub(crate) fn pause(&self) -> MutexGuard<'_, Disk> {
        self.shared.disk.lock().unwrap()
    }

    /// Stops the guest between two writes, or lets it go on.
    pub(crate) fn freeze(&self, frozen: bool) -> MutexGuard<'_, Disk> {
        let mut disk = self.pause();
        disk.frozen = frozen;
        self.shared.changed.notify_all();
        disk
    }

    /// Lets the guest write for a while.
    pub(crate) fn go_on(&self, writes: usize) {
        let disk = self.pause();
        let enough = disk.writes + writes;
        drop(self.shared.changed.wait_while(disk, |disk| disk.writes < enough).unwrap());
    }

    /// Ends the guest: what it knew.
    pub(crate) fn stop(self) -> Disk {
        self.pause().ended = true;
        self.shared.changed.notify_all();
        self.thread.join().unwrap();
        let Ok(shared) = Arc::try_unwrap(self.shared) else { panic!("the guest was the only other one") };
        shared.disk.into_inner().unwrap()
    }
}

impl Disk {
    fn write(&mut self, random: &mut StdRng) {
        let at = random.random_range(0..self.bytes.len() / 4096 / 4) * 4096;
        let value = random.random::<u8>();
        let guest = self.guest.as_mut().expect("a guest has a disk between two writes");
        let answer = match random.random_range(0..8) {
            0 => {
                self.bytes[at..at + 4096].fill(0);
                guest.write_zeroes(at as u64, 4096)
            }
            _ => {
                self.bytes[at..at + 4096].fill(value);
                guest.write(at as u64, &[value; 4096])
            }
        };
        answer.expect("no request fails");
        self.written.insert(at / GRANULE);
        self.writes += 1;
    }

    /// A backup begins now: what it must be.
    pub(crate) fn moment(&mut self) -> Moment {
        Moment { bytes: self.bytes.clone(), written: std::mem::take(&mut self.written) }
    }
}

/// What a backup must be.
pub(crate) struct Moment {
    bytes: Vec<u8>,
    /// Granules that the guest wrote to since the last moment.
    pub(crate) written: BTreeSet<usize>,
}

impl Moment {
    /// The bytes that an incremental has at the most.
    pub(crate) fn most(&self) -> u64 {
        (self.written.len() * GRANULE) as u64
    }

    /// The image, with all that it is based on, has the bytes of this moment.
    pub(crate) fn assert_is(&self, image: &Path) {
        let raw = tempfile::NamedTempFile::new_in(image.parent().unwrap()).unwrap();
        let (from, to) = (image.to_str().unwrap(), raw.path().to_str().unwrap());
        super::run("qemu-img", &["convert", "-O", "raw", from, to]);
        let restored = std::fs::read(raw.path()).unwrap();
        let wrong = restored.chunks(4096).zip(self.bytes.chunks(4096)).position(|(is, was)| is != was);
        assert_eq!(
            (restored.len(), wrong.map(|at| at * 4096)),
            (self.bytes.len(), None),
            "{} is restored byte for byte",
            image.display()
        );
    }
}
