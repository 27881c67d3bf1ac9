//! The program is killed at random moments, under writes, jobs and bitmap operations, and started again: no bitmap has lost a
//! write that was acknowledged, and none has one too much that was not in flight.
//!
//! Every world has a seed, which is printed when it fails. `DRIVELINE_KILLS` says how many kills, and `DRIVELINE_KILLS_SEED` runs one
//! world alone.

use crate::harness::{Daemon, Guest, Qmp, dirty, have, run};
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

const GRANULARITY: u64 = 65536;
const GRANULES: u64 = 512;
const LIVES: u64 = 6;
const KILLS_IN_CI: u64 = 300;

/// What is certain of a bitmap's granules at one moment of a world.
#[derive(Clone, Debug, Default)]
struct Oracle {
    /// Counts the events of a life.
    now: Arc<AtomicU64>,
    writes: Arc<Mutex<Vec<Write>>>,
}

/// A write: when it began, and when it was acknowledged, if it was.
#[derive(Clone, Copy, Debug)]
struct Write {
    granule: u64,
    began: u64,
    ended: Option<u64>,
}

/// A bitmap as a client knows it.
#[derive(Clone, Debug, Default)]
struct Known {
    /// What was dirty when this life began.
    before: BTreeSet<u64>,
    /// The last clear that was acknowledged (or the bitmap's own beginning): when it began and ended.
    cleared: Option<(u64, u64)>,
    /// A clear, an addition or a removal that the end of the program may have come before.
    unsure_since: Option<u64>,
    /// It may be there or not.
    may_be_missing: bool,
}

impl Oracle {
    fn tick(&self) -> u64 {
        self.now.fetch_add(1, SeqCst)
    }

    /// What a bitmap must have and what it may have.
    fn bounds(&self, known: &Known) -> (BTreeSet<u64>, BTreeSet<u64>) {
        let (mut must, mut may) = (BTreeSet::new(), BTreeSet::new());
        if known.cleared.is_none() {
            must.extend(&known.before);
            may.extend(&known.before);
        }
        for write in self.writes.lock().unwrap().iter() {
            let (clear_began, clear_ended) = known.cleared.map_or((0, 0), |(began, ended)| (began, ended));
            let gone = known.cleared.is_some() && write.ended.is_some_and(|ended| ended < clear_began);
            if gone {
                continue;
            }
            may.insert(write.granule);
            let after_clear = known.cleared.is_none() || write.began > clear_ended;
            if write.ended.is_some() && after_clear {
                must.insert(write.granule);
            }
        }
        if known.unsure_since.is_some() {
            // It may have come, and nobody was told: nothing is certain any more of what it took away.
            must.clear();
        }
        (must, may)
    }
}

/// A world: a directory with images, and the program on it, again and again.
struct World {
    directory: tempfile::TempDir,
    seed: u64,
    toml: String,
    known: BTreeMap<String, Known>,
}

impl World {
    fn new(seed: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let durability = *["process", "process", "power"].get(seed as usize % 3).unwrap();
        let nodes = match seed % 4 {
            0 => {
                let disk = std::fs::File::create(path("disk.raw")).unwrap();
                disk.set_len(GRANULES * GRANULARITY).unwrap();
                "[node.top]\ndriver = \"raw\"\nfile = \"disk.raw\"\n"
            }
            _ => {
                let size = (GRANULES * GRANULARITY).to_string();
                run("qemu-img", &["create", "-q", "-f", "qcow2", &path("base.qcow2"), &size]);
                run("qemu-io", &["-c", "write -P 1 0 4M", &path("base.qcow2")]);
                for (image, below) in [("mid.qcow2", "base.qcow2"), ("top.qcow2", "mid.qcow2")] {
                    let below = path(below);
                    run(
                        "qemu-img",
                        &["create", "-q", "-f", "qcow2", "-b", &below, "-F", "qcow2", &path(image)],
                    );
                }
                run("qemu-io", &["-c", "write -P 2 2M 4M", &path("mid.qcow2")]);
                "[node.image]\ndriver = \"qcow2\"\nfile = \"top.qcow2\"\n\
                 [node.top]\ndriver = \"throttle\"\nchild = \"image\"\niops = 100000\n"
            }
        };
        let toml = format!(
            "{nodes}\n[drive.vda]\nroot = \"top\"\n\
             bitmaps = [{{ name = \"daily\", granularity = \"64KiB\", durability = \"{durability}\" }}]\n\
             [export.vda]\ntype = \"nbd\"\ndrive = \"vda\"\nsocket = \"vda.sock\"\nwritable = true\n\
             bitmaps = [\"daily\"]\n[monitor]\nqmp = \"qmp.sock\"\n"
        );
        let known = BTreeMap::from([("daily".to_owned(), Known::default())]);
        Self { directory, seed, toml, known }
    }

    fn live(mut self) -> u64 {
        let mut random = SmallRng::seed_from_u64(self.seed);
        for life in 0..LIVES {
            let daemon = Daemon::start(self.directory.path(), &self.toml);
            let oracle = Oracle::default();
            let socket = self.directory.path().join("vda.sock");
            let guests: Vec<_> = (0..2)
                .map(|_| {
                    let (oracle, socket) = (oracle.clone(), socket.clone());
                    let random = SmallRng::seed_from_u64(random.random());
                    thread::spawn(move || guest(&oracle, &socket, random))
                })
                .collect();
            let (operator_oracle, qmp) = (oracle.clone(), daemon.qmp());
            let known = std::mem::take(&mut self.known);
            let operator_random = SmallRng::seed_from_u64(random.random());
            let chain = !self.toml.contains("disk.raw");
            let directory = self.directory.path().to_owned();
            let operator = thread::spawn(move || {
                operate(&operator_oracle, qmp, known, operator_random, &directory, chain)
            });
            thread::sleep(Duration::from_micros(random.random_range(500..60_000)));
            daemon.kill();
            guests.into_iter().for_each(|guest| guest.join().unwrap());
            self.known = operator.join().unwrap();
            self.examine(life, &oracle);
        }
        self.end();
        LIVES
    }

    /// Starts the program only to see what it found.
    fn examine(&mut self, life: u64, oracle: &Oracle) {
        let daemon = Daemon::start(self.directory.path(), &self.toml);
        let mut qmp = daemon.qmp();
        let drives = qmp.run("query-block", json!({}));
        let found = drives[0]["inserted"]["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
        let world = format!("world {} (DRIVELINE_KILLS_SEED), life {life}", self.seed);
        for bitmap in &found {
            let name = bitmap["name"].as_str().unwrap();
            assert!(self.known.contains_key(name), "{world}: {name} was removed");
            assert_eq!(bitmap["inconsistent"], serde_json::Value::Null, "{world}: {name}");
            assert_eq!(bitmap["busy"], false, "{world}: {name}");
        }
        let recovered = qmp.run("x-driveline-query-recovered-bitmaps", json!({}));
        for bitmap in recovered.as_array().unwrap() {
            assert_eq!(bitmap["verdict"], "exact", "{world}: {bitmap}");
        }
        let mut known = BTreeMap::new();
        for (name, bitmap) in std::mem::take(&mut self.known) {
            if !found.iter().any(|found| found["name"] == *name) {
                assert!(bitmap.may_be_missing, "{world}: {name} is lost");
                continue;
            }
            let export = json!({
                "type": "nbd", "id": format!("show-{name}"), "node-name": "vda", "name": format!("show-{name}"),
                "bitmaps": [name],
            });
            let socket = self.directory.path().join(format!("{name}.sock"));
            let address = json!({ "addr": { "type": "unix", "data": { "path": socket } } });
            qmp.run("nbd-server-start", address);
            qmp.run("block-export-add", export);
            let uri = format!("nbd+unix:///show-{name}?socket={}", socket.display());
            let dirty = dirty(&uri, &name, GRANULARITY);
            qmp.run("nbd-server-stop", json!({}));
            let (must, may) = oracle.bounds(&bitmap);
            let lost: Vec<_> = must.difference(&dirty).collect();
            assert!(lost.is_empty(), "{world}: {name} has lost {lost:?}");
            let more: Vec<_> = dirty.difference(&may).collect();
            assert!(more.is_empty(), "{world}: {name} has {more:?} that nobody wrote");
            known.insert(name, Known { before: dirty, ..Known::default() });
        }
        self.known = known;
        // Half of the lives begin after a kill while nothing happens, half after an orderly end.
        if life.is_multiple_of(2) { daemon.kill() } else { assert!(daemon.terminate().success(), "{world}") }
    }

    fn end(&self) {
        let images = std::fs::read_dir(self.directory.path()).unwrap().map(|entry| entry.unwrap().path());
        for image in images.filter(|path| path.extension().is_some_and(|end| end == "qcow2")) {
            let image = image.to_str().unwrap();
            let checked = crate::harness::output("qemu-img", &["check", image]);
            // Leaks are what a crash may leave.
            let code = checked.status.code();
            let text = String::from_utf8_lossy(&checked.stdout);
            assert!(matches!(code, Some(0 | 3)), "world {}: {image}: {code:?} {text}", self.seed);
        }
    }
}

/// Writes until the program is gone.
fn guest(oracle: &Oracle, socket: &Path, mut random: SmallRng) {
    let Ok(mut guest) = Guest::try_connect(socket, "vda") else { return };
    loop {
        let granule = random.random_range(0..GRANULES);
        let at = {
            let mut writes = oracle.writes.lock().unwrap();
            writes.push(Write { granule, began: oracle.tick(), ended: None });
            writes.len() - 1
        };
        let offset = granule * GRANULARITY + random.random_range(0..127) * 512;
        let done = match random.random_range(0..10) {
            0 => guest.trim(offset, 512),
            1 => guest.write_zeroes(offset, 512),
            2 => guest.write(offset, &[3; 512]).and_then(|()| guest.flush()),
            _ => guest.write(offset, &[4; 512]),
        };
        match done {
            Ok(()) => oracle.writes.lock().unwrap()[at].ended = Some(oracle.tick()),
            Err(_) => return,
        }
    }
}

/// Works on bitmaps and jobs until the program is gone; returns what is known of the bitmaps then.
fn operate(
    oracle: &Oracle,
    mut qmp: Qmp,
    mut known: BTreeMap<String, Known>,
    mut random: SmallRng,
    directory: &Path,
    chain: bool,
) -> BTreeMap<String, Known> {
    let mut job = 0;
    loop {
        let names: Vec<String> = known.keys().cloned().collect();
        let name = names.choose(&mut random).cloned().unwrap_or_else(|| "daily".to_owned());
        let of = |name: &str| json!({ "node": "vda", "name": name });
        match random.random_range(0..11) {
            // A clear.
            0 | 1 => {
                let began = oracle.tick();
                let bitmap = known.get_mut(&name).unwrap();
                match qmp.attempt("block-dirty-bitmap-clear", of(&name)) {
                    Ok(Ok(_)) => bitmap.cleared = Some((began, oracle.tick())),
                    Ok(Err(_)) => {}
                    Err(_) => {
                        bitmap.unsure_since = Some(began);
                        return known;
                    }
                }
            }
            // A new one.
            2 if known.len() < 4 => {
                let name = format!("b{}", random.random::<u16>());
                let began = oracle.tick();
                let mut new = of(&name);
                new["persistent"] = json!(true);
                new["granularity"] = json!(GRANULARITY);
                let answer = qmp.attempt("block-dirty-bitmap-add", new);
                let mut bitmap = Known { cleared: Some((began, oracle.tick())), ..Known::default() };
                match answer {
                    Ok(Ok(_)) => drop(known.insert(name, bitmap)),
                    Ok(Err(error)) => panic!("{error}"),
                    Err(_) => {
                        (bitmap.may_be_missing, bitmap.unsure_since) = (true, Some(began));
                        known.insert(name, bitmap);
                        return known;
                    }
                }
            }
            3 if name != "daily" => match qmp.attempt("block-dirty-bitmap-remove", of(&name)) {
                Ok(Ok(_)) => drop(known.remove(&name)),
                Ok(Err(_)) => {}
                Err(_) => {
                    known.get_mut(&name).unwrap().may_be_missing = true;
                    return known;
                }
            },
            // A backup tool's turn: what recorded is put aside, and another one goes on, with no write between them.
            4 if known.len() < 4 => {
                let name = format!("t{}", random.random::<u16>());
                let began = oracle.tick();
                let mut new = of(&name);
                new["persistent"] = json!(true);
                new["granularity"] = json!(GRANULARITY);
                let actions = json!([
                    { "type": "block-dirty-bitmap-clear", "data": of("daily") },
                    { "type": "block-dirty-bitmap-add", "data": new },
                ]);
                let answer = qmp.attempt("transaction", json!({ "actions": actions }));
                let ended = oracle.tick();
                let mut bitmap = Known { cleared: Some((began, ended)), ..Known::default() };
                let daily = known.get_mut("daily").unwrap();
                match answer {
                    Ok(Ok(_)) => {
                        daily.cleared = Some((began, ended));
                        known.insert(name, bitmap);
                    }
                    Ok(Err(_)) => {}
                    Err(_) => {
                        daily.unsure_since = Some(began);
                        (bitmap.may_be_missing, bitmap.unsure_since) = (true, Some(began));
                        known.insert(name, bitmap);
                        return known;
                    }
                }
            }
            5 if chain => {
                job += 1;
                let id = format!("job{job}");
                let arguments = json!({ "job-id": id, "device": "vda" });
                if qmp.attempt("block-stream", arguments).is_err() {
                    return known;
                }
            }
            6 if chain && job > 0 => {
                if qmp.attempt("block-job-cancel", json!({ "device": format!("job{job}") })).is_err() {
                    return known;
                }
            }
            // Of the images below the top one.
            7 if chain => {
                job += 1;
                let image = |name: &str| directory.join(name).to_str().unwrap().to_owned();
                let arguments = json!({
                    "job-id": format!("job{job}"), "device": "vda",
                    "top": image("mid.qcow2"), "base": image("base.qcow2"),
                });
                if qmp.attempt("block-commit", arguments).is_err() {
                    return known;
                }
            }
            // To another node that shows the drive, and back.
            8 if chain => {
                let target = ["image", "top"].choose(&mut random).unwrap();
                let arguments = json!({ "node": "vda", "name": name, "target": target });
                if qmp.attempt("x-driveline-block-dirty-bitmap-move", arguments).is_err() {
                    return known;
                }
            }
            // To another place.
            9 => {
                let place = match random.random_range(0..2) {
                    0 if chain => "qcow2:image".to_owned(),
                    _ => format!("file:{}", directory.join("elsewhere.dlbitmaps").display()),
                };
                let arguments = json!({ "node": "vda", "store": place });
                if qmp.attempt("x-driveline-block-dirty-bitmap-store", arguments).is_err() {
                    return known;
                }
            }
            _ => {
                thread::sleep(Duration::from_micros(random.random_range(0..3000)));
                if qmp.attempt("query-block-jobs", json!({})).is_err() {
                    return known;
                }
            }
        }
    }
}

#[test]
fn no_kill_costs_a_bitmap_a_write_or_gives_it_one_too_much() {
    if !have("kills", &["nbdinfo", "qemu-img", "qemu-io"]) {
        return;
    }
    if let Some(seed) = std::env::var("DRIVELINE_KILLS_SEED").ok().and_then(|seed| seed.parse().ok()) {
        World::new(seed).live();
        return;
    }
    let kills = std::env::var("DRIVELINE_KILLS").ok().and_then(|kills| kills.parse().ok());
    let kills = kills.unwrap_or(if std::env::var_os("CI").is_some() { KILLS_IN_CI } else { 60 });
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let first = u64::from(clock.subsec_micros());
    let next = AtomicU64::new(first);
    let done = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while done.fetch_add(LIVES, SeqCst) < kills {
                    World::new(next.fetch_add(1, SeqCst)).live();
                }
            });
        }
    });
}
