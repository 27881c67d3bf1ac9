//! The drivers in a graph: what a root sees of them, and what the graph does with them.

use driveline_drivers::{
    FileDriver, MemoryDriver, NullDriver, RawDriver,
    conformance::{Check, check_with},
};
use driveline_engine::{Config, Engine};
use driveline_graph::{Graph, GraphOptions, Kind, Result, Root, RootOptions};
use driveline_op::flag;
use serde_json::{Value, json};
use std::{fs, path::Path, sync::Arc};
use tempfile::TempDir;

fn engine() -> Engine {
    Engine::start(Config { threads: 1, ..Config::default() }).unwrap()
}

fn graph() -> Graph {
    let graph = Graph::new(GraphOptions::default());
    graph.register(Arc::new(FileDriver::default())).unwrap();
    graph.register(Arc::new(MemoryDriver::default())).unwrap();
    graph.register(Arc::new(NullDriver::default())).unwrap();
    graph.register(Arc::new(RawDriver::default())).unwrap();
    graph
}

/// Adds a node `disk` and opens it for writing.
async fn open(graph: &Graph, directory: &Path, definition: Value) -> Result<Root> {
    let mut change = graph.change().await;
    change.set_directory(directory);
    let definition = graph.parse(definition.as_object().unwrap().clone(), &[])?;
    change.add_node(definition).await?;
    change.commit().await?;
    graph.open_root("disk", RootOptions::writer("a test")).await
}

fn image(bytes: usize) -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("a.img"), vec![3; bytes]).unwrap();
    folder
}

#[test]
fn every_stack_conforms_from_a_root() {
    let (engine, folder) = (engine(), image(1 << 20));
    let file = |cache: &str| json!({ "driver": "file", "path": "a.img", "cache": cache });
    for (seed, disk) in [
        json!({ "driver": "memory", "size": "512KiB" }),
        json!({ "driver": "raw", "file": { "driver": "memory", "size": 700_000 }, "offset": 77, "size": 600_001 }),
        json!({ "driver": "raw", "file": file("writeback") }),
        json!({ "driver": "raw", "file": file("none"), "offset": "64KiB", "size": "512KiB" }),
        json!({ "driver": "raw", "file": { "driver": "raw", "file": file("none"), "offset": "8KiB" } }),
    ]
    .into_iter()
    .enumerate()
    {
        let mut disk = disk;
        disk["node-name"] = json!("disk");
        let folder = folder.path().to_owned();
        engine.block_on_local(|| async move {
            let graph = graph();
            let root = match open(&graph, &folder, disk).await {
                Err(error) if error.option() == Some("cache") => return eprintln!("skipped: {error}"),
                root => root.unwrap(),
            };
            let check = Check { seed: seed as u64, steps: 120, ..Check::default() };
            check_with(root.info(), check, async |ask, buffer| root.submit(ask, buffer).await).await;
            root.close().await.unwrap();
            graph.close().await.unwrap();
        });
    }
}

#[test]
fn a_new_size_goes_down_to_the_file_and_up_to_the_root() {
    let (engine, folder) = (engine(), image(4096));
    let path = folder.path().to_owned();
    engine.block_on_local(|| async move {
        let graph = graph();
        let file = json!({ "driver": "file", "path": "a.img" });
        let disk = json!({ "driver": "raw", "node-name": "disk", "offset": 1024, "file": file });
        let root = open(&graph, &path, disk).await.unwrap();
        assert_eq!(root.info().size_bytes, 3072);
        root.close().await.unwrap();
        let shares = driveline_graph::Permissions::ALL;
        let options = RootOptions { shares, ..RootOptions::writer("a test") };
        let root = graph.open_root("disk", options).await.unwrap();
        let mut change = graph.change().await;
        change.resize("disk", 9000).unwrap();
        change.commit().await.unwrap();
        assert_eq!(root.info().size_bytes, 9000);
        root.write(8990, &[1; 10], flag::FUA).await.unwrap();
        assert!(root.write(8991, &[1; 10], 0).await.is_err());
        root.close().await.unwrap();
        graph.close().await.unwrap();
    });
    assert_eq!(fs::metadata(folder.path().join("a.img")).unwrap().len(), 9000 + 1024);
}

#[test]
fn two_graphs_do_not_write_to_one_file() {
    let (engine, folder) = (engine(), image(4096));
    let path = folder.path().to_owned();
    engine.block_on_local(|| async move {
        let (one, other) = (graph(), graph());
        let file = || json!({ "driver": "file", "path": "a.img" });
        let disk = || json!({ "driver": "raw", "node-name": "disk", "file": file() });
        let root = open(&one, &path, disk()).await.unwrap();
        let refused = open(&other, &path, disk()).await.map(drop).unwrap_err();
        assert_eq!(refused.kind(), Kind::Busy, "{refused}");
        assert!(refused.message().contains("a.img") && refused.node().is_some(), "{refused}");
        assert!(other.nodes().is_empty(), "nothing is left of what failed");
        root.close().await.unwrap();
        one.close().await.unwrap();
        let root = open(&other, &path, disk()).await.unwrap();
        root.close().await.unwrap();
    });
}

/// For what this process has a file open: 0 for reading, 2 for writing too.
fn access(path: &Path) -> Vec<u32> {
    let mut modes = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        if std::fs::read_link(entry.path()).is_ok_and(|target| target == path) {
            let info =
                std::fs::read_to_string(Path::new("/proc/self/fdinfo").join(entry.file_name())).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            modes.push(u32::from_str_radix(flags.trim(), 8).unwrap() & 3);
        }
    }
    modes
}

#[test]
fn with_auto_read_only_a_file_is_open_for_writing_only_while_somebody_may_write() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap().join("disk");
    std::fs::write(&path, vec![0; 4096]).unwrap();
    for auto in [true, false] {
        let idle = if auto { 0 } else { 2 };
        engine().block_on(async {
            let graph = graph();
            let Value::Object(definition) =
                json!({ "driver": "file", "node-name": "f", "path": path, "auto-read-only": auto })
            else {
                unreachable!()
            };
            let mut change = graph.change().await;
            change.add_node(graph.parse(definition, &[]).unwrap()).await.unwrap();
            change.commit().await.unwrap();
            assert_eq!(access(&path), [idle]);
            let reader = graph.open_root("f", RootOptions::reader("a reader")).await.unwrap();
            assert_eq!(access(&path), [idle]);
            let writer = graph.open_root("f", RootOptions::writer("a writer")).await.unwrap();
            assert_eq!(access(&path), [2]);
            writer.write(512, &[7; 512], 0).await.unwrap();
            writer.close().await.unwrap();
            assert_eq!(access(&path), [idle]);
            assert_eq!(reader.read(512..1024).await.unwrap()[..], [7; 512]);
            reader.flush().await.unwrap();
            // Nobody may write, but the owner of the node changes its size.
            let mut change = graph.change().await;
            change.resize("f", 8192).unwrap();
            change.commit().await.unwrap();
            assert_eq!((access(&path), std::fs::metadata(&path).unwrap().len()), (vec![idle], 8192));
            assert!(!graph.view_node("f").unwrap().read_only);
            drop(reader);
            graph.close().await.unwrap();
        });
    }
}
