//! Copies of the drive: backups that a job writes, overlays that only take what is written over, for a client who reads a moment through
//! them, and overlays that only take what is written, which a mirror keeps equal to the drive.

use super::{MIB, SECTOR, World};
use crate::harness::Guest;
use rand::Rng;
use serde_json::{Value, json};
use std::{collections::BTreeSet, path::PathBuf};

/// A backup that runs.
pub(super) struct Copy {
    job: String,
    to: Target,
    /// What the drive held at its moment, by sector, where that is known.
    content: Vec<Option<u8>>,
    bitmap: Option<Frozen>,
}

/// Where it goes.
enum Target {
    /// A file that is whole when the job is over.
    File(PathBuf),
    /// A node whose backing node is the drive's, and an export of that name: the moment as long as the job runs.
    Overlay(String),
    /// The same for a mirror: what the drive is now.
    Mirror(String),
}

/// What a bitmap said at the moment.
struct Frozen {
    name: String,
    granularity: u64,
    held: BTreeSet<u64>,
}

impl World {
    /// Begins one while guests rest, so that the oracle knows its moment.
    pub(super) fn begin_copy(&mut self) {
        let kind = self.rng.random_range(0..6);
        let job = self.name(if kind == 2 { "mirror" } else { "backup" });
        let begun = match kind {
            0 | 1 => self.begin_overlay(&job, "blockdev-backup"),
            2 => self.begin_overlay(&job, "blockdev-mirror"),
            _ => self.begin_file(&job),
        };
        if begun.is_some() && self.rng.random_ratio(1, 3) {
            // A backup keeps its moment while it does nothing else; somebody may let it go on.
            let _ = self.command("job-pause", json!({ "id": job }));
        }
        self.copies.extend(begun);
    }

    fn begin_file(&mut self, job: &str) -> Option<Copy> {
        let file = self.directory.join(format!("{job}.raw"));
        let mut arguments = json!({
            "job-id": job, "device": "vda", "target": file, "format": "raw", "sync": "full",
            "speed": self.pick(&[0, MIB / 2, MIB, 4 * MIB]),
        });
        let free = self.free_bitmaps();
        let bitmap = (!free.is_empty() && self.rng.random_ratio(1, 2)).then(|| self.pick(&free));
        if let Some(bitmap) = &bitmap {
            arguments["sync"] = "incremental".into();
            arguments["bitmap"] = bitmap.as_str().into();
        }
        self.command("drive-backup", arguments).ok()?;
        let mut oracle = self.oracle.lock().unwrap();
        let bitmap = bitmap.map(|name| {
            let expected = oracle.bitmaps.get_mut(&name).unwrap();
            expected.frozen = true;
            Frozen { name, granularity: expected.granularity, held: std::mem::take(&mut expected.dirty) }
        });
        Some(Copy { job: job.to_owned(), to: Target::File(file), content: oracle.content.clone(), bitmap })
    }

    /// `command` is told to copy nothing but what is written from now on.
    fn begin_overlay(&mut self, job: &str, command: &str) -> Option<Copy> {
        let drives = self.qmp.run("query-block", json!({}));
        let root = drives[0]["inserted"]["node-name"].as_str().unwrap();
        // A job's own filter is no node to be used.
        if root.starts_with('#') {
            return None;
        }
        let node = format!("scratch-{job}");
        let file = self.directory.join(format!("{node}.qcow2"));
        let size = self.oracle.lock().unwrap().size().to_string();
        crate::harness::run("qemu-img", &["create", "-q", "-f", "qcow2", file.to_str().unwrap(), &size]);
        let below = json!({ "driver": "file", "filename": file });
        let scratch = json!({ "driver": "qcow2", "node-name": node, "file": below, "backing": root });
        self.command("blockdev-add", scratch).ok()?;
        let copy = json!({ "job-id": job, "device": "vda", "target": node, "sync": "none" });
        if self.command(command, copy).is_err() {
            self.command("blockdev-del", json!({ "node-name": node })).unwrap();
            return None;
        }
        let export = json!({ "type": "nbd", "id": node, "name": node, "node-name": node });
        self.command("block-export-add", export).unwrap();
        let content = self.oracle.lock().unwrap().content.clone();
        let to = if command == "blockdev-mirror" { Target::Mirror(node) } else { Target::Overlay(node) };
        Some(Copy { job: job.to_owned(), to, content, bitmap: None })
    }

    /// Looks at those that are over, and at the moments that are served.
    pub(super) fn check_copies(&mut self) {
        let jobs = self.qmp.run("query-jobs", json!({}));
        for mut copy in std::mem::take(&mut self.copies) {
            let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == copy.job.as_str());
            let runs =
                job.is_some_and(|job| ["running", "paused"].iter().any(|status| job["status"] == *status));
            match &copy.to {
                Target::Overlay(export) if runs => {
                    let mut guest = Guest::connect(&self.directory.join("vda.sock"), export);
                    let found = guest.read(0, guest.size as u32).unwrap();
                    super::assert_content(&mut copy.content, &found, export);
                }
                _ => {}
            }
            if job.is_none() { self.end_copy(copy) } else { self.copies.push(copy) }
        }
    }

    /// Mirrors that have nothing to copy hold what the drive does, of which all is known just now.
    pub(super) fn check_mirrors(&mut self) {
        let jobs = self.qmp.run("query-block-jobs", json!({}));
        for copy in &self.copies {
            let Target::Mirror(export) = &copy.to else { continue };
            let job = jobs.as_array().unwrap().iter().find(|job| job["device"] == copy.job.as_str());
            if job.is_some_and(|job| job["status"] == "ready" && job["offset"] == job["len"]) {
                let mut guest = Guest::connect(&self.directory.join("vda.sock"), export);
                let found = guest.read(0, guest.size as u32).unwrap();
                super::assert_content(&mut self.oracle.lock().unwrap().content.clone(), &found, export);
            }
        }
    }

    /// Its job is over.
    fn end_copy(&mut self, mut copy: Copy) {
        let names = ["BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"];
        let is_end = |event: &Value| {
            names.iter().any(|name| event["event"] == *name) && event["data"]["device"] == copy.job.as_str()
        };
        while !self.qmp.events().iter().any(is_end) {
            self.qmp.wait_any_event();
        }
        let end = self.qmp.take_events(is_end).remove(0);
        let done = end["event"] == "BLOCK_JOB_COMPLETED" && end["data"]["error"].is_null();
        self.log.push(format!("{}: {end}", copy.job));
        match &copy.to {
            Target::Overlay(node) | Target::Mirror(node) => {
                self.command("block-export-del", json!({ "id": node, "mode": "hard" })).unwrap();
                self.qmp.wait_event("BLOCK_EXPORT_DELETED", node);
                self.command("blockdev-del", json!({ "node-name": node })).unwrap();
            }
            Target::File(file) => {
                let found = std::fs::read(file).unwrap();
                std::fs::remove_file(file).unwrap();
                match &copy.bitmap {
                    Some(bitmap) if done => {
                        // Only what it held was to be copied.
                        let per = bitmap.granularity / SECTOR;
                        for (sector, expected) in copy.content.iter_mut().enumerate() {
                            if !bitmap.held.contains(&(sector as u64 / per)) {
                                *expected = None;
                            }
                        }
                        super::assert_content(&mut copy.content, &found, &copy.job);
                    }
                    None if done => super::assert_content(&mut copy.content, &found, &copy.job),
                    _ => {}
                }
            }
        }
        if let Some(Frozen { name, held, .. }) = copy.bitmap {
            let mut oracle = self.oracle.lock().unwrap();
            let expected = oracle.bitmaps.get_mut(&name).unwrap();
            expected.frozen = false;
            if !done {
                expected.dirty.extend(held);
            }
        }
    }
}
