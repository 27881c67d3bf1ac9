//! What random sequences are made of. A step is drawn from what there may be, so that most make sense and some do not.

use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};
use std::collections::VecDeque;

/// Draws commands from a seed.
pub(super) struct Script {
    random: SmallRng,
    pub(super) jobs: u32,
    pub(super) names: u32,
    /// What follows a step that was taken.
    pub(super) queue: VecDeque<Value>,
    /// Nodes that have bitmaps, as both last said.
    with_bitmaps: Vec<String>,
    /// `n0` has an export.
    pub(super) exported: bool,
}

const NODES: [&str; 5] = ["n0", "n1", "n2", "n3", "nope"];
pub(super) const BITMAPS: [&str; 4] = ["a", "b", "c", ""];
const EXPORTED: [&str; 5] = ["n0", "n1", "n3", "t0", "nope"];
const EXPORTS: [&str; 3] = ["e0", "e1", "1bad"];

pub(super) fn command(name: &str, arguments: Value) -> Value {
    json!({ "execute": name, "arguments": arguments })
}

pub(super) fn image(node: &str, file: &str, backing: Value) -> Value {
    let file = json!({ "driver": "file", "node-name": format!("{node}-file"), "filename": format!("{{dir}}/{file}") });
    command(
        "blockdev-add",
        json!({ "driver": "qcow2", "node-name": node, "discard": "unmap", "file": file, "backing": backing }),
    )
}

fn raw() -> Value {
    target("n3", "other.raw")
}

fn target(node: &str, file: &str) -> Value {
    let file = json!({ "driver": "file", "node-name": format!("{node}-file"), "filename": format!("{{dir}}/{file}") });
    command("blockdev-add", json!({ "driver": "raw", "node-name": node, "file": file }))
}

impl Script {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            random: SmallRng::seed_from_u64(seed),
            jobs: 0,
            names: 0,
            queue: VecDeque::new(),
            with_bitmaps: Vec::new(),
            exported: false,
        }
    }

    /// The chain, the raw image and the server.
    pub(super) fn beginning(&self) -> Vec<Value> {
        let address = json!({ "type": "unix", "data": { "path": "{dir}/nbd.sock" } });
        vec![
            image("n2", "base.qcow2", Value::Null),
            image("n1", "mid.qcow2", "n2".into()),
            image("n0", "top.qcow2", "n1".into()),
            raw(),
            image("t0", "t0.qcow2", Value::Null),
            target("t1", "t1.raw"),
            target("t2", "t2.raw"),
            image("t3", "t3.qcow2", "n1".into()),
            image("s0", "s0.qcow2", Value::Null),
            image("s1", "s1.qcow2", Value::Null),
            command("nbd-server-start", json!({ "addr": address })),
        ]
    }

    /// The step was refused: what would have followed makes no sense.
    pub(super) fn refused(&mut self) {
        self.queue.clear();
    }

    /// Takes notice of where both have come.
    pub(super) fn learn(&mut self, state: &Value) {
        let nodes = state.as_object().unwrap().iter();
        let has = nodes.filter(|(_, node)| node["bitmaps"].as_array().is_some_and(|all| !all.is_empty()));
        self.with_bitmaps = has.map(|(name, _)| name.clone()).collect();
        self.exported = state.as_object().unwrap().values().any(|export| export["node-name"] == "n0");
    }

    pub(super) fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.random.random_range(0..of.len())]
    }

    pub(super) fn one_of<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.random_below(of.len())].clone()
    }

    pub(super) fn random_below(&mut self, end: usize) -> usize {
        self.random.random_range(0..end)
    }

    pub(super) fn chance(&mut self, percent: u32) -> bool {
        self.random.random_range(0..100) < percent
    }

    pub(super) fn step(&mut self) -> Value {
        if let Some(next) = self.queue.pop_front() {
            return next;
        }
        match self.random.random_range(0..100) {
            0..18 => self.bitmap(),
            18..26 => self.export(),
            26..38 => json!({ "qemu-io": self.write() }),
            38..43 => self.node(),
            43..48 => self.object(),
            48..54 => self.transaction(),
            54..58 => self.job(),
            58..67 => self.mirror(),
            67..77 => self.backup(),
            77..80 => self.active_commit(),
            80..88 => self.snapshot(),
            88..94 => self.moment(),
            _ => self.other_options(),
        }
    }

    pub(super) fn write(&mut self) -> String {
        let (offset, length) = (self.random.random_range(0..31) * 64, self.random.random_range(1..3) * 64);
        let pattern = self.random.random_range(1..200);
        match self.chance(20) {
            true => format!("write -z {offset}k 64k"),
            false => format!("write -P {pattern} {offset}k {}k", length.min(2048 - offset)),
        }
    }

    /// A bitmap of a node; mostly of the top image.
    fn place(&mut self) -> Value {
        let node = if self.chance(60) { "n0" } else { self.one(&NODES) };
        json!({ "node": node, "name": self.one(&BITMAPS) })
    }

    fn new_bitmap(&mut self) -> Value {
        let mut add = self.place();
        if self.chance(50) {
            add["granularity"] =
                [512u32, 4096, 65536, 1 << 20, 1000, 0][self.random.random_range(0..6)].into();
        }
        if self.chance(20) {
            add["disabled"] = true.into();
        }
        if self.chance(5) {
            add["nonsense"] = 1.into();
        }
        add
    }

    fn merge(&mut self) -> Value {
        let mut merge = json!({ "node": "n0", "target": self.one(&BITMAPS[..3]) });
        let mut sources: Vec<Value> = Vec::new();
        for _ in 0..self.random.random_range(1..3) {
            let source = if self.chance(50) { self.one(&BITMAPS[..3]).into() } else { self.place() };
            sources.push(source);
        }
        merge["bitmaps"] = sources.into();
        merge
    }

    fn bitmap(&mut self) -> Value {
        match self.random.random_range(0..10) {
            0..4 => {
                let add = self.new_bitmap();
                command("block-dirty-bitmap-add", add)
            }
            4 | 5 => {
                let merge = self.merge();
                command("block-dirty-bitmap-merge", merge)
            }
            _ => {
                let verb = self.one(&["remove", "clear", "enable", "disable"]);
                let place = self.place();
                command(&format!("block-dirty-bitmap-{verb}"), place)
            }
        }
    }

    fn transaction(&mut self) -> Value {
        let mut actions: Vec<Value> = Vec::new();
        for _ in 0..self.random.random_range(0..4) {
            let (kind, data) = match self.random.random_range(0..6) {
                0 | 1 => ("block-dirty-bitmap-add", self.new_bitmap()),
                2 => ("block-dirty-bitmap-clear", self.place()),
                3 => ("block-dirty-bitmap-disable", self.place()),
                4 => ("block-dirty-bitmap-enable", self.place()),
                _ => ("block-dirty-bitmap-merge", self.merge()),
            };
            actions.push(json!({ "type": kind, "data": data }));
        }
        if self.chance(20) {
            actions.push(json!({ "type": "abort", "data": {} }));
        }
        command("transaction", json!({ "actions": actions }))
    }

    fn export(&mut self) -> Value {
        match self.random.random_range(0..10) {
            0..5 => {
                let (id, node) = (self.one(&EXPORTS), self.one(&EXPORTED));
                let node = if id == "e0" { "n0" } else { node };
                let mut add =
                    json!({ "type": "nbd", "id": id, "node-name": node, "name": id, "writable": id == "e0" });
                if self.chance(10) {
                    add["description"] = "a disk".into();
                }
                // They are busy then.
                if self.chance(25) {
                    add["bitmaps"] = json!([self.one(&BITMAPS[..3])]);
                }
                command("block-export-add", add)
            }
            5 => {
                let device = self.one(&EXPORTED);
                command("nbd-server-add", json!({ "device": device, "name": format!("x{device}") }))
            }
            6 => {
                let device = self.one(&EXPORTED);
                command("nbd-server-remove", json!({ "name": format!("x{device}") }))
            }
            _ => {
                let id = self.one(&EXPORTS);
                command("block-export-del", json!({ "id": id, "mode": self.one(&["safe", "hard"]) }))
            }
        }
    }

    fn node(&mut self) -> Value {
        match self.random.random_range(0..6) {
            0 => raw(),
            1 => {
                let node = self.one(&["n3", "n3", "n1", "nope"]);
                // A node with bitmaps is not deleted here: see the table.
                match self.with_bitmaps.iter().any(|with| with == node) {
                    true => command("query-block-exports", json!({})),
                    false => command("blockdev-del", json!({ "node-name": node })),
                }
            }
            2 => image("n1", "mid.qcow2", Value::Null),
            3 => command(
                "blockdev-add",
                json!({ "driver": "file", "node-name": "n9", "filename": "{dir}/none.raw" }),
            ),
            4 => command("blockdev-add", json!({ "driver": "spaghetti", "node-name": "n9" })),
            _ => command("query-jobs", json!({})),
        }
    }

    fn object(&mut self) -> Value {
        let id = self.one(&["o0", "o1", "0bad"]);
        let limits = [
            json!({ "iops-total": 100 }),
            json!({ "bps-total": 1 << 20 }),
            json!({ "iops-total": 5, "iops-read": 5 }),
            json!({ "bps-read-max": 5 }),
            json!({ "nonsense": 1 }),
        ];
        let limits = limits[self.random.random_range(0..5)].clone();
        match self.random.random_range(0..8) {
            0 => command("object-add", json!({ "qom-type": "iothread", "id": id })),
            1 => command("object-add", json!({ "qom-type": "throttle-group", "id": id, "limits": limits })),
            2 => command(
                "object-add",
                json!({ "qom-type": "secret", "id": id, "data": "c2VjcmV0", "format": "base64" }),
            ),
            3 => command("object-del", json!({ "id": id })),
            4 => command("qom-list", json!({ "path": "/objects" })),
            5 => command(
                "qom-get",
                json!({ "path": format!("/objects/{id}"), "property": self.one(&["type", "limits", "poll-max-ns", "data"]) }),
            ),
            6 => command(
                "qom-set",
                json!({ "path": format!("/objects/{id}"), "property": "limits", "value": limits }),
            ),
            _ => command(
                "qom-set",
                json!({ "path": id, "property": "poll-max-ns", "value": self.random.random_range(-1i64..9) }),
            ),
        }
    }

    /// Jobs that run to their ends at once.
    fn job(&mut self) -> Value {
        self.jobs += 1;
        let id = format!("j{}", self.jobs);
        match self.random.random_range(0..4) {
            0 => command(
                "block-stream",
                json!({ "job-id": id, "device": "n0", "base-node": self.one(&["n1", "n2", "nope"]) }),
            ),
            1 => command(
                "block-stream",
                json!({ "job-id": id, "device": self.one(&["nope", "n0"]), "speed": -1 }),
            ),
            2 => command(
                "block-commit",
                json!({ "job-id": id, "device": "n0", "top-node": "n1", "base-node": "n2" }),
            ),
            _ => command("block-job-set-speed", json!({ "device": id, "speed": 5 })),
        }
    }
}
