//! Random worlds, with nothing pretended: the program as a process, qcow2 images on files, the shipped filters as
//! plugins, guests over NBD and a monitor over QMP. Guests write while filters come and go (some make writes fail),
//! streams, commits and backups run, are paused, cancelled and completed, the drive grows, bitmaps are added, cleared,
//! merged and renamed, and moments are kept, served and forgotten. After each step the drive's content, its bitmaps, what
//! changed between its checkpoints and what copies of its moments hold equal an oracle, to the granule; at the end QEMU's
//! tools say that every image is clean and that the one on top holds what the guests wrote.
//!
//! `PROGRAM_WORLDS_SEED=n` replays one world, `PROGRAM_WORLDS=n` runs so many, `PROGRAM_WORLDS_STEPS=n` makes them so long.
//! Each step has a seed of its own: if a job or a thread is a little later in one run than in another, what is tried after
//! that stays the same.

mod bitmaps;
mod copies;
mod moments;
mod oracle;

use crate::harness::{Daemon, Guest, Qmp, have, output, run};
use copies::Copy;
use moments::View;
use oracle::Oracle;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
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

struct World {
    seed: u64,
    /// The step, from 1 on.
    step: u64,
    rng: SmallRng,
    directory: PathBuf,
    daemon: Daemon,
    qmp: Qmp,
    guests: Vec<Guest>,
    oracle: Arc<Mutex<Oracle>>,
    /// Filters that were inserted, and whether they make writes fail.
    filters: BTreeMap<String, bool>,
    copies: Vec<Copy>,
    views: Vec<View>,
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
        let guests = (0..GUESTS).map(|_| Guest::connect(&socket, "vda")).collect();
        let oracle = Oracle { content, bitmaps: BTreeMap::new(), epochs: Vec::new() };
        Self {
            seed,
            step: 0,
            rng,
            directory: directory.to_owned(),
            daemon,
            qmp,
            guests,
            oracle: Arc::new(Mutex::new(oracle)),
            filters: BTreeMap::new(),
            copies: Vec::new(),
            views: Vec::new(),
            failed: false,
            log: Vec::new(),
        }
    }

    /// A name for something of this step. There is but one of a kind.
    fn name(&self, kind: &str) -> String {
        format!("{kind}{}", self.step)
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

    /// Random numbers of this step, and of one of its guests.
    fn random(&self, guest: u64) -> SmallRng {
        SmallRng::seed_from_u64(self.seed << 20 | self.step << 4 | guest)
    }

    fn step(&mut self) {
        self.step += 1;
        self.rng = self.random(0);
        // Bitmaps are changed while guests rest, so that the oracle knows which write came first.
        if self.rng.random_ratio(2, 5) {
            match self.rng.random_range(0..8) {
                0 if self.copies.len() < 2 => self.begin_copy(),
                1..=3 => self.change_moments(),
                _ => self.change_bitmaps(),
            }
        } else {
            // A filter that fails writes may come within this step, and does its work until it is gone.
            let faults = self.rng.random_ratio(1, 4) || self.filters.values().any(|faulty| *faulty);
            self.failed |= faults;
            let mut guests = std::mem::take(&mut self.guests);
            let oracle = self.oracle.clone();
            std::thread::scope(|scope| {
                for (number, guest) in guests.iter_mut().enumerate() {
                    let (oracle, mut rng) = (&*oracle, self.random(1 + number as u64));
                    scope.spawn(move || burst(guest, &mut rng, number as u64, oracle, faults));
                }
                self.change_graph(faults);
            });
            self.guests = guests;
            if self.rng.random_ratio(1, 8) {
                // One leaves, and comes again to a drive that may have grown.
                let number = self.rng.random_range(0..GUESTS);
                self.guests[number] = Guest::connect(&self.directory.join("vda.sock"), "vda");
            }
        }
        self.check();
    }

    /// Nodes of the drive, in one order: images, their files, and filters that were put between them.
    fn nodes(&mut self) -> Vec<String> {
        let nodes = self.qmp.run("query-named-block-nodes", json!({ "flat": true }));
        let name = |node: &Value| node["node-name"].as_str().unwrap().to_owned();
        let names = nodes.as_array().unwrap().iter().map(name);
        let mut nodes: Vec<String> = names.filter(|name| name.starts_with(['i', 'f'])).collect();
        nodes.sort();
        nodes
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
                let rule = json!({ "op": op, "errno": errno, "probability": 0.3, "seed": self.step });
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
        let mut jobs = jobs.as_array().unwrap().clone();
        if jobs.is_empty() {
            return;
        }
        jobs.sort_by_key(|job| job["id"].to_string());
        let job = self.pick(&jobs);
        let verb = match (self.rng.random_range(0..6), job["status"].as_str().unwrap()) {
            (0, _) => "job-pause",
            (1, "ready") => "job-cancel",
            // Its target is an overlay of its own, and is to stay one.
            (_, "ready") if job["id"].as_str().unwrap().starts_with("mirror") => "job-cancel",
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

    /// The drive and its bitmaps, as a client sees them who comes now, equal the oracle.
    fn check(&mut self) {
        self.check_copies();
        let mut oracle = self.oracle.lock().unwrap();
        let mut guest = Guest::connect(&self.directory.join("vda.sock"), "vda");
        assert_eq!(guest.size, oracle.size());
        let content = guest.read(0, oracle.size() as u32).unwrap();
        assert_content(&mut oracle.content, &content, "the drive");
        drop(oracle);
        self.check_mirrors();
        self.check_bitmaps();
        self.check_moments();
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
        self.check();
        self.forget_moments();
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
            name_backing(&image);
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

/// A job wrote into an image what is below it, with a filter that is there: in words that others do not read. They are told again,
/// without it.
fn name_backing(image: &Path) {
    let image = image.to_str().unwrap();
    let bare = json!({ "driver": "qcow2", "file": { "driver": "file", "filename": image }, "backing": null });
    let info = run("qemu-img", &["info", "--output=json", &format!("json:{bare}")]);
    let info: Value = serde_json::from_str(&info).unwrap();
    let backing = info["backing-filename"].as_str().unwrap_or_default();
    if backing.starts_with("json:") {
        let file = |name: &&str| format!("{name}.qcow2");
        let below = IMAGES.iter().rev().map(file).find(|file| backing.contains(&**file)).unwrap();
        run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &below, image]);
    }
}

/// What was read is what is expected, where that is known. What was not is known from now on.
fn assert_content(expected: &mut [Option<u8>], found: &[u8], what: &str) {
    assert_eq!(found.len() as u64, expected.len() as u64 * SECTOR, "{what}");
    for (sector, (expected, found)) in expected.iter_mut().zip(found.chunks(SECTOR as usize)).enumerate() {
        let is_one = found.iter().all(|byte| *byte == found[0]);
        match expected {
            Some(byte) => {
                assert!(is_one && found[0] == *byte, "{what}: sector {sector}: {byte}, but {}", found[0]);
            }
            None if is_one => *expected = Some(found[0]),
            None => {}
        }
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

/// Seeds of worlds that were more than the others: overlays through which a moment is read while all else goes on.
const MORE: [u64; 2] = [4, 9];

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
                        at if at < last + MORE.len() as u64 => world(MORE[(at - last) as usize], steps),
                        _ => return,
                    }
                }
            });
        }
    });
}
