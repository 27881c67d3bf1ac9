//! What only images of one kind have to say.

use driveline_graph::{Options, Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// QAPI's `SnapshotInfo`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct SnapshotInfo {
    id: String,
    name: String,
    vm_state_size: u64,
    date_sec: u64,
    date_nsec: u64,
    vm_clock_sec: u64,
    vm_clock_nsec: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    icount: Option<u64>,
}

impl SnapshotInfo {
    pub(crate) fn of(snapshot: &Snapshot) -> Self {
        const SECOND: u64 = 1_000_000_000;
        Self {
            id: snapshot.id.clone(),
            name: snapshot.name.clone(),
            vm_state_size: snapshot.vm_state_bytes,
            date_sec: snapshot.date_ns / SECOND,
            date_nsec: snapshot.date_ns % SECOND,
            vm_clock_sec: snapshot.vm_clock_ns / SECOND,
            vm_clock_nsec: snapshot.vm_clock_ns % SECOND,
            icount: snapshot.icount,
        }
    }
}

/// QAPI's `ImageInfoSpecific`, of what the driver says.
pub(super) fn of(driver: &str, details: &Value) -> Option<Value> {
    match driver {
        "qcow2" => Some(json!({ "type": "qcow2", "data": qcow2(details) })),
        "file" | "host_device" => Some(json!({ "type": "file", "data": {} })),
        _ => None,
    }
}

/// QAPI's `ImageInfoSpecificQCow2`. Images of version 2 have less to say.
fn qcow2(details: &Value) -> Options {
    const OF_ALL: [&str; 3] = ["compat", "compression-type", "refcount-bits"];
    const OF_VERSION_3: [&str; 3] = ["lazy-refcounts", "corrupt", "extended-l2"];
    const OF_DATA_FILE: [&str; 2] = ["data-file", "data-file-raw"];
    let version_3 = details["compat"] != "0.10";
    let data_file = details["data-file"].is_string();
    let fields = OF_ALL
        .iter()
        .chain(OF_VERSION_3.iter().filter(|_| version_3))
        .chain(OF_DATA_FILE.iter().filter(|_| data_file));
    let mut said: Options =
        fields.filter_map(|field| Some(((*field).to_owned(), details.get(field)?.clone()))).collect();
    let bitmaps: Vec<Value> = details["bitmaps"].as_array().into_iter().flatten().map(bitmap).collect();
    if !bitmaps.is_empty() {
        said.insert("bitmaps".into(), bitmaps.into());
    }
    said
}

/// QAPI's `Qcow2BitmapInfo`.
fn bitmap(stored: &Value) -> Value {
    let flags = [("in-use", "in-use"), ("recording", "auto")];
    let flags: Vec<&str> =
        flags.into_iter().filter(|(field, _)| stored[*field] == true).map(|(_, flag)| flag).collect();
    json!({ "name": stored["name"], "granularity": stored["granularity"], "flags": flags })
}
