//! Commands on what keeps persistent bitmaps.

use crate::{
    command::Nothing,
    control::{BitmapPlace, RecoveredBitmap},
    error::{Error, Result},
    monitor::Monitor,
};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Store {
    node: String,
    store: Option<String>,
    flush: Option<bool>,
}

pub(crate) async fn store(monitor: &Monitor, store: Store) -> Result<Value> {
    let place = store.store.as_deref().map(place).transpose()?;
    monitor.graph().node_or_drive(&store.node).map_err(|_| Error::no_node(&store.node))?;
    let kept = monitor.control().bitmap_store(&store.node, place, store.flush.unwrap_or(false)).await?;
    Ok(json!({ "store": kept.place, "file": kept.file }))
}

fn place(text: &str) -> Result<BitmapPlace> {
    match text.split_once(':') {
        Some(("qcow2", node)) if !node.is_empty() => Ok(BitmapPlace::Qcow2(node.to_owned())),
        Some(("file", path)) if !path.is_empty() => Ok(BitmapPlace::File(path.into())),
        _ => {
            let text = format_args!(
                "Parameter 'store' does not accept value '{text}'; expected qcow2:NODE or file:PATH"
            );
            Err(Error::generic(text))
        }
    }
}

pub(crate) async fn query_recovered(monitor: &Monitor, _: Nothing) -> Result<Value> {
    Ok(monitor.control().recovered_bitmaps().iter().map(recovered).collect())
}

/// A bitmap that was found, for replies and events.
pub(crate) fn recovered(bitmap: &RecoveredBitmap) -> Value {
    let mut value = json!({ "node": bitmap.node, "name": bitmap.name, "verdict": bitmap.verdict });
    let more = [
        ("extents", bitmap.extents.map(Value::from)),
        ("bytes", bitmap.bytes.map(Value::from)),
        ("reason", bitmap.reason.clone().map(Value::from)),
    ];
    for (key, said) in more {
        if let Some(said) = said {
            value[key] = said;
        }
    }
    value
}
