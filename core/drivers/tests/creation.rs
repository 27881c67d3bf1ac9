//! Images that are made in nodes and in files, compared with those that `qemu-img create` makes.

#![allow(missing_docs)]

use driveline_drivers::{FileDriver, MemoryDriver, RawDriver, qcow2::Qcow2Driver};
use driveline_graph::{Created, Graph, GraphOptions, Kind, NewImage, RootOptions};
use futures::executor::block_on;
use serde_json::{Value, json};
use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Command, sync::Arc};

fn graph() -> Graph {
    let graph = Graph::new(GraphOptions::default());
    graph.register(Arc::new(FileDriver::default())).unwrap();
    graph.register(Arc::new(RawDriver::default())).unwrap();
    graph.register(Arc::new(MemoryDriver::default())).unwrap();
    graph.register(Arc::new(Qcow2Driver::default())).unwrap();
    graph
}

fn create(graph: &Graph, options: Value) -> driveline_graph::Result<Created> {
    let Value::Object(options) = options else { panic!("options are an object") };
    block_on(graph.create(options))
}

async fn add(graph: &Graph, definition: Value) {
    let Value::Object(definition) = definition else { panic!("a definition is an object") };
    let mut change = graph.change().await;
    change.add_node(graph.parse(definition, &[]).unwrap()).await.unwrap();
    change.commit().await.unwrap();
}

fn have_qemu_img() -> bool {
    let have = Command::new("qemu-img").arg("--version").output().is_ok();
    assert!(have || std::env::var_os("CI").is_none(), "qemu-img is missing, and CI must not skip checks");
    have
}

fn qemu_img(args: &[&str]) -> String {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

/// What QEMU says of an image, but for where it is and how much space its metadata takes.
fn told(path: &Path) -> Value {
    let text = qemu_img(&["info", "--output=json", path.to_str().unwrap()]);
    let mut info: Value = serde_json::from_str(&text).unwrap();
    for key in ["filename", "actual-size", "children", "full-backing-filename"] {
        info.as_object_mut().unwrap().remove(key);
    }
    if let Some(name) = info.pointer_mut("/format-specific/data/data-file") {
        *name = "data".into();
    }
    info
}

/// The header's fields that say what the image is: version, sizes, features, refcounts, lengths, compression.
fn header(path: &Path) -> Vec<u8> {
    let bytes = fs::read(path).unwrap();
    [&bytes[4..8], &bytes[20..40], &bytes[72.min(bytes.len())..112]].concat()
}

#[test]
fn images_are_what_qemu_img_makes_with_the_same_options() {
    if !have_qemu_img() {
        return;
    }
    let shapes = [
        json!({}),
        json!({ "version": "v2" }),
        json!({ "version": "v2", "cluster-size": 512 }),
        json!({ "cluster-size": 2 << 20, "refcount-bits": 1 }),
        json!({ "cluster-size": 4096, "refcount-bits": 64, "lazy-refcounts": true }),
        json!({ "compression-type": "zstd" }),
        json!({ "extended-l2": true, "cluster-size": 16384 }),
        json!({ "preallocation": "metadata" }),
        json!({ "preallocation": "falloc" }),
        json!({ "preallocation": "full", "cluster-size": 4096 }),
        json!({ "backing-file": "base", "backing-fmt": "raw" }),
        json!({ "backing-file": "base", "backing-fmt": "raw", "extended-l2": true, "preallocation": "metadata" }),
        json!({ "data-file": "data" }),
        json!({ "data-file": "data", "data-file-raw": true, "preallocation": "falloc" }),
    ];
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("base"), vec![7; 3 << 20]).unwrap();
    let size = 5_000_192u64;
    for shape in shapes {
        let graph = graph();
        let (ours, theirs) = (at("ours"), at("theirs"));
        for name in ["ours", "data"] {
            // What was there goes.
            fs::write(at(name), vec![0xee; 70_000]).unwrap();
        }
        let mut options = shape.clone();
        let said = options.as_object_mut().unwrap();
        said.insert("driver".into(), "qcow2".into());
        said.insert("size".into(), size.into());
        said.insert("file".into(), json!({ "driver": "file", "path": ours }));
        if said.contains_key("data-file") {
            said.insert("data-file".into(), json!({ "driver": "file", "path": at("data") }));
        }
        create(&graph, options).unwrap_or_else(|error| panic!("{shape}: {error}"));
        assert!(graph.nodes().is_empty(), "{shape}: nodes that were made for it go with it");

        let words = shape.as_object().unwrap().iter().map(|(key, value)| {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            match (&**key, &*value) {
                ("version", "v2") => "compat=0.10".to_owned(),
                ("lazy-refcounts" | "extended-l2" | "data-file-raw", _) => {
                    format!("{}=on", key.replace('-', "_"))
                }
                ("data-file", _) => format!("data_file={}", at("theirs.data").display()),
                ("compression-type", _) => format!("compression_type={value}"),
                ("backing-file", _) => "backing_file=base".to_owned(),
                _ => format!("{}={value}", key.replace('-', "_")),
            }
        });
        let words: Vec<String> = words.collect();
        let mut args = vec!["create", "-f", "qcow2"];
        let words = words.join(",");
        if !words.is_empty() {
            args.extend(["-o", &words]);
        }
        let (path, length) = (theirs.to_str().unwrap().to_owned(), size.to_string());
        args.extend([&*path, &length]);
        qemu_img(&args);
        assert_eq!(told(&ours), told(&theirs), "{shape}");
        assert_eq!(header(&ours), header(&theirs), "{shape}");
        qemu_img(&["check", ours.to_str().unwrap()]);
        qemu_img(&["compare", ours.to_str().unwrap(), theirs.to_str().unwrap()]);
        let map = |path: &Path| -> Vec<(Value, Value, Value, Value)> {
            let text = qemu_img(&["map", "--output=json", path.to_str().unwrap()]);
            let extents: Vec<Value> = serde_json::from_str(&text).unwrap();
            let of = |e: &Value| {
                (e["start"].clone(), e["length"].clone(), e["depth"].clone(), e["present"].clone())
            };
            extents.iter().map(of).collect()
        };
        if shape.get("preallocation").is_none() {
            assert_eq!(map(&ours), map(&theirs), "{shape}");
        }
        // What is asked to be there is there, in the file that data is in.
        if matches!(shape["preallocation"].as_str(), Some("falloc" | "full")) {
            let file = if shape.get("data-file").is_some() { at("data") } else { ours.clone() };
            assert!(fs::metadata(file).unwrap().blocks() * 512 >= size, "{shape}");
        }
        let _ = fs::remove_file(at("theirs.data"));
    }
}

#[test]
fn files_are_made_as_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let file = |more: Value| {
        let mut options = json!({ "driver": "file", "filename": path, "size": 1_000_000 });
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    };
    let graph = graph();
    assert_eq!(create(&graph, file(json!({}))).unwrap(), Created::New);
    assert_eq!(fs::metadata(&path).unwrap().len(), 1_000_000);
    assert_eq!(fs::metadata(&path).unwrap().blocks(), 0);
    fs::write(&path, b"what was there").unwrap();
    for how in ["falloc", "full"] {
        assert_eq!(create(&graph, file(json!({ "preallocation": how }))).unwrap(), Created::Overwritten);
        assert!(fs::metadata(&path).unwrap().blocks() * 512 >= 1_000_000, "{how}");
        assert!(fs::read(&path).unwrap() == vec![0; 1_000_000], "{how}");
    }
    create(&graph, file(json!({ "nocow": true, "extent-size-hint": 65536 }))).unwrap();
    let refused = [
        (file(json!({ "preallocation": "metadata" })), "Unsupported preallocation mode: metadata"),
        (file(json!({ "size": -1 })), "Could not resize file: Invalid argument"),
        (file(json!({ "size": 1u64 << 62 })), "Could not resize file: File too large"),
        (
            file(json!({ "filename": "/no such/file" })),
            "Could not create '/no such/file': No such file or directory",
        ),
        (file(json!({ "color": "red" })), "unknown field `color`"),
    ];
    for (options, text) in refused {
        let error = create(&graph, options).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    // One that could not be finished is not left behind.
    let new = dir.path().join("new");
    create(&graph, json!({ "driver": "file", "filename": new, "size": 1u64 << 62 })).unwrap_err();
    assert!(!new.exists());
}

#[test]
fn wrong_options_are_refused_in_qemus_words_and_leave_the_node_as_it_is() {
    let graph = graph();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, vec![5; 65536]).unwrap();
    block_on(add(&graph, json!({ "driver": "file", "node-name": "f", "path": path })));
    block_on(add(&graph, json!({ "driver": "memory", "node-name": "m", "size": 0 })));
    let v3 = "compatibility level 1.1 and above (use version=v3 or greater)";
    for (more, text) in [
        (json!({ "size": 1000 }), "Image size must be a multiple of 512 bytes".to_owned()),
        (json!({ "cluster-size": 256 }), "Cluster size must be a power of two between 512 and 2048k".into()),
        (
            json!({ "version": "v2", "lazy-refcounts": true }),
            format!("Lazy refcounts only supported with {v3}"),
        ),
        (
            json!({ "refcount-bits": 3 }),
            "Refcount width must be a power of two and may not exceed 64 bits".into(),
        ),
        (json!({ "version": "v2", "compression-type": "zstd" }), format!("type is only supported with {v3}")),
        (json!({ "backing-fmt": "raw" }), "Backing format cannot be used without backing file".into()),
        (json!({ "data-file-raw": true }), "data-file-raw requires data-file".into()),
        (
            json!({ "data-file": "f2", "data-file-raw": true, "backing-file": "x" }),
            "there is no node and no drive 'f2'".into(),
        ),
        (
            json!({ "backing-file": "x", "preallocation": "full" }),
            "Backing file and preallocation can only be used at the same time if extended_l2 is on".into(),
        ),
        (json!({ "encrypt": { "format": "luks" } }), "Encrypted images are not supported".into()),
        (json!({ "data-file": "m" }), "the node has no name to note".into()),
        (json!({ "size": 1u64 << 62 }), "the limit is".into()),
        (json!({ "version": "v4" }), "unknown variant `v4`".into()),
        (json!({ "file": "nope" }), "there is no node and no drive 'nope'".into()),
        (json!({ "driver": "memory" }), "Driver 'memory' does not support image creation".into()),
    ] {
        let mut options = json!({ "driver": "qcow2", "file": "f", "size": 1 << 20 });
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let error = create(&graph, options).unwrap_err().to_string();
        assert!(error.contains(&text), "{more}: {error}");
        assert!(fs::read(&path).unwrap() == vec![5; 65536], "{more}");
        assert!(graph.nodes().iter().all(|view| view.parents.is_empty()), "{more}: no root is left");
    }
}

#[test]
fn an_image_is_not_made_in_what_somebody_uses() {
    let graph = graph();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let text = path.to_str().unwrap().to_owned();
    fs::write(&path, b"").unwrap();
    block_on(add(&graph, json!({ "driver": "file", "node-name": "f", "path": path })));
    let image = json!({ "driver": "qcow2", "file": "f", "size": 1 << 20 });
    create(&graph, image.clone()).unwrap();
    block_on(add(&graph, json!({ "driver": "qcow2", "node-name": "q", "file": "f" })));
    let before = fs::read(&path).unwrap();
    let error = create(&graph, image).unwrap_err();
    assert_eq!(error.kind(), Kind::NotPermitted);
    let error = create(&graph, json!({ "driver": "file", "filename": path, "size": 0 })).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy, "{error}");
    let new = NewImage { path: text, format: "qcow2".into(), size_bytes: 512, backing: None };
    let error = block_on(graph.create_image(&new)).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy, "{error}");
    assert!(fs::read(&path).unwrap() == before);
}

#[test]
fn an_image_in_a_file_is_made_while_a_change_is_in_the_making_and_can_be_taken_back() {
    let graph = graph();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("overlay");
    let new = |format: &str, size_bytes, backing: Option<&str>| NewImage {
        path: path.to_str().unwrap().into(),
        format: format.into(),
        size_bytes,
        backing: backing.map(|name| (name.to_owned(), Some("raw".to_owned()))),
    };
    block_on(async {
        let change = graph.change().await;
        let made = graph.create_image(&new("qcow2", 1000, Some("base"))).await.unwrap();
        assert_eq!(made.created(), Created::New);
        drop(change);
        add(&graph, json!({ "driver": "qcow2", "node-name": "q", "file": path, "backing": null })).await;
        let root = graph.open_root("q", RootOptions::writer("a guest")).await.unwrap();
        assert_eq!(root.info().size_bytes, 1024, "rounded up to a sector");
        let named = graph.node("q").unwrap().open_node().backing_file();
        assert_eq!(named, Some(("base".into(), "raw".into())));
        drop(root);
        graph.close().await.unwrap();
        made.remove().unwrap();
        assert!(!path.exists());

        fs::write(&path, b"it was there").unwrap();
        let made = graph.create_image(&new("raw", 4096, None)).await.unwrap();
        assert_eq!(made.created(), Created::Overwritten);
        made.remove().unwrap();
        assert!(fs::read(&path).unwrap() == vec![0; 4096], "what was overwritten stays");
        fs::remove_file(&path).unwrap();

        let own = path.to_str().unwrap();
        for (image, text) in [
            (new("qcow2", 512, Some(own)), "same filename as the backing file"),
            (new("raw", 512, Some("base")), "Backing file not supported for file format 'raw'"),
            (new("vmdk", 512, None), "Unknown file format 'vmdk'"),
            (new("memory", 512, None), "Format driver 'memory' does not support image creation"),
            (new("file", 512, None), "Format driver 'file' does not support image creation"),
            (new("qcow2", u64::MAX, None), "too large"),
        ] {
            let error = graph.create_image(&image).await.unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
            assert!(!path.exists(), "{text}: nothing is left behind");
        }
    });
}
