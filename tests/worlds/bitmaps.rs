//! The drive's bitmaps, which its user adds, changes and reads.

use super::{World, oracle::Expected};
use crate::harness::dirty;
use rand::Rng;
use serde_json::{Value, json};
use std::collections::BTreeSet;

impl World {
    /// Bitmaps that no job has.
    pub(super) fn free_bitmaps(&self) -> Vec<String> {
        let oracle = self.oracle.lock().unwrap();
        oracle.bitmaps.iter().filter(|(_, bitmap)| !bitmap.frozen).map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn change_bitmaps(&mut self) {
        let names = self.free_bitmaps();
        if names.is_empty() || (names.len() < 3 && self.rng.random_ratio(1, 3)) {
            let (name, granularity) = (self.name("bitmap"), 512 << self.rng.random_range(0..8));
            let arguments = json!({ "node": "vda", "name": name, "granularity": granularity });
            self.command("block-dirty-bitmap-add", arguments).unwrap();
            let expected = Expected { granularity, recording: true, ..Expected::default() };
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

    /// What a client reads of each of them.
    pub(super) fn check_bitmaps(&mut self) {
        let mut oracle = self.oracle.lock().unwrap();
        let drives = self.qmp.run("query-block", json!({}));
        let drive = drives.as_array().unwrap().iter().find(|drive| drive["device"] == "vda").unwrap();
        let mut bitmaps = drive["inserted"]["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
        // A commit has one of its own, and so has each checkpoint.
        let is_users = |name: &str| !name.starts_with('#') && !name.starts_with("checkpoint:");
        bitmaps.retain(|bitmap| is_users(bitmap["name"].as_str().unwrap()));
        let names: BTreeSet<String> =
            bitmaps.iter().map(|bitmap| bitmap["name"].as_str().unwrap().to_owned()).collect();
        assert_eq!(names, oracle.bitmaps.keys().cloned().collect(), "the drive's bitmaps");
        // One that a backup has cannot be looked at.
        bitmaps.retain(|bitmap| !oracle.bitmaps[bitmap["name"].as_str().unwrap()].frozen);
        if bitmaps.is_empty() {
            return;
        }
        // An export of all of them, for nbdinfo.
        let list: Vec<&Value> = bitmaps.iter().map(|bitmap| &bitmap["name"]).collect();
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
}
