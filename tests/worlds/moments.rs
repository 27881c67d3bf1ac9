//! Checkpoints of the drive: what changed between any two of them, and views of some.

use super::{
    SECTOR, World,
    oracle::{Changed, Epoch, FINE},
};
use crate::harness::{Guest, dirty};
use rand::Rng;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// A checkpoint that is served as it was.
pub(super) struct View {
    checkpoint: String,
    /// What it holds, by sector, where that is known.
    content: Vec<Option<u8>>,
    /// A checkpoint before it, and what changed from that to this one.
    since: Option<(String, Changed)>,
}

impl World {
    /// Somebody keeps a moment, looks back, or forgets. Guests rest.
    pub(super) fn change_moments(&mut self) {
        let names = self.checkpoints();
        match self.rng.random_range(0..6) {
            0 | 1 if !self.views.is_empty() => {
                let at = self.rng.random_range(0..self.views.len());
                self.release(at);
            }
            2 if names.len() > 1 => {
                let name = self.pick(&names);
                // Its view needs it.
                if self.views.iter().all(|view| view.checkpoint != name) {
                    self.delete_checkpoint(&name);
                }
            }
            _ if names.len() < 6 => self.keep_moment(&names),
            _ => self.delete_checkpoint(&names[0].clone()),
        }
    }

    fn checkpoints(&self) -> Vec<String> {
        self.oracle.lock().unwrap().epochs.iter().map(|epoch| epoch.checkpoint.clone()).collect()
    }

    fn keep_moment(&mut self, before: &[String]) {
        let name = self.name("moment");
        let mut arguments = json!({ "name": name, "drives": ["vda"], "granularity": FINE });
        let has_view = self.views.len() < 2 && self.rng.random_ratio(2, 3);
        let base = (!before.is_empty() && self.rng.random_ratio(2, 3)).then(|| self.pick(before));
        if has_view {
            arguments["view"] = base.as_ref().map_or(json!({}), |base| json!({ "base": base }));
        }
        if self.command("x-driveline-checkpoint-create", arguments).is_err() {
            // A filter that is in the way refuses a view.
            assert!(has_view, "a checkpoint alone is always possible");
            return;
        }
        let mut oracle = self.oracle.lock().unwrap();
        if has_view {
            let since = base.map(|base| {
                let changed = changed(&oracle.epochs, &base, None);
                (base, changed)
            });
            self.views.push(View { checkpoint: name.clone(), content: oracle.content.clone(), since });
        }
        oracle.epochs.push(Epoch { checkpoint: name, changed: Changed::default() });
    }

    fn release(&mut self, at: usize) {
        let view = self.views.remove(at);
        self.command("x-driveline-checkpoint-release", json!({ "name": view.checkpoint })).unwrap();
    }

    fn delete_checkpoint(&mut self, name: &str) {
        if let Some(at) = self.views.iter().position(|view| view.checkpoint == name) {
            self.release(at);
        }
        self.command("x-driveline-checkpoint-delete", json!({ "name": name })).unwrap();
        let mut oracle = self.oracle.lock().unwrap();
        let at = oracle.epochs.iter().position(|epoch| epoch.checkpoint == name).unwrap();
        let gone = oracle.epochs.remove(at);
        // What changed between others is what it was.
        if let Some(before) = at.checked_sub(1) {
            oracle.epochs[before].changed.extend(&gone.changed);
        }
    }

    /// Nothing is kept any more.
    pub(super) fn forget_moments(&mut self) {
        for name in self.checkpoints() {
            self.delete_checkpoint(&name);
        }
    }

    /// Views are what they were, and what changed between two checkpoints is told to the granule.
    pub(super) fn check_moments(&mut self) {
        for view in &mut self.views {
            let export = format!("{}-vda", view.checkpoint);
            let mut guest = Guest::connect(&self.directory.join("vda.sock"), &export);
            assert_eq!(guest.size, view.content.len() as u64 * SECTOR, "{export}");
            let found = guest.read(0, guest.size as u32).unwrap();
            super::assert_content(&mut view.content, &found, &export);
            if let Some((base, changed)) = &view.since {
                let uri = format!("nbd+unix:///{export}?socket={}/vda.sock", self.directory.display());
                changed.assert_is(&dirty(&uri, &format!("since-{base}"), FINE), &export);
            }
        }
        let names = self.checkpoints();
        if names.is_empty() {
            return;
        }
        let from = self.rng.random_range(0..names.len());
        let to = self.rng.random_range(from..=names.len());
        let found = self.delta(&names[from], names.get(to));
        let expected = changed(&self.oracle.lock().unwrap().epochs, &names[from], names.get(to));
        expected.assert_is(&found, &format!("from {} to {:?}", names[from], names.get(to)));
    }

    fn delta(&mut self, from: &str, to: Option<&String>) -> BTreeSet<u64> {
        let mut arguments = json!({ "drive": "vda", "from": from });
        if let Some(to) = to {
            arguments["to"] = to.as_str().into();
        }
        let mut granules = BTreeSet::new();
        loop {
            let told = self.qmp.run("x-driveline-checkpoint-delta", arguments.clone());
            assert_eq!(told["granularity"], FINE);
            for area in told["areas"].as_array().unwrap() {
                let number = |key: &str| area[key].as_u64().unwrap();
                let end = number("offset") + number("length");
                granules.extend(number("offset") / FINE..end.div_ceil(FINE));
            }
            match &told["next"] {
                Value::Null => return granules,
                next => arguments["start"] = next.clone(),
            }
        }
    }
}

/// What changed from one checkpoint to another, or to now.
fn changed(epochs: &[Epoch], from: &str, to: Option<&String>) -> Changed {
    let mut changed = Changed::default();
    let from_on = epochs.iter().skip_while(|epoch| epoch.checkpoint != from);
    for epoch in from_on.take_while(|epoch| Some(&epoch.checkpoint) != to) {
        changed.extend(&epoch.changed);
    }
    changed
}
