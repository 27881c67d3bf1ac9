//! A drive, its guest, and a program that is killed and started again.

use crate::harness::{Daemon, Guest, Qmp, dirty, run};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

pub(super) const MIB: u64 = 1 << 20;
pub(super) const SIZE: u64 = 24 * MIB;
pub(super) const GRANULE: u64 = 64 << 10;
/// What the guest writes at once, at least.
const BLOCK: u64 = 4096;
/// Slow enough to be in its middle when the program is killed.
pub(super) const SPEED: u64 = 8 * MIB;

/// What a block of the drive may hold, by the numbers of writes; 0: what it held at first. And is it certain that the write
/// came, and no earlier one after it?
type Block = Vec<(u64, bool)>;

/// What is certain of the drive.
#[derive(Debug)]
struct Model {
    blocks: Vec<Block>,
    number: u64,
    /// Granules that were written since the bitmap was clean, and acknowledged.
    must: BTreeSet<u64>,
    /// Those and the ones of which nobody was told.
    may: BTreeSet<u64>,
}

pub(super) struct World {
    pub(super) directory: tempfile::TempDir,
    toml: String,
    daemon: Option<Daemon>,
    pub(super) qmp: Qmp,
    model: Arc<Mutex<Model>>,
    stop: Arc<AtomicBool>,
    guest: Option<JoinHandle<()>>,
    seed: u64,
}

impl World {
    /// Makes what `nodes` describe the drive `vda`, of which all blocks hold something.
    pub(super) fn new(seed: u64, nodes: &str, root: &str, prepare: impl FnOnce(&Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        prepare(directory.path());
        let toml = format!(
            "{nodes}\n[drive.vda]\nroot = \"{root}\"\n\
             bitmaps = [{{ name = \"daily\", granularity = \"64KiB\", persistent = true }}]\n\
             [export.vda]\ntype = \"nbd\"\ndrive = \"vda\"\nsocket = \"vda.sock\"\nwritable = true\n\
             bitmaps = [\"daily\"]\n[monitor]\nqmp = \"qmp.sock\"\n"
        );
        let daemon = Daemon::start(directory.path(), &toml);
        let qmp = daemon.qmp();
        let blocks = vec![vec![(0, true)]; (SIZE / BLOCK) as usize];
        let model = Model { blocks, number: 1, must: BTreeSet::new(), may: BTreeSet::new() };
        let (model, stop) = (Arc::new(Mutex::new(model)), Arc::default());
        Self { directory, toml, daemon: Some(daemon), qmp, model, stop, guest: None, seed }
    }

    /// A raw file as the drive.
    pub(super) fn raw(seed: u64) -> Self {
        Self::new(seed, "[node.top]\ndriver = \"raw\"\nfile = \"disk.raw\"\n", "top", |directory| {
            std::fs::write(directory.join("disk.raw"), vec![0x11; SIZE as usize]).unwrap();
        })
    }

    /// Three images of a chain. The lower two are full, of different data, and the top one from so many MiB on.
    pub(super) fn chain(seed: u64, top_from: u64) -> Self {
        let nodes = "[node.base]\ndriver = \"qcow2\"\nfile = \"base.qcow2\"\n\
             [node.mid]\ndriver = \"qcow2\"\nfile = \"mid.qcow2\"\nbacking = \"base\"\n\
             [node.top]\ndriver = \"qcow2\"\nfile = \"top.qcow2\"\nbacking = \"mid\"\n";
        Self::new(seed, nodes, "top", |directory| {
            let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
            let size = SIZE.to_string();
            run("qemu-img", &["create", "-q", "-f", "qcow2", &path("base.qcow2"), &size]);
            run("qemu-io", &["-c", "write -P 0x33 0 24M", &path("base.qcow2")]);
            for (image, below, from) in [("mid.qcow2", "base.qcow2", 0), ("top.qcow2", "mid.qcow2", top_from)]
            {
                let data = format!("write -P 0x11 {from}M {}M", SIZE / MIB - from);
                let below = path(below);
                run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &below, "-F", "qcow2", &path(image)]);
                run("qemu-io", &["-c", &data, &path(image)]);
            }
        })
    }

    pub(super) fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    /// The files of jobs.
    pub(super) fn journals(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".dljob")).collect()
    }

    pub(super) fn uri(&self) -> String {
        format!("nbd+unix:///vda?socket={}", self.path("vda.sock"))
    }

    /// The guest begins to write.
    pub(super) fn begin_to_write(&mut self) {
        let mut guest = Guest::connect(&self.directory.path().join("vda.sock"), "vda");
        let (model, stop) = (self.model.clone(), self.stop.clone());
        self.seed += 1;
        let mut random = SmallRng::seed_from_u64(self.seed);
        self.stop.store(false, SeqCst);
        self.guest = Some(std::thread::spawn(move || {
            while !stop.load(SeqCst) && write_once(&mut guest, &model, &mut random).is_ok() {}
        }));
    }

    /// Waits until the guest has begun so many more writes.
    pub(super) fn wait_written(&self, writes: u64) {
        let number = || self.model.lock().unwrap().number;
        let enough = number() + writes;
        let deadline = Instant::now() + Duration::from_secs(30);
        while number() < enough {
            assert!(Instant::now() < deadline, "the guest writes");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The guest stops, and what it wrote is certain.
    pub(super) fn stop_writing(&mut self) {
        self.stop.store(true, SeqCst);
        if let Some(guest) = self.guest.take() {
            guest.join().unwrap();
        }
        let mut guest = Guest::connect(&self.directory.path().join("vda.sock"), "vda");
        guest.flush().unwrap();
        settle(&mut self.model.lock().unwrap());
    }

    /// What is dirty from now on was written from now on.
    pub(super) fn forget_written(&self) {
        let mut model = self.model.lock().unwrap();
        (model.must, model.may) = Default::default();
    }

    /// The bitmap says what the guest wrote, neither less nor more.
    pub(super) fn assert_bitmap_is_exact(&self) {
        let dirty = dirty(&self.uri(), "daily", GRANULE);
        let model = self.model.lock().unwrap();
        let lost: Vec<_> = model.must.difference(&dirty).collect();
        assert!(lost.is_empty(), "seed {}: the bitmap has lost {lost:?}", self.seed);
        let more: Vec<_> = dirty.difference(&model.may).collect();
        assert!(more.is_empty(), "seed {}: the bitmap has {more:?} that nobody wrote", self.seed);
    }

    /// The drive holds what the guest may expect.
    pub(super) fn assert_data_is_the_guests(&self) {
        let mut guest = Guest::connect(&self.directory.path().join("vda.sock"), "vda");
        let model = self.model.lock().unwrap();
        for (at, expected) in (0..SIZE).step_by(MIB as usize).zip(model.blocks.chunks((MIB / BLOCK) as usize))
        {
            let data = guest.read(at, MIB as u32).unwrap();
            for (number, (block, expected)) in data.chunks(BLOCK as usize).zip(expected).enumerate() {
                let is = |(number, _): &(u64, bool)| block == contents(*number);
                let offset = at + number as u64 * BLOCK;
                assert!(expected.iter().any(is), "seed {}: at {offset}, expected {expected:?}", self.seed);
            }
        }
    }

    /// What there is from the next start on.
    pub(super) fn set_nodes(&mut self, nodes: &str) {
        let rest = self.toml.find("\n[drive.vda]").unwrap();
        self.toml = format!("{nodes}{}", &self.toml[rest..]);
    }

    /// One more line about the drive, for the next start.
    pub(super) fn set_drive(&mut self, line: &str) {
        self.toml = self.toml.replace("root = \"top\"", &format!("root = \"top\"\n{line}"));
    }

    /// Kills the program in the middle of whatever it does.
    pub(super) fn kill(&mut self) {
        self.daemon.take().unwrap().kill();
        if let Some(guest) = self.guest.take() {
            guest.join().unwrap();
        }
        // What was not flushed may have come or not.
        let mut model = self.model.lock().unwrap();
        let unsure = model.blocks.iter_mut().filter(|block| block.len() > 1);
        unsure.flatten().for_each(|(_, certain)| *certain = false);
    }

    /// Starts it again. Returns what became of the jobs that were interrupted.
    pub(super) fn start(&mut self) -> Vec<Value> {
        let daemon = Daemon::start(self.directory.path(), &self.toml);
        self.started(daemon)
    }

    /// Tries to start it again, which is refused.
    pub(super) fn try_start(&self) -> std::process::Output {
        let file = self.directory.path().join("drive.toml");
        std::fs::write(&file, &self.toml).unwrap();
        std::process::Command::new(Daemon::program()).arg("run").arg(&file).output().unwrap()
    }

    /// Starts it again, and kills it while it starts.
    pub(super) fn kill_while_starting(&self, after: Duration) {
        Daemon::kill_while_starting(self.directory.path(), &self.toml, after);
    }

    /// The same after a power cut, as far as the program can tell. `None`: that cannot be pretended here.
    pub(super) fn start_after_power_cut(&mut self) -> Option<Vec<Value>> {
        let daemon = Daemon::start_after_power_cut(self.directory.path(), &self.toml)?;
        Some(self.started(daemon))
    }

    fn started(&mut self, daemon: Daemon) -> Vec<Value> {
        self.qmp = daemon.qmp();
        self.daemon = Some(daemon);
        let jobs = self.qmp.run("x-driveline-query-interrupted-jobs", json!({}));
        jobs.as_array().unwrap().clone()
    }

    /// Starts it again, and the guest writes on. The one job goes on; returns how much was left to copy.
    pub(super) fn start_and_resume(&mut self, id: &str) -> u64 {
        let jobs = self.start();
        assert_eq!(jobs.len(), 1, "{jobs:?}");
        assert_eq!((&jobs[0]["id"], &jobs[0]["outcome"]), (&json!(id), &json!("resumed")), "{jobs:?}");
        let told = self.qmp.wait_event("X_DRIVELINE_JOB_INTERRUPTED", id);
        assert_eq!(told, jobs[0]);
        self.begin_to_write();
        jobs[0]["left"].as_u64().unwrap_or(u64::MAX)
    }

    pub(super) fn job(&mut self, id: &str) -> Option<Value> {
        let jobs = self.qmp.run("query-jobs", json!({}));
        jobs.as_array().unwrap().iter().find(|job| job["id"] == id).cloned()
    }

    /// Waits until a job has done so many bytes.
    pub(super) fn wait_progress(&mut self, id: &str, bytes: u64) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let job = self.job(id).expect("the job runs");
            if job["current-progress"].as_u64().unwrap() >= bytes {
                return;
            }
            assert!(Instant::now() < deadline, "{job}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills the program in the middle of a job: some of its progress is saved by then.
    pub(super) fn kill_midway(&mut self, id: &str) {
        // At this speed several savings lie between the two.
        self.wait_progress(id, 2 * MIB);
        self.wait_progress(id, 8 * MIB);
        self.kill();
    }

    /// Lets a job run as fast as it can until it is over.
    pub(super) fn hurry(&mut self, id: &str) {
        self.qmp.run("block-job-set-speed", json!({ "device": id, "speed": 0 }));
    }

    pub(super) fn wait_completed(&mut self, id: &str) {
        let done = self.qmp.wait_event("BLOCK_JOB_COMPLETED", id);
        assert_eq!(done["error"], Value::Null, "{done}");
        assert_eq!(self.journals(), [""; 0], "nothing is left of a job that is over");
    }

    pub(super) fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    pub(super) fn end(&mut self) {
        assert!(self.daemon.take().unwrap().terminate().success());
    }
}

fn contents(number: u64) -> Vec<u8> {
    match number {
        0 => vec![0x11; BLOCK as usize],
        number => number.to_le_bytes().repeat(BLOCK as usize / 8),
    }
}

fn settle(model: &mut Model) {
    for block in &mut model.blocks {
        let last = block.iter().rposition(|(_, certain)| *certain).unwrap_or(0);
        block.drain(..last);
    }
}

/// Writes some blocks, or flushes.
fn write_once(guest: &mut Guest, model: &Mutex<Model>, random: &mut SmallRng) -> std::io::Result<()> {
    if random.random_range(0..20) == 0 {
        guest.flush()?;
        settle(&mut model.lock().unwrap());
        return Ok(());
    }
    let count = random.random_range(1..=8);
    // In every fourth granule alone, or soon there is nothing that was copied for good.
    let at = random.random_range(0..GRANULE / BLOCK - count);
    let first = random.random_range(0..SIZE / GRANULE / 4) * 4 * (GRANULE / BLOCK) + at;
    let (offset, length) = (first * BLOCK, count * BLOCK);
    let granules: BTreeSet<u64> = (offset / GRANULE..(offset + length).div_ceil(GRANULE)).collect();
    let number = {
        let mut model = model.lock().unwrap();
        model.number += 1;
        let number = model.number;
        let blocks = &mut model.blocks[first as usize..(first + count) as usize];
        blocks.iter_mut().for_each(|block| block.push((number, false)));
        model.may.extend(&granules);
        number
    };
    guest.write(offset, &contents(number).repeat(count as usize))?;
    {
        let mut model = model.lock().unwrap();
        model.must.extend(&granules);
        let blocks = &mut model.blocks[first as usize..(first + count) as usize];
        blocks.iter_mut().for_each(|block| block.last_mut().unwrap().1 = true);
    }
    // Not as fast as can be: the job is to have its turn.
    std::thread::sleep(Duration::from_micros(300));
    Ok(())
}
