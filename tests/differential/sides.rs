//! The two programs, as one who talks QMP sees them.

use crate::harness::{Daemon, Qmp, StorageDaemon, run};
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Makes the images that sequences are about: a chain of three, a raw one, and some that are empty.
pub(super) fn make_images(folder: &Path) -> [&'static str; 12] {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path("base.qcow2"), "2M"]);
    run("qemu-io", &["-c", "write -P 1 0 1M", &path("base.qcow2")]);
    for (name, below, write) in
        [("mid.qcow2", "base.qcow2", "write -P 2 512k 256k"), ("top.qcow2", "mid.qcow2", "write -P 3 1M 64k")]
    {
        // Named without a folder, so that both sides have the same text in their images.
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", &path(name)]);
        run("qemu-io", &["-c", write, &path(name)]);
    }
    for (name, size) in [("other.raw", "1M"), ("t1.raw", "2M"), ("t2.raw", "1M"), ("d1.raw", "2M")] {
        run("qemu-img", &["create", "-q", "-f", "raw", &path(name), size]);
    }
    for name in ["t0.qcow2", "t3.qcow2", "s0.qcow2", "s1.qcow2", "d0.qcow2"] {
        run("qemu-img", &["create", "-q", "-f", "qcow2", &path(name), "2M"]);
    }
    [
        "base.qcow2",
        "mid.qcow2",
        "top.qcow2",
        "other.raw",
        "t0.qcow2",
        "t1.raw",
        "t2.raw",
        "t3.qcow2",
        "s0.qcow2",
        "s1.qcow2",
        "d0.qcow2",
        "d1.raw",
    ]
}

/// In place of an error: QEMU is no more.
pub(super) const CRASH: &str = "crash";

enum Program {
    Driveline(Daemon),
    Qemu(StorageDaemon),
}

/// One of the two.
pub(super) struct Side {
    program: Program,
    qmp: Qmp,
    folder: PathBuf,
    /// Jobs that are no more.
    gone: BTreeSet<String>,
}

impl Side {
    pub(super) fn driveline(folder: &Path) -> Self {
        let daemon = Daemon::start(folder, "[monitor]\nqmp = \"qmp.sock\"\n");
        let qmp = daemon.qmp();
        Self { program: Program::Driveline(daemon), qmp, folder: folder.to_owned(), gone: BTreeSet::new() }
    }

    pub(super) fn qemu(folder: &Path) -> Self {
        let qemu = StorageDaemon::start(StorageDaemon::qemu(), folder, &[]);
        let qmp = qemu.qmp();
        Self { program: Program::Qemu(qemu), qmp, folder: folder.to_owned(), gone: BTreeSet::new() }
    }

    /// Runs a command; `{dir}` in its texts is this side's folder. So it is in what comes back.
    pub(super) fn execute(&mut self, command: &Value) -> Result<Value, Value> {
        let folder = self.folder.to_str().unwrap();
        let arguments = command.get("arguments").cloned().unwrap_or(json!({}));
        let arguments = serde_json::from_str(&arguments.to_string().replace("{dir}", folder)).unwrap();
        let name = command["execute"].as_str().unwrap();
        let neutral = |value: Value| {
            let value: Value = serde_json::from_str(&value.to_string().replace(folder, "{dir}")).unwrap();
            let mut value = sorted(value);
            // Lists of what there is have no order that anybody promised.
            if let Some(list) = value.as_array_mut() {
                list.sort_by_key(Value::to_string);
            }
            value
        };
        match self.qmp.attempt(name, arguments) {
            Ok(answer) => answer.map(neutral).map_err(neutral),
            Err(error) => match &self.program {
                Program::Driveline(_) => panic!("Driveline is gone at {command}: {error}"),
                Program::Qemu(_) => Err(json!({ "class": CRASH, "desc": CRASH })),
            },
        }
    }

    /// Writes as a client of the export `e0`, if it is there and may be written to.
    pub(super) fn write(&self, command: &str) {
        let uri = format!("nbd+unix:///e0?socket={}/nbd.sock", self.folder.display());
        let _ = Command::new("qemu-io")
            .args(["-f", "raw", &uri, "-c", command])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }

    /// Waits until a job is gone, or until an event tells of it that it has come so far. Its events, in their order, without times
    /// and progress.
    pub(super) fn wait_job(&mut self, job: &str, so_far: Option<&str>) -> Vec<Value> {
        let of_job = |event: &Value| event["data"]["id"] == job || event["data"]["device"] == job;
        let is_end =
            |event: &Value| event["event"] == "JOB_STATUS_CHANGE" && event["data"]["status"] == "null";
        let is_wanted = |event: &Value| so_far.is_some_and(|name| event["event"] == name);
        while !self.gone.contains(job) {
            let mut of_this = self.qmp.events().iter().filter(|event| of_job(event));
            if self.qmp.events().iter().any(|event| of_job(event) && is_end(event)) {
                self.gone.insert(job.to_owned());
            } else if of_this.any(is_wanted) {
                break;
            } else {
                self.qmp.wait_any_event();
            }
        }
        let mut told: Vec<Value> = self.qmp.take_events(of_job).into_iter().map(neutral_event).collect();
        // QEMU's jobs are paused while a graph near them changes, and tell of it: see the table.
        let status = |told: &Value| told["data"]["status"].as_str().unwrap_or_default().to_owned();
        let is_pause = |pair: &[Value]| {
            matches!((&*status(&pair[0]), &*status(&pair[1])), ("paused", "running") | ("standby", "ready"))
        };
        while let Some(at) = told.windows(2).position(is_pause) {
            drop(told.drain(at..at + 2));
        }
        told
    }

    /// Drops the events of a job that was refused.
    pub(super) fn forget_job(&mut self, job: &str) {
        drop(self.qmp.take_events(|event| event["data"]["id"] == job || event["data"]["device"] == job));
    }

    /// Events that are not about jobs.
    pub(super) fn other_events(&mut self) -> Vec<Value> {
        let mut events: Vec<Value> = self.qmp.take_events(|_| true).into_iter().map(neutral_event).collect();
        // When a server stops, its exports go in an order that nobody promised.
        events.sort_by_key(Value::to_string);
        events
    }

    /// What there is: nodes with their drivers and bitmaps, and exports.
    pub(super) fn state(&mut self) -> Value {
        let mut state = Map::new();
        let nodes = self
            .execute(&json!({ "execute": "query-named-block-nodes", "arguments": { "flat": true } }))
            .unwrap();
        for node in nodes.as_array().unwrap() {
            // Those that nobody named have names of their own on each side.
            let name = node["node-name"].as_str().unwrap();
            if name.starts_with('#') {
                continue;
            }
            let mut bitmaps = Vec::new();
            for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
                let of = json!({ "node": name, "name": bitmap["name"] });
                let sum = self
                    .execute(&json!({ "execute": "x-debug-block-dirty-bitmap-sha256", "arguments": of }))
                    .unwrap();
                let kept = ["name", "count", "granularity", "recording", "busy", "persistent"];
                let mut said: Map<String, Value> =
                    kept.iter().map(|key| ((*key).to_owned(), bitmap[*key].clone())).collect();
                said.insert("sha256".into(), sum["sha256"].clone());
                bitmaps.push(Value::from(said));
            }
            bitmaps.sort_by_key(Value::to_string);
            let image = &node["image"];
            // How large the file below a format is is the format's business.
            let is_file = node["drv"] == "file";
            let size = if is_file { Value::Null } else { image["virtual-size"].clone() };
            // Nor is how it is opened: see the table.
            let read_only = if is_file { Value::Null } else { node["ro"].clone() };
            let said = json!({
                "ro": read_only, "drv": node["drv"], "bitmaps": bitmaps, "size": size,
                // Which text a job writes there differs: see the table.
                "has-backing": image["backing-filename"].is_string(), "cluster-size": image["cluster-size"],
            });
            state.insert(name.to_owned(), said);
        }
        let exports = self.execute(&json!({ "execute": "query-block-exports" })).unwrap();
        for export in exports.as_array().unwrap() {
            let mut export = export.clone();
            if export["node-name"].as_str().is_some_and(|name| name.starts_with('#')) {
                export["node-name"] = "#".into();
            }
            state.insert(format!("export {}", export["id"]), export);
        }
        sorted(state.into())
    }

    pub(super) fn quit(mut self) {
        let _ = self.qmp.attempt("quit", json!({}));
        match self.program {
            Program::Driveline(mut daemon) => {
                // A signal on top of it would end it at once.
                while daemon.is_alive() {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            }
            Program::Qemu(qemu) => drop(qemu.wait()),
        }
    }
}

/// Without what no two runs have in common.
fn neutral_event(event: Value) -> Value {
    let mut data = event["data"].clone();
    if let Some(data) = data.as_object_mut() {
        for key in ["len", "offset", "speed"] {
            data.shift_remove(key);
        }
    }
    sorted(json!({ "event": event["event"], "data": data }))
}

/// With the members of all objects in one order.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(object) => {
            let mut members: Vec<_> = object.into_iter().map(|(key, value)| (key, sorted(value))).collect();
            members.sort_by(|one, other| one.0.cmp(&other.0));
            Value::Object(members.into_iter().collect())
        }
        Value::Array(values) => values.into_iter().map(sorted).collect(),
        other => other,
    }
}
