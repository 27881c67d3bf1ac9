//! The images of the demo: base, middle and active, each on top of the one before.

use crate::{config::Config, drivers};
use driveline_drivers::qcow2::{CreateOptions, create_file};
use driveline_engine::Engine;
use driveline_graph::{Graph, GraphOptions, Options, Result, RootOptions};
use std::{ops::Range, path::Path};

/// The size of the disk.
pub(crate) const SIZE_BYTES: u64 = 32 << 20;

/// What each image holds when the demo begins: its name, the ranges, and the byte that they are filled with.
const IMAGES: [(&str, &[Range<u64>], u8); 3] = [
    ("base", &[0..5 << 20, 12 << 20..16 << 20, 25 << 20..29 << 20], 0xba),
    ("middle", &[3 << 20..9 << 20, 18 << 20..23 << 20], 0x3d),
    ("active", &[8 << 20..9 << 20, 9 << 20..10 << 20], 0xac),
];

/// The file that the demo runs; it could be run by hand just so.
pub(crate) const FILE: &str = r#"
[node.base]
driver = "qcow2"
file = "base.qcow2"
read-only = true

[node.middle]
driver = "qcow2"
file = "middle.qcow2"
backing = "base"
read-only = true

[node.active]
driver = "qcow2"
file = "active.qcow2"
backing = "middle"

[drive.vda]
root = "active"
bitmaps = [{ name = "daily", granularity = "64KiB" }]

[export.vda]
type = "nbd"
drive = "vda"
socket = "vda.sock"
writable = true
bitmaps = ["daily"]
"#;

/// Makes the images in `directory`. Returns what a reader of the disk sees.
pub(crate) fn make(directory: &Path) -> Result<Vec<u8>, String> {
    let mut content = vec![0; SIZE_BYTES as usize];
    for (index, (name, ranges, byte)) in IMAGES.iter().enumerate() {
        let mut options = CreateOptions::new(SIZE_BYTES);
        options.backing =
            index.checked_sub(1).map(|below| (format!("{}.qcow2", IMAGES[below].0), "qcow2".into()));
        let path = directory.join(format!("{name}.qcow2"));
        create_file(&path, &options).map_err(|error| error.to_string())?;
        for range in *ranges {
            content[range.start as usize..range.end as usize].fill(*byte);
        }
    }
    let config = driveline_engine::Config { threads: 1, ..Default::default() };
    let engine = Engine::start(config).map_err(|error| error.to_string())?;
    let filled = engine.block_on_local(|| async {
        for (name, ranges, byte) in IMAGES {
            fill(directory, name, ranges, byte).await?;
        }
        Ok::<(), driveline_graph::Error>(())
    });
    filled.map_err(|error| error.to_string())?;
    Ok(content)
}

async fn fill(directory: &Path, name: &str, ranges: &[Range<u64>], byte: u8) -> Result<()> {
    const STEP: u64 = 1 << 20;
    let graph = Graph::new(GraphOptions::default());
    drivers::register_builtin(&graph);
    let mut definition = Options::new();
    definition.insert("node-name".into(), name.into());
    definition.insert("driver".into(), "qcow2".into());
    definition.insert("file".into(), format!("{name}.qcow2").into());
    let mut change = graph.change().await;
    change.set_directory(directory);
    change.add_node(graph.parse(definition, &[])?).await?;
    change.commit().await?;
    let root = graph.open_root(name, RootOptions::writer("the demo")).await?;
    let data = vec![byte; STEP as usize];
    for range in ranges {
        for offset in (range.start..range.end).step_by(STEP as usize) {
            root.write(offset, &data, 0).await?;
        }
    }
    root.close().await?;
    graph.close().await
}

/// The configuration, as if it had been read from `directory`.
pub(crate) fn config(directory: &Path) -> (Config, crate::config::Mistakes) {
    Config::parse(&directory.join("demo.toml"), FILE)
}
