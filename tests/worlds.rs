//! Random worlds, with nothing pretended: the program as a process, qcow2 images on files, the shipped filters as
//! plugins, guests over NBD and a monitor over QMP. Guests write while filters come and go (some make writes fail),
//! streams and commits run, are paused, cancelled and completed, the drive grows, and bitmaps are added, cleared,
//! merged and renamed. After each step the drive's content and its bitmaps equal an oracle, to the granule; at the
//! end QEMU's tools say that every image is clean and that the one on top holds what the guests wrote.
//!
//! `PROGRAM_WORLDS_SEED=n` replays one world (as far as threads let themselves be replayed), `PROGRAM_WORLDS=n` runs
//! so many, `PROGRAM_WORLDS_STEPS=n` makes them so long.

use crate::harness::{Daemon, Guest, Qmp, dirty, have, output, run};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

const GUESTS: usize = 3;
const SECTOR: u64 = 512;
const MIB: u64 = 1 << 20;

/// Images over each other: the first is at the bottom.
const IMAGES: [&str; 6] = ["i0", "i1", "i2", "i3", "i4", "i5"];

const DRIVE: &str = r#"
[drive.vda]
root = "i5"

[export.vda]
type = "nbd"
drive = "vda"
socket = "vda.sock"
writable = true

[monitor]
qmp = "qmp.sock"
"#;

fn configuration() -> String {
    let image = |(at, name): (usize, &&str)| {
        let file = format!("{{ driver = \"file\", path = \"{name}.qcow2\", node-name = \"{name}-file\" }}");
        let backing = if at > 0 { format!("backing = \"{}\"\n", IMAGES[at - 1]) } else { String::new() };
        let read_only = at + 1 < IMAGES.len();
        format!("[node.{name}]\ndriver = \"qcow2\"\nfile = {file}\n{backing}read-only = {read_only}\n\n")
    };
    IMAGES.iter().enumerate().map(image).collect::<String>() + DRIVE
}

/// What the drive's user knows: its content, where that is known, and what each bitmap must say.
struct Oracle {
    /// By sector; `None` after a change that failed, or that leaves the content open.
    content: Vec<Option<u8>>,
    bitmaps: BTreeMap<String, Expected>,
}

#[derive(Clone)]
struct Expected {
    granularity: u64,
    recording: bool,
    dirty: BTreeSet<u64>,
    /// What failed changes addressed: one that a filter above refused never came to the bitmap.
    maybe: BTreeSet<u64>,
}

impl Oracle {
    fn mark(&mut self, range: Range<u64>, failed: bool) {
        for bitmap in self.bitmaps.values_mut().filter(|bitmap| bitmap.recording) {
            let granules = range.start / bitmap.granularity..range.end.div_ceil(bitmap.granularity);
            if failed { bitmap.maybe.extend(granules) } else { bitmap.dirty.extend(granules) }
        }
    }

    fn size(&self) -> u64 {
        self.content.len() as u64 * SECTOR
    }
}

struct World {
    rng: SmallRng,
    directory: PathBuf,
    daemon: Daemon,
    qmp: Qmp,
    guests: Vec<(Guest, SmallRng)>,
    oracle: Arc<Mutex<Oracle>>,
    /// Filters that were inserted, and whether they make writes fail.
    filters: BTreeMap<String, bool>,
    names: u64,
    /// At some time writes failed, so that clusters may have leaked.
    failed: bool,
    log: Vec<String>,
}

/// The images, each with some data.
fn make_chain(rng: &mut SmallRng, directory: &Path) {
    let cluster = ["4k", "64k", "64k"][rng.random_range(0..3)];
    let mut below: Option<String> = None;
    for (byte, name) in IMAGES.into_iter().enumerate() {
        let file = format!("{name}.qcow2");
        let image = directory.join(&file).to_str().unwrap().to_owned();
        let options = format!("cluster_size={cluster}");
        let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        match &below {
            Some(below) => create.extend(["-b", below, "-F", "qcow2", &image]),
            None => create.extend([&image, "4M"]),
        }
        run("qemu-img", &create);
        let mut writes = vec![format!("write -z {} 100k", rng.random_range(0..3900) * 1024)];
        for _ in 0..4 {
            writes.push(format!("write -P {} {} 200k", byte + 1, rng.random_range(0..3800 / 4) * 4096));
        }
        let mut fill = vec!["-f", "qcow2"];
        writes.iter().for_each(|write| fill.extend(["-c", write]));
        fill.push(&image);
        run("qemu-io", &fill);
        below = Some(file);
    }
}

impl World {
    fn new(seed: u64, directory: &Path) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        make_chain(&mut rng, directory);
        let before = directory.join("before.raw");
        let top = directory.join("i5.qcow2");
        let (from, to) = (top.to_str().unwrap(), before.to_str().unwrap());
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", from, to]);
        let content = std::fs::read(before).unwrap().chunks(SECTOR as usize).map(|c| Some(c[0])).collect();
        let daemon = Daemon::start(directory, &configuration());
        let qmp = daemon.qmp();
        let socket = directory.join("vda.sock");
        let guest = |number: usize| {
            (Guest::connect(&socket, "vda"), SmallRng::seed_from_u64(seed * 10 + 1 + number as u64))
        };
        let guests = (0..GUESTS).map(guest).collect();
        let oracle = Arc::new(Mutex::new(Oracle { content, bitmaps: BTreeMap::new() }));
        let (directory, filters, log) = (directory.to_owned(), BTreeMap::new(), Vec::new());
        Self { rng, directory, daemon, qmp, guests, oracle, filters, names: 0, failed: false, log }
    }

    fn name(&mut self, kind: &str) -> String {
        self.names += 1;
        format!("{kind}{}", self.names)
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.rng.random_range(0..from.len())].clone()
    }

    fn command(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        let said = format!("{command} {arguments}");
        let result = self.qmp.try_run(command, arguments);
        let short = match &result {
            Ok(_) => "ok".to_owned(),
            Err(error) => error["desc"].to_string(),
        };
        self.log.push(format!("{said}: {short}"));
        result
    }

    fn step(&mut self) {
        // Bitmaps are changed while guests rest, so that the oracle knows which write came first.
        if self.rng.random_ratio(1, 3) {
            self.change_bitmaps();
        } else {
            // A filter that fails writes may come within this step, and does its work until it is gone.
            let faults = self.rng.random_ratio(1, 4) || self.filters.values().any(|faulty| *faulty);
            self.failed |= faults;
            let mut guests = std::mem::take(&mut self.guests);
            let oracle = self.oracle.clone();
            std::thread::scope(|scope| {
                for (number, (guest, rng)) in guests.iter_mut().enumerate() {
                    let oracle = &*oracle;
                    scope.spawn(move || burst(guest, rng, number as u64, oracle, faults));
                }
                self.change_graph(faults);
            });
            self.guests = guests;
            if self.rng.random_ratio(1, 8) {
                // One leaves, and comes again to a drive that may have grown.
                let number = self.rng.random_range(0..GUESTS);
                self.guests[number].0 = Guest::connect(&self.directory.join("vda.sock"), "vda");
            }
        }
        self.check();
    }

    fn nodes(&mut self) -> Vec<String> {
        let nodes = self.qmp.run("query-named-block-nodes", json!({ "flat": true }));
        let name = |node: &Value| node["node-name"].as_str().unwrap().to_owned();
        nodes.as_array().unwrap().iter().map(name).filter(|name| !name.starts_with('#')).collect()
    }

    fn images(&mut self) -> Vec<String> {
        let nodes = self.nodes();
        nodes.into_iter().filter(|name| IMAGES.contains(&&**name)).collect()
    }

    fn change_graph(&mut self, faults: bool) {
        match self.rng.random_range(0..12) {
            0..=2 => self.insert_filter(faults),
            3 if !self.filters.is_empty() => self.remove_filter(),
            3 | 4 => {
                let mut arguments = json!({ "job-id": self.name("stream"), "device": "vda" });
                let images = self.images();
                if self.rng.random_ratio(4, 5) {
                    arguments["base-node"] = self.pick(&images).into();
                }
                self.job("block-stream", arguments);
            }
            5..=7 => {
                let mut arguments = json!({ "job-id": self.name("commit"), "device": "vda" });
                let mut ends = [self.pick(&IMAGES), self.pick(&IMAGES)];
                ends.sort();
                if self.rng.random_ratio(1, 2) {
                    arguments["top-node"] = ends[1].into();
                }
                if self.rng.random_ratio(4, 5) {
                    arguments["base-node"] = ends[0].into();
                }
                self.job("block-commit", arguments);
            }
            8 => {
                let size = self.oracle.lock().unwrap().size() + 65536 * self.rng.random_range(1..5);
                if self.command("block_resize", json!({ "device": "vda", "size": size })).is_ok() {
                    let mut oracle = self.oracle.lock().unwrap();
                    let before = oracle.size();
                    oracle.content.resize((size / SECTOR) as usize, Some(0));
                    oracle.mark(before..size, false);
                }
            }
            _ => self.steer_job(),
        }
    }

    fn insert_filter(&mut self, faults: bool) {
        let name = self.name("f");
        let mut options = match self.rng.random_range(0..if faults { 6 } else { 4 }) {
            0 => json!({ "driver": "throttle", "iops": 3000 }),
            1 => json!({ "driver": "log" }),
            2 => json!({ "driver": "bitmap-holder" }),
            3 => json!({ "driver": "delay", "write": "1ms", "flush": "1ms" }),
            _ => {
                let op = self.pick(&["write", "write", "write-zeroes", "flush", "discard"]);
                let errno = self.pick(&["EIO", "ENOSPC"]);
                let rule = json!({ "op": op, "errno": errno, "probability": 0.3, "seed": self.names });
                json!({ "driver": "blkdebug", "rules": [rule] })
            }
        };
        options["node-name"] = name.clone().into();
        let faulty = options["driver"] == "blkdebug";
        let mut above = self.nodes();
        above.extend(["vda".to_owned(), "vda".to_owned()]);
        let above = self.pick(&above);
        let arguments = json!({ "options": options, "above": above });
        if self.command("x-driveline-blockdev-insert-filter", arguments).is_ok() {
            self.filters.insert(name, faulty);
        }
    }

    fn remove_filter(&mut self) {
        let names: Vec<String> = self.filters.keys().cloned().collect();
        let name = self.pick(&names);
        if self.command("x-driveline-blockdev-remove-filter", json!({ "node-name": name })).is_ok() {
            self.filters.remove(&name);
        }
    }

    fn job(&mut self, command: &str, mut arguments: Value) {
        arguments["on-error"] = self.pick(&["report", "stop", "ignore", "enospc"]).into();
        // Most last for some steps.
        arguments["speed"] = self.pick(&[0, MIB / 2, MIB, 4 * MIB]).into();
        let _ = self.command(command, arguments);
    }

    fn steer_job(&mut self) {
        let jobs = self.qmp.run("query-jobs", json!({}));
        let jobs = jobs.as_array().unwrap();
        if jobs.is_empty() {
            return;
        }
        let job = self.pick(jobs);
        let verb = match (self.rng.random_range(0..6), job["status"].as_str().unwrap()) {
            (0, _) => "job-pause",
            (1, "ready") => "job-cancel",
            (_, "ready") => "job-complete",
            (1, _) => "job-cancel",
            (2..=4, _) => "job-resume",
            _ => "block-job-set-speed",
        };
        let _ = match verb {
            "block-job-set-speed" => self.command(verb, json!({ "device": job["id"], "speed": 0 })),
            _ => self.command(verb, json!({ "id": job["id"] })),
        };
    }

    fn change_bitmaps(&mut self) {
        let names: Vec<String> = self.oracle.lock().unwrap().bitmaps.keys().cloned().collect();
        if names.is_empty() || (names.len() < 3 && self.rng.random_ratio(1, 3)) {
            let (name, granularity) = (self.name("bitmap"), 512 << self.rng.random_range(0..8));
            let arguments = json!({ "node": "vda", "name": name, "granularity": granularity });
            self.command("block-dirty-bitmap-add", arguments).unwrap();
            let expected =
                Expected { granularity, recording: true, dirty: BTreeSet::new(), maybe: BTreeSet::new() };
            self.oracle.lock().unwrap().bitmaps.insert(name, expected);
            return;
        }
        let name = self.pick(&names);
        let bitmap = json!({ "node": "vda", "name": name });
        match self.rng.random_range(0..6) {
            0 => {
                self.command("block-dirty-bitmap-remove", bitmap).unwrap();
                self.oracle.lock().unwrap().bitmaps.remove(&name);
            }
            1 => {
                self.command("block-dirty-bitmap-clear", bitmap).unwrap();
                self.oracle.lock().unwrap().bitmaps.get_mut(&name).unwrap().dirty.clear();
            }
            2 => {
                let recording = self.rng.random_ratio(1, 2);
                let verb = if recording { "enable" } else { "disable" };
                self.command(&format!("block-dirty-bitmap-{verb}"), bitmap).unwrap();
                self.oracle.lock().unwrap().bitmaps.get_mut(&name).unwrap().recording = recording;
            }
            3 => {
                let new = self.name("renamed");
                let arguments = json!({ "node": "vda", "name": name, "new-name": new });
                self.command("x-driveline-block-dirty-bitmap-rename", arguments).unwrap();
                let mut oracle = self.oracle.lock().unwrap();
                let expected = oracle.bitmaps.remove(&name).unwrap();
                oracle.bitmaps.insert(new, expected);
            }
            4 => {
                let source = self.pick(&names);
                if source == name {
                    return;
                }
                let arguments = json!({ "node": "vda", "target": name, "bitmaps": [source] });
                self.command("block-dirty-bitmap-merge", arguments).unwrap();
                let mut oracle = self.oracle.lock().unwrap();
                let (size, from) = (oracle.size(), oracle.bitmaps[&source].clone());
                let target = oracle.bitmaps.get_mut(&name).unwrap();
                for granule in from.dirty {
                    let range = granule * from.granularity..((granule + 1) * from.granularity).min(size);
                    target
                        .dirty
                        .extend(range.start / target.granularity..range.end.div_ceil(target.granularity));
                }
            }
            _ => {
                // Whose last step cannot be done leaves nothing of the others.
                let actions = json!([
                    { "type": "block-dirty-bitmap-add", "data": { "node": "vda", "name": "never" } },
                    { "type": "block-dirty-bitmap-clear", "data": bitmap },
                    { "type": "block-dirty-bitmap-remove", "data": { "node": "vda", "name": "not there" } },
                ]);
                self.command("transaction", json!({ "actions": actions })).unwrap_err();
            }
        }
    }

    /// The drive and its bitmaps, as a client sees them who comes now, equal the oracle.
    fn check(&mut self) {
        let mut oracle = self.oracle.lock().unwrap();
        let mut guest = Guest::connect(&self.directory.join("vda.sock"), "vda");
        assert_eq!(guest.size, oracle.size());
        let content = guest.read(0, oracle.size() as u32).unwrap();
        for (sector, expected) in oracle.content.iter_mut().enumerate() {
            let found = &content[sector * SECTOR as usize..][..SECTOR as usize];
            match expected {
                Some(byte) => {
                    assert!(found.iter().all(|b| b == byte), "sector {sector}: {byte}, but {}", found[0]);
                }
                // From now on it stays as it is.
                None if found.iter().all(|b| *b == found[0]) => *expected = Some(found[0]),
                None => {}
            }
        }
        let drives = self.qmp.run("query-block", json!({}));
        let drive = drives.as_array().unwrap().iter().find(|drive| drive["device"] == "vda").unwrap();
        let mut bitmaps = drive["inserted"]["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
        // A commit has one of its own.
        bitmaps.retain(|bitmap| !bitmap["name"].as_str().unwrap().starts_with('#'));
        let names: BTreeSet<String> =
            bitmaps.iter().map(|bitmap| bitmap["name"].as_str().unwrap().to_owned()).collect();
        assert_eq!(names, oracle.bitmaps.keys().cloned().collect(), "the drive's bitmaps");
        if names.is_empty() {
            return;
        }
        // An export of all of them, for nbdinfo.
        let list: Vec<&String> = names.iter().collect();
        let export =
            json!({ "type": "nbd", "id": "check", "node-name": "vda", "name": "check", "bitmaps": list });
        self.qmp.run("block-export-add", export);
        let uri = format!("nbd+unix:///check?socket={}", self.directory.join("vda.sock").display());
        let size = oracle.size();
        for bitmap in &bitmaps {
            let name = bitmap["name"].as_str().unwrap();
            let expected = oracle.bitmaps.get_mut(name).unwrap();
            assert_eq!(bitmap["recording"], expected.recording, "{name}");
            assert_eq!(bitmap["granularity"], expected.granularity, "{name}");
            let found = dirty(&uri, name, expected.granularity);
            expected.dirty.extend(expected.maybe.intersection(&found));
            expected.maybe.clear();
            assert_eq!(found, expected.dirty, "bitmap {name}");
            let bytes = |granule: &u64| {
                ((granule + 1) * expected.granularity).min(size) - granule * expected.granularity
            };
            let count: u64 = found.iter().map(bytes).sum();
            assert!(
                bitmap["count"].as_u64().unwrap().abs_diff(count) < expected.granularity,
                "{name}: {bitmap}"
            );
        }
        self.qmp.run("block-export-del", json!({ "id": "check", "mode": "hard" }));
    }

    /// The image that the drive's filters lead to.
    fn top_image(&mut self) -> String {
        let drives = self.qmp.run("query-block", json!({}));
        let file = drives[0]["inserted"]["file"].as_str().unwrap();
        let at = |name: &&str| file.find(&format!("{name}.qcow2")).unwrap_or(usize::MAX);
        IMAGES.into_iter().min_by_key(at).unwrap().to_owned()
    }

    /// Everything that was begun ends, and others look at what is left.
    fn end(mut self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let jobs = self.qmp.run("query-jobs", json!({}));
            let jobs = jobs.as_array().unwrap();
            if jobs.is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "jobs end when they are told to: {jobs:?}");
            for job in jobs {
                let _ = self.qmp.try_run("job-cancel", json!({ "id": job["id"] }));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // Filters at the root hold the drive's bitmaps: those go to the image on top.
        let top = self.top_image();
        for name in self.oracle.lock().unwrap().bitmaps.keys() {
            let arguments = json!({ "node": "vda", "name": name, "target": top });
            self.qmp.run("x-driveline-block-dirty-bitmap-move", arguments);
        }
        for name in self.filters.keys() {
            // Some went with the images that a job took away.
            let removed =
                self.qmp.try_run("x-driveline-blockdev-remove-filter", json!({ "node-name": name }));
            let gone = |error: &Value| error["desc"].as_str().unwrap().starts_with("Failed to find node");
            assert!(removed.as_ref().map_or_else(gone, |_| true), "{removed:?}");
        }
        self.check();
        let nodes = self.qmp.run("query-named-block-nodes", json!({ "flat": true }));
        for node in nodes.as_array().unwrap() {
            assert!(["qcow2", "file"].contains(&node["drv"].as_str().unwrap()), "a filter is left: {node}");
        }
        let file = self.directory.join(format!("{top}.qcow2"));
        let mut guest = Guest::connect(&self.directory.join("vda.sock"), "vda");
        let size = guest.size;
        let raw = self.directory.join("after.raw");
        std::fs::write(&raw, guest.read(0, size as u32).unwrap()).unwrap();
        drop(guest);
        self.guests.clear();
        drop(self.qmp);
        assert!(self.daemon.terminate().success());
        for name in IMAGES {
            let image = self.directory.join(format!("{name}.qcow2"));
            let checked = output("qemu-img", &["check", "-q", image.to_str().unwrap()]);
            let clean = match checked.status.code() {
                Some(3) => self.failed, // leaked clusters, after failed writes
                code => code == Some(0),
            };
            assert!(clean, "{name}: {checked:?}");
        }
        run(
            "qemu-img",
            &["compare", "-q", "-f", "raw", "-F", "qcow2", raw.to_str().unwrap(), file.to_str().unwrap()],
        );
    }
}

/// Some changes by one guest, at places that are its own.
fn burst(guest: &mut Guest, rng: &mut SmallRng, number: u64, oracle: &Mutex<Oracle>, faults: bool) {
    for _ in 0..rng.random_range(1..8) {
        // Every third stretch of four sectors, so that no two guests write the same one, but the same clusters.
        let stretch = rng.random_range(0..guest.size / SECTOR / (4 * GUESTS as u64)) * GUESTS as u64 + number;
        let first = stretch * 4 + rng.random_range(0..4);
        let length = rng.random_range(1..=4 - first % 4);
        let range = first * SECTOR..(first + length) * SECTOR;
        let bytes = (length * SECTOR) as u32;
        let byte: u8 = rng.random_range(100..200);
        let (result, now) = match rng.random_range(0..8) {
            0 | 1 => (guest.write_zeroes(range.start, bytes), Some(0)),
            2 => (guest.trim(range.start, bytes), None),
            _ => (guest.write(range.start, &vec![byte; bytes as usize]), Some(byte)),
        };
        match &result {
            Ok(()) => {}
            Err(error) => assert!(faults, "nothing fails here: {error}"),
        }
        let mut oracle = oracle.lock().unwrap();
        oracle.mark(range, result.is_err());
        for sector in first..first + length {
            oracle.content[sector as usize] = now.filter(|_| result.is_ok());
        }
    }
    if rng.random_ratio(1, 3) {
        let flushed = guest.flush();
        assert!(faults || flushed.is_ok(), "nothing fails here: {flushed:?}");
    }
}

fn world(seed: u64, steps: usize) {
    let directory = tempfile::tempdir().unwrap();
    let mut world = World::new(seed, directory.path());
    let mut lived = Ok(());
    for _ in 0..steps {
        lived = catch_unwind(AssertUnwindSafe(|| world.step()));
        if lived.is_err() {
            break;
        }
    }
    let log = world.log.clone();
    if std::env::var_os("PROGRAM_WORLDS_LOG").is_some() {
        log.iter().for_each(|line| eprintln!("{seed} {line}"));
    }
    let ended = lived.and_then(|()| catch_unwind(AssertUnwindSafe(|| world.end())));
    if let Err(panic) = ended {
        eprintln!("world {seed} (replay with PROGRAM_WORLDS_SEED={seed}):");
        log.iter().for_each(|line| eprintln!("  {line}"));
        resume_unwind(panic);
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

/// Seeds of worlds that have found something: a resize that failed when it was done, bitmaps that did not come home.
const ONCE_FAILED: [u64; 2] = [28, 30];

#[test]
fn a_drive_and_its_bitmaps_are_exact_in_random_worlds() {
    if !have("a_drive_and_its_bitmaps_are_exact_in_random_worlds", &["qemu-img", "qemu-io", "nbdinfo"]) {
        return;
    }
    let steps = number("PROGRAM_WORLDS_STEPS", 40) as usize;
    if std::env::var_os("PROGRAM_WORLDS_SEED").is_some() {
        return world(number("PROGRAM_WORLDS_SEED", 0), steps);
    }
    // Programs wait for each other's disks more than for processors.
    let (next, last) = (AtomicU64::new(0), number("PROGRAM_WORLDS", 4));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    match next.fetch_add(1, SeqCst) {
                        at if at < last => world(at, steps),
                        at if at < last + ONCE_FAILED.len() as u64 => {
                            world(ONCE_FAILED[(at - last) as usize], steps)
                        }
                        _ => return,
                    }
                }
            });
        }
    });
}
