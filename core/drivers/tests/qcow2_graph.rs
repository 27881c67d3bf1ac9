//! Chains of qcow2 files in a graph, as users have them: backing files found from the headers, real files below.

#![allow(missing_docs)]

use driveline_drivers::{
    FileDriver, RawDriver,
    qcow2::{CreateOptions, Qcow2Driver, create_file},
};
use driveline_graph::{
    BoxFuture, ChildSpec, Description, Driver, DriverKind, Graph, GraphOptions, OpenArgs, OpenNode, Options,
    Role, RootOptions,
};
use driveline_op::{Ask, Body, Buffer, Info, Instance, OpTable, flag, op, status};
use futures::executor::block_on;
use serde_json::{Value, json};
use std::{path::Path, process::Command, sync::Arc};

fn graph() -> Graph {
    let graph = Graph::new(GraphOptions::default());
    graph.register(Arc::new(FileDriver::default())).unwrap();
    graph.register(Arc::new(RawDriver::default())).unwrap();
    graph.register(Arc::new(Qcow2Driver::default())).unwrap();
    graph
}

async fn open(graph: &Graph, definition: Value) -> driveline_graph::Result<()> {
    let Value::Object(definition) = definition else { panic!("a definition is an object") };
    let mut change = graph.change().await;
    change.add_node(graph.parse(definition, &[])?).await?;
    change.commit().await
}

/// A filter that does nothing.
struct Pass(Description);

impl Pass {
    fn driver() -> Arc<dyn Driver> {
        let mut pass = Description::builtin("pass", DriverKind::Filter, "for tests");
        pass.children = vec![ChildSpec::required("file", Role::Filtered)];
        Arc::new(Self(pass))
    }
}

impl Driver for Pass {
    fn description(&self) -> &Description {
        &self.0
    }
    fn check(&self, _: &Options) -> driveline_graph::Result<()> {
        Ok(())
    }
    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, driveline_graph::Result<Arc<dyn OpenNode>>> {
        let node = OpenPass(Arc::new(Body { cookie: args.cookie, driver: () }));
        Box::pin(async { Ok(Arc::new(node) as _) })
    }
}

struct OpenPass(Arc<Body<()>>);

static NOTHING: OpTable<()> = OpTable::new();

impl OpenNode for OpenPass {
    fn instance(&self) -> Instance {
        Instance::new(self.0.clone(), &NOTHING)
    }
    fn info(&self, children: &[Info]) -> Info {
        children[0]
    }
}

/// A write of a few blocks to a new cluster leaves the rest of it a hole of the file. Nobody is told unless they ask for it: a
/// cluster is what is allocated.
#[test]
fn holes_inside_a_cluster_are_told_to_who_asks_precisely() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    made(&path, 1 << 20, 65536, None);
    let graph = graph();
    block_on(async {
        let file = json!({ "driver": "file", "path": path });
        open(&graph, json!({ "driver": "qcow2", "node-name": "image", "file": file })).await.unwrap();
        let root = graph.open_root("image", RootOptions::writer("a test")).await.unwrap();
        root.write(65536, &[7; 8192], 0).await.unwrap();
        root.flush().await.unwrap();
        let ask = async |offset: u64, flags| {
            let ask = Ask { op: op::BLOCK_STATUS, offset, length: 2 << 16, flags, ..Ask::default() };
            let answer = root.submit(ask, Buffer::default()).await;
            answer.result.unwrap();
            (answer.status.flags & (status::DATA | status::ZERO), answer.status.depth, answer.status.length)
        };
        assert_eq!(ask(65536, 0).await, (status::DATA, 1, 65536));
        assert_eq!(ask(65536, flag::PRECISE).await, (status::DATA, 1, 8192));
        assert_eq!(ask(65536 + 8192, flag::PRECISE).await, (status::ZERO, 1, 65536 - 8192));
        // What nobody wrote is no cluster, whoever asks.
        assert_eq!(ask(2 << 16, flag::PRECISE).await, (status::ZERO, 0, 2 << 16));
        root.close().await.unwrap();
    });
}

/// An image behind a filter was no file, so a relative name in its header was relative to nothing.
#[test]
fn a_backing_file_is_found_beside_an_image_that_filters_stand_before() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("base.raw"), [7; 4096]).unwrap();
    made(&at("image.qcow2"), 4096, 65536, Some(("base.raw", "raw")));
    made(&at("loop.qcow2"), 4096, 65536, Some(("loop.qcow2", "qcow2")));
    let behind = |image: &str| {
        let file = json!({ "driver": "file", "path": at(image) });
        let filter = json!({ "driver": "pass", "file": { "driver": "pass", "file": file } });
        json!({ "driver": "qcow2", "node-name": "image", "file": filter })
    };
    let graph = graph();
    graph.register(Pass::driver()).unwrap();
    block_on(async {
        open(&graph, behind("image.qcow2")).await.unwrap();
        let root = graph.open_root("image", RootOptions::reader("a test")).await.unwrap();
        assert_eq!(&root.read(0..4096).await.unwrap()[..], &[7; 4096]);
        root.close().await.unwrap();
        let mut again = behind("loop.qcow2");
        again["node-name"] = json!("again");
        let error = open(&graph, again).await.unwrap_err().to_string();
        assert!(error.contains("a cycle of backing files"), "{error}");
    });
}

fn made(path: &Path, size_bytes: u64, cluster_bytes: u64, backing: Option<(&str, &str)>) {
    let backing = backing.map(|(name, format)| (name.to_owned(), format.to_owned()));
    let options = CreateOptions { cluster_bytes, backing, ..CreateOptions::new(size_bytes) };
    create_file(path, &options).unwrap();
}

fn qemu_img(args: &[&str]) {
    match Command::new("qemu-img").args(args).output() {
        Ok(out) => assert!(
            out.status.success(),
            "{args:?}: {}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        ),
        Err(error) => {
            assert!(
                std::env::var_os("CI").is_none(),
                "qemu-img is missing, and CI must not skip checks: {error}"
            );
            eprintln!("SKIPPED: qemu-img is missing, so it did not check {args:?}");
        }
    }
}

#[test]
fn a_chain_on_files_is_written_grown_and_understood_by_qemu() {
    for (cache, cluster_bytes) in [("writeback", 65536), ("writeback", 512), ("none", 65536), ("none", 512)] {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("below")).unwrap();
        let data: Vec<u8> = (0..6_000_000u32).map(|i| (i / 777) as u8).collect();
        std::fs::write(at("below/base.raw"), &data[..1 << 20]).unwrap();
        made(&at("below/middle.qcow2"), 2 << 20, 4096, Some(("base.raw", "raw")));
        made(&at("top.qcow2"), 3 << 20, cluster_bytes, Some(("below/middle.qcow2", "")));
        let mut model = data[..1 << 20].to_vec();
        model.resize(5 << 20, 0);
        block_on(async {
            let graph = graph();
            let file = json!({ "driver": "file", "path": at("top.qcow2"), "cache": cache });
            let definition = json!({ "driver": "qcow2", "node-name": "top", "file": file });
            match open(&graph, definition).await {
                Err(error) if cache == "none" && error.to_string().contains("O_DIRECT") => {
                    eprintln!("SKIPPED: no O_DIRECT here: {error}");
                    return;
                }
                opened => opened.unwrap(),
            }
            assert_eq!(graph.chain("top").unwrap().len(), 3);
            let mut guest = graph.open_root("top", RootOptions::writer("a guest")).await.unwrap();
            for round in 0..60u64 {
                if round == 30 {
                    guest.close().await.unwrap();
                    let mut change = graph.change().await;
                    change.resize("top", 5 << 20).unwrap();
                    change.commit().await.unwrap();
                    guest = graph.open_root("top", RootOptions::writer("a guest")).await.unwrap();
                    assert_eq!(guest.info().size_bytes, 5 << 20);
                }
                let at = (round * 977_777) % (3 << 20) * guest.info().size_bytes / (4 << 20);
                let length = 1 + (round * 7919) % 60_000;
                let range = at as usize..(at + length) as usize;
                match round % 5 {
                    0..=2 => {
                        guest.write(at, &data[range.clone()], 0).await.unwrap();
                        model[range.clone()].copy_from_slice(&data[range]);
                    }
                    3 => {
                        guest.write_zeroes(at..at + length, 0).await.unwrap();
                        model[range].fill(0);
                    }
                    _ => guest.flush().await.unwrap(),
                }
            }
            let size = guest.info().size_bytes;
            assert!(guest.read(0..size).await.unwrap()[..] == model[..], "{cache}, {cluster_bytes}");
            guest.close().await.unwrap();
            graph.close().await.unwrap();
            let top = at("top.qcow2");
            qemu_img(&["check", top.to_str().unwrap()]);
            let raw = at("model.raw");
            std::fs::write(&raw, &model).unwrap();
            qemu_img(&["compare", top.to_str().unwrap(), raw.to_str().unwrap()]);
        });
    }
}

#[test]
fn a_backing_file_can_be_left_out_when_the_one_that_the_header_names_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    made(&at("gone.qcow2"), 1 << 20, 65536, Some(("/no/such/base.raw", "raw")));
    block_on(async {
        let graph = graph();
        let image = |name: &str, backing: Value| {
            let file = json!({ "driver": "file", "path": at(name) });
            let mut image = json!({ "driver": "qcow2", "node-name": "top", "read-only": true, "file": file });
            if !backing.is_boolean() {
                image["backing"] = backing;
            }
            image
        };
        let error = open(&graph, image("gone.qcow2", json!(true))).await.unwrap_err();
        assert!(error.to_string().contains("/no/such/base.raw"), "{error}");
        open(&graph, image("gone.qcow2", json!(null))).await.unwrap();
        assert_eq!(graph.chain("top").unwrap().len(), 1);
        graph.close().await.unwrap();
    });
}

#[test]
fn a_chain_that_leads_back_to_itself_is_refused_by_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (name, backing) in [("a.qcow2", "c.qcow2"), ("b.qcow2", "a.qcow2"), ("c.qcow2", "b.qcow2")] {
        made(&at(name), 1 << 20, 65536, Some((backing, "qcow2")));
    }
    made(&at("self.qcow2"), 1 << 20, 65536, Some(("self.qcow2", "qcow2")));
    for (top, way) in [("c.qcow2", vec!["c", "b", "a", "c"]), ("self.qcow2", vec!["self", "self"])] {
        let definition = json!({ "driver": "qcow2", "node-name": "top", "file": at(top) });
        let error = block_on(open(&graph(), definition)).unwrap_err().to_string();
        let dir = dir.path().canonicalize().unwrap();
        let way: Vec<_> = way.iter().map(|name| format!("{}/{name}.qcow2", dir.display())).collect();
        assert!(error.ends_with(&format!("a cycle of backing files: {}", way.join(" -> "))), "{error}");
    }
}

#[test]
fn a_data_file_is_found_from_the_header_and_follows_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let options = CreateOptions {
        data_file: Some("disk.raw".into()),
        data_file_raw: true,
        ..CreateOptions::new(3 << 20)
    };
    create_file(&at("disk.qcow2"), &options).unwrap();
    let definition = |read_only: bool| {
        let file = json!({ "driver": "file", "path": at("disk.qcow2") });
        json!({ "driver": "qcow2", "node-name": "disk", "read-only": read_only, "file": file })
    };
    let data: Vec<u8> = (0..300_000u32).map(|i| (i / 777) as u8 | 1).collect();
    block_on(async {
        let graph = graph();
        open(&graph, definition(false)).await.unwrap();
        let guest = graph.open_root("disk", RootOptions::writer("a guest")).await.unwrap();
        guest.write(1_000_001, &data, 0).await.unwrap();
        guest.write_zeroes(1_000_000..1_100_000, 0).await.unwrap();
        guest.close().await.unwrap();
        let mut change = graph.change().await;
        change.resize("disk", 5 << 20).unwrap();
        change.commit().await.unwrap();
        graph.close().await.unwrap();
    });
    let raw = std::fs::read(at("disk.raw")).unwrap();
    assert_eq!(raw.len(), 5 << 20, "whoever reads the data file sees the disk");
    assert!(raw[1_100_000..1_300_001] == data[99_999..] && raw[..1_100_000].iter().all(|&byte| byte == 0));
    // A reader needs no right to write to either.
    for name in ["disk.qcow2", "disk.raw"] {
        let mut permissions = std::fs::metadata(at(name)).unwrap().permissions();
        permissions.set_readonly(true);
        std::fs::set_permissions(at(name), permissions).unwrap();
    }
    block_on(async {
        let graph = graph();
        open(&graph, definition(true)).await.unwrap();
        let guest = graph.open_root("disk", RootOptions::reader("a guest")).await.unwrap();
        assert!(guest.read(0..5 << 20).await.unwrap()[..] == raw[..]);
        guest.close().await.unwrap();
        graph.close().await.unwrap();
    });
}
