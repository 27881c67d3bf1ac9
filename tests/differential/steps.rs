//! What random sequences are made of. A step is drawn from what there may be, so that most make sense and some do not.

use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};

/// Draws commands from a seed.
pub(super) struct Script {
    random: SmallRng,
    jobs: u32,
    /// Nodes that have bitmaps, as both last said.
    with_bitmaps: Vec<String>,
}

const NODES: [&str; 5] = ["n0", "n1", "n2", "n3", "nope"];
const BITMAPS: [&str; 4] = ["a", "b", "c", ""];
/// Not the middle of the chain: jobs take it out.
const EXPORTED: [&str; 3] = ["n0", "n3", "nope"];
const EXPORTS: [&str; 3] = ["e0", "e1", "1bad"];

fn command(name: &str, arguments: Value) -> Value {
    json!({ "execute": name, "arguments": arguments })
}

fn image(node: &str, file: &str, backing: Value) -> Value {
    let file = json!({ "driver": "file", "node-name": format!("{node}-file"), "filename": format!("{{dir}}/{file}") });
    command("blockdev-add", json!({ "driver": "qcow2", "node-name": node, "file": file, "backing": backing }))
}

fn raw() -> Value {
    let file = json!({ "driver": "file", "node-name": "n3-file", "filename": "{dir}/other.raw" });
    command("blockdev-add", json!({ "driver": "raw", "node-name": "n3", "file": file }))
}

impl Script {
    pub(super) fn new(seed: u64) -> Self {
        Self { random: SmallRng::seed_from_u64(seed), jobs: 0, with_bitmaps: Vec::new() }
    }

    /// The chain, the raw image and the server.
    pub(super) fn beginning(&self) -> Vec<Value> {
        let address = json!({ "type": "unix", "data": { "path": "{dir}/nbd.sock" } });
        vec![
            image("n2", "base.qcow2", Value::Null),
            image("n1", "mid.qcow2", "n2".into()),
            image("n0", "top.qcow2", "n1".into()),
            raw(),
            command("nbd-server-start", json!({ "addr": address })),
        ]
    }

    /// Takes notice of where both have come.
    pub(super) fn learn(&mut self, state: &Value) {
        let nodes = state.as_object().unwrap().iter();
        let has = nodes.filter(|(_, node)| node["bitmaps"].as_array().is_some_and(|all| !all.is_empty()));
        self.with_bitmaps = has.map(|(name, _)| name.clone()).collect();
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.random.random_range(0..of.len())]
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.random.random_range(0..100) < percent
    }

    pub(super) fn step(&mut self) -> Value {
        match self.random.random_range(0..100) {
            0..35 => self.bitmap(),
            35..45 => self.export(),
            45..60 => json!({ "qemu-io": self.write() }),
            60..70 => self.node(),
            70..80 => self.object(),
            80..90 => self.transaction(),
            _ => self.job(),
        }
    }

    fn write(&mut self) -> String {
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
