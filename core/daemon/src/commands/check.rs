//! `driveline check`.

use super::{fail, print, read};
use crate::{
    config::{Config, Mistakes},
    daemon::{build, graph_for, start_engine},
    moved,
};
use driveline_drivers::Bytes;
use driveline_graph::{ChildDefinition, Definition, Graph};
use std::{fmt::Write, path::Path, process::ExitCode};

/// Reports every mistake of a file, or what running it would do.
pub fn check(file: &Path) -> ExitCode {
    let (config, mistakes) = match read(file) {
        Ok(read) => read,
        Err(code) => return code,
    };
    match rehearse(&config, mistakes) {
        Ok(text) => print(&text),
        Err(Failed::Mistakes(mistakes)) => {
            mistakes.print();
            ExitCode::FAILURE
        }
        Err(Failed::World(message)) => fail(format_args!("{}: {message}", file.display())),
    }
}

/// Why a file cannot be run.
#[derive(Debug)]
pub enum Failed {
    /// It is wrong.
    Mistakes(Mistakes),
    /// It is right, but the world is not.
    World(String),
}

/// Says what running a configuration would do: everything is opened read-only, without locks, and closed again.
pub fn rehearse(config: &Config, mut mistakes: Mistakes) -> Result<String, Failed> {
    let graph = graph_for(config, &mut mistakes);
    config.check(&graph, &mut mistakes);
    if !mistakes.is_empty() {
        return Err(Failed::Mistakes(mistakes));
    }
    let engine = start_engine(config).map_err(Failed::World)?;
    let text = engine.block_on_local(|| async {
        build(config, &graph, harmless, true).await?;
        moved::refuse(config, &graph.layout())?;
        let text = describe(config, &graph);
        graph.close().await?;
        driveline_graph::Result::Ok(text)
    });
    engine.shutdown();
    text.map_err(|error| match config.locate(&error) {
        Some(mistake) => {
            mistakes.add(mistake);
            Failed::Mistakes(mistakes)
        }
        None => Failed::World(error.to_string()),
    })
}

/// The same node, without any effect on anybody: read-only, and its files without locks.
pub(crate) fn harmless(mut definition: Definition) -> Definition {
    definition.read_only = Some(true);
    if definition.driver == "file" {
        definition.options.insert("locking".into(), "off".into());
    }
    for (_, child) in &mut definition.children {
        if let ChildDefinition::Inline(inner) = child {
            **inner = harmless((**inner).clone());
        }
    }
    definition
}

fn describe(config: &Config, graph: &Graph) -> String {
    let mut out = String::new();
    let size = |name: &str| graph.size_bytes(name).map(|bytes| Bytes(bytes).to_string()).unwrap_or_default();
    let nodes = graph.nodes().len();
    let _ = writeln!(out, "{}: no mistakes", config.file.display());
    let _ = writeln!(out, "  would open  {nodes} node{}", if nodes == 1 { "" } else { "s" });
    for drive in &config.drives {
        let name = drive.name.get_ref();
        let _ = writeln!(out, "  drive       {name}, {}, root {}", size(name), drive.root.get_ref());
        for bitmap in graph.bitmaps(name).unwrap_or_default() {
            let granularity = Bytes(bitmap.granularity().bytes());
            let section =
                drive.bitmaps.iter().find(|section| *section.name.get_ref() == *bitmap.name().as_str());
            let kept = match section.and_then(|section| section.durability) {
                Some(durability) => format!(", persistent ({durability})"),
                None => String::new(),
            };
            let _ = writeln!(out, "  bitmap      {name}/{}, {granularity}{kept}", bitmap.name());
        }
    }
    for export in &config.exports {
        let mode = if export.writable { "writable" } else { "read-only" };
        let (target, address) = (export.target.name().get_ref(), export.address.get_ref());
        let _ = writeln!(out, "  would serve {} as '{}' at {address}, {mode}", target, export.name.get_ref());
    }
    if let Some(monitor) = &config.monitor {
        let _ = writeln!(out, "  would speak QMP at {}", monitor.get_ref());
    }
    out
}
