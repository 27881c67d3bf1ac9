//! Images that we make, resize, empty and re-point, as QEMU sees them.

use super::harness::*;
use crate::qcow2::{Compression, CreateOptions, Preallocation, create, create_file};
use driveline_graph::Kind;
use driveline_op::{Edge, Target, op};
use futures::executor::block_on;
use std::{fs, path::Path};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn check(path: &Path) {
    run("qemu-img", &["check", "-f", "qcow2", text(path)]);
}

fn write(world: &World, offset: u64, data: &[u8]) {
    block_on(world.ask(op::WRITE, offset, 0, 0, data.into())).result.unwrap();
}

/// Opens a file of the host, does something, and puts it back.
fn edit<T>(path: &Path, backing: Option<&World>, change: impl FnOnce(&mut World) -> T) -> T {
    let mut world = World::open(fs::read(path).unwrap(), backing, false).unwrap();
    let out = change(&mut world);
    world.close().unwrap();
    fs::write(path, world.bytes()).unwrap();
    check(path);
    out
}

fn converted(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("converted");
    run("qemu-img", &["convert", "-O", "raw", text(path), text(&raw)]);
    fs::read(raw).unwrap()
}

#[test]
fn images_of_every_shape_are_made_as_qemu_understands_them() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for version in [2, 3] {
        for cluster_bytes in [512, 4096, 65536, 2 << 20] {
            for refcount_bits in if version == 2 { vec![16] } else { vec![1, 8, 64] } {
                for preallocation in [Preallocation::Off, Preallocation::Metadata] {
                    let options = CreateOptions {
                        version,
                        cluster_bytes,
                        refcount_bits,
                        preallocation,
                        ..CreateOptions::new(5_000_192)
                    };
                    let path = dir.path().join("made.qcow2");
                    create_file(&path, &options).unwrap();
                    check(&path);
                    let info = run("qemu-img", &["info", "--output=json", text(&path)]);
                    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
                    assert_eq!(info["virtual-size"], 5_000_192, "{options:?}");
                    assert_eq!(info["cluster-size"], cluster_bytes, "{options:?}");
                    assert_eq!(
                        info["format-specific"]["data"]["refcount-bits"], refcount_bits,
                        "{options:?}"
                    );
                    let before = fs::metadata(&path).unwrap().len();
                    edit(&path, None, |world| write(world, 1_000_000, &pattern(3, 100_000)));
                    if preallocation == Preallocation::Metadata {
                        assert_eq!(fs::metadata(&path).unwrap().len(), before, "room was there: {options:?}");
                    }
                    assert!(converted(&path)[1_000_000..1_100_000] == pattern(3, 100_000), "{options:?}");
                    assert_eq!(create_file(&path, &options).unwrap_err().kind(), Kind::Exists);
                    fs::remove_file(&path).unwrap();
                }
            }
        }
    }
}

#[test]
fn an_image_of_nothing_grows() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    create_file(&path, &CreateOptions::new(0)).unwrap();
    check(&path);
    edit(&path, None, |world| {
        assert!(world.contents().is_empty());
        block_on(world.node.resize(&world.children, 1 << 30)).unwrap();
        write(world, (1 << 30) - 3, b"end");
    });
}

#[test]
fn what_cannot_be_made_is_refused_by_option() {
    let path = Path::new("/nonexistent/image");
    let fine = CreateOptions::new(1 << 30);
    for (options, key) in [
        (CreateOptions { version: 4, ..fine.clone() }, "version"),
        (CreateOptions { cluster_bytes: 256, ..fine.clone() }, "cluster-size"),
        (CreateOptions { cluster_bytes: 0, ..fine.clone() }, "cluster-size"),
        (CreateOptions { cluster_bytes: 65537, ..fine.clone() }, "cluster-size"),
        (CreateOptions { refcount_bits: 3, ..fine.clone() }, "refcount-bits"),
        (CreateOptions { refcount_bits: 0, ..fine.clone() }, "refcount-bits"),
        (CreateOptions { version: 2, refcount_bits: 8, ..fine.clone() }, "refcount-bits"),
        (CreateOptions { cluster_bytes: 512, size_bytes: 1 << 40, ..fine.clone() }, "size"),
        (CreateOptions { size_bytes: u64::MAX - 511, ..fine.clone() }, "size"),
        (CreateOptions { size_bytes: 1000, ..fine.clone() }, "size"),
        (CreateOptions { backing: Some(("x".repeat(1024), String::new())), ..fine.clone() }, "backing-file"),
        (CreateOptions { version: 2, lazy_refcounts: true, ..fine.clone() }, "lazy-refcounts"),
        (CreateOptions { version: 2, extended_l2: true, ..fine.clone() }, "extended-l2"),
        (CreateOptions { version: 2, compression: Compression::Zstd, ..fine.clone() }, "compression-type"),
        (CreateOptions { version: 2, data_file: Some("x".into()), ..fine.clone() }, "data-file"),
        (CreateOptions { data_file_raw: true, ..fine.clone() }, "data-file-raw"),
    ] {
        let error = create_file(path, &options).unwrap_err();
        assert_eq!((error.kind(), error.option()), (Kind::Invalid, Some(key)), "{error}");
    }
}

#[test]
fn an_image_can_be_made_through_an_edge() {
    let leaf = leaf(Vec::new());
    let child = file_child(&leaf, None);
    let edge = Edge::to(child.node.info(&[]), &Target::new(child.node.instance(), vec![]));
    block_on(create(&edge, &CreateOptions::new(1 << 40))).unwrap();
    let world = World::on(leaf, None, false, serde_json::json!({})).unwrap();
    write(&world, (1 << 40) - 5, b"hello");
    assert_eq!(world.read((1 << 40) - 6, 6).unwrap(), b"\0hello");
}

#[test]
fn resized_images_read_as_before_and_zeroes_after() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.qcow2");
    create_file(&base, &CreateOptions::new(3 << 20)).unwrap();
    qemu_io(&base, &["write -P 7 0 3M".into()]);
    let below = World::open(fs::read(&base).unwrap(), None, true).unwrap();
    for (version, cluster_bytes) in [(2, 512), (2, 65536), (3, 512), (3, 65536)] {
        for backing in [false, true] {
            let context = format!("version {version}, {cluster_bytes}, backing {backing}");
            let path = dir.path().join("image.qcow2");
            let options = CreateOptions {
                version,
                cluster_bytes,
                backing: backing.then(|| (text(&base).to_owned(), "qcow2".to_owned())),
                ..CreateOptions::new(1_000_448)
            };
            create_file(&path, &options).unwrap();
            let below = backing.then_some(&below);
            let mut model = vec![if backing { 7 } else { 0 }; 1_000_448];
            for (step, size) in
                [1_300_480, 900_096, 5_000_192, 512, 0, 4_000_256, 30_000_128].into_iter().enumerate()
            {
                edit(&path, below, |world| {
                    let data = pattern(step as u64, model.len().min(300_000));
                    let at = model.len() - data.len();
                    model[at..].copy_from_slice(&data);
                    write(world, at as u64, &data);
                    block_on(world.node.resize(&world.children, size as u64)).unwrap();
                    assert_eq!(world.size(), size as u64);
                    model.resize(size, 0);
                    assert!(world.contents() == model, "{context}, step {step} to {size}");
                });
                assert!(converted(&path) == model, "QEMU: {context}, step {step} to {size}");
            }
            fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn snapshots_survive_a_resize_and_version_2_refuses_it() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    for version in [2, 3] {
        create_file(&path, &CreateOptions { version, cluster_bytes: 4096, ..CreateOptions::new(2 << 20) })
            .unwrap();
        qemu_io(&path, &["write -P 9 0 2M".into()]);
        run("qemu-img", &["snapshot", "-c", "s", text(&path)]);
        if version == 2 {
            edit(&path, None, |world| {
                let error = block_on(world.node.resize(&world.children, 1 << 20)).unwrap_err();
                assert_eq!(error.kind(), Kind::NotSupported, "{error}");
                assert_eq!(world.node.details()["snapshots"][0]["name"], "s");
            });
        } else {
            edit(&path, None, |world| block_on(world.node.resize(&world.children, 100_352)).unwrap());
            edit(&path, None, |world| write(world, 0, &[1; 50_000]));
            edit(&path, None, |world| block_on(world.node.resize(&world.children, 9 << 20)).unwrap());
            run("qemu-img", &["snapshot", "-a", "s", text(&path)]);
            assert!(converted(&path) == vec![9; 2 << 20]);
        }
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn an_emptied_overlay_shows_its_backing_and_can_be_repointed() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, path) = (dir.path().join("base.qcow2"), dir.path().join("image.qcow2"));
    create_file(&base, &CreateOptions::new(2 << 20)).unwrap();
    qemu_io(&base, &["write -P 5 0 2M".into()]);
    let below = World::open(fs::read(&base).unwrap(), None, true).unwrap();
    for snapshot in [false, true] {
        let options = CreateOptions {
            cluster_bytes: 4096,
            backing: Some(("base.qcow2".into(), "qcow2".into())),
            ..CreateOptions::new(2 << 20)
        };
        create_file(&path, &options).unwrap();
        qemu_io(&path, &["write -P 6 0 1M".into(), "write -z 1M 100k".into()]);
        if snapshot {
            run("qemu-img", &["snapshot", "-c", "s", text(&path)]);
        }
        edit(&path, Some(&below), |world| {
            write(world, 12345, &[8; 70_000]);
            block_on(world.node.make_empty(&world.children)).unwrap();
            assert!(world.contents() == vec![5; 2 << 20]);
            assert_eq!(world.status(0, 2 << 20).unwrap().depth, 2);
            write(world, 100, &[1; 100]);
        });
        fs::write(dir.path().join("other"), [0; 512]).unwrap();
        edit(&path, Some(&below), |world| {
            block_on(world.node.set_backing_file(&world.children, Some(("other", "raw")))).unwrap();
        });
        let info = run("qemu-img", &["info", "--output=json", text(&path)]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(
            (&info["backing-filename"], &info["backing-filename-format"]),
            (&"other".into(), &"raw".into())
        );
        edit(&path, None, |world| {
            block_on(world.node.set_backing_file(&world.children, None)).unwrap();
            let error =
                block_on(world.node.set_backing_file(&world.children, Some((&"x".repeat(2000), "raw"))));
            assert_eq!(error.unwrap_err().kind(), Kind::Invalid);
        });
        let info = run("qemu-img", &["info", "--output=json", text(&path)]);
        assert!(!info.contains("backing-filename"), "{info}");
        if snapshot {
            run("qemu-img", &["rebase", "-u", "-b", text(&base), "-F", "qcow2", text(&path)]);
            run("qemu-img", &["snapshot", "-a", "s", text(&path)]);
            assert!(converted(&path)[..1 << 20] == vec![6; 1 << 20]);
        }
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn refcounts_grow_with_the_image() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    // A refcount block of 64 clusters, and a table cluster of 64 blocks: 2 MiB.
    let options = CreateOptions { cluster_bytes: 512, refcount_bits: 64, ..CreateOptions::new(64 << 20) };
    create_file(&path, &options).unwrap();
    let data = pattern(1, 24 << 20);
    edit(&path, None, |world| {
        for (i, part) in data.chunks(1 << 20).enumerate() {
            write(world, (i as u64) << 20, part);
        }
    });
    assert!(converted(&path)[..24 << 20] == data);
}

#[test]
fn space_that_was_discarded_is_used_again() {
    let leaf = leaf(Vec::new());
    let child = file_child(&leaf, None);
    block_on(create(&child.edge, &CreateOptions::new(64 << 20))).unwrap();
    let world = World::on(leaf, None, false, serde_json::json!({})).unwrap();
    let mut most = 0;
    for round in 0..20 {
        write(&world, round << 21, &vec![round as u8 + 1; 2 << 20]);
        world.flush().unwrap();
        world.plain(op::DISCARD, round << 21, 2 << 20, 0).unwrap();
        world.flush().unwrap();
        most = most.max(world.bytes().len());
    }
    assert!(most < 6 << 20, "{most} bytes for never more than 2 MiB");
}

#[test]
fn zeroes_among_the_data_of_fresh_clusters_are_not_written() {
    let leaf = leaf(Vec::new());
    block_on(create(&file_child(&leaf, None).edge, &CreateOptions::new(64 << 20))).unwrap();
    let world = World::on(leaf, None, false, serde_json::json!({})).unwrap();
    let mut data = vec![0; 1 << 20];
    data[300_000..304_000].fill(7);
    write(&world, 0, &vec![9; 65536]);
    *world.leaf.driver.log.lock() = Some(Vec::new());
    let written = |world: &World| -> usize {
        let log = world.leaf.driver.log.lock().replace(Vec::new()).unwrap();
        log.iter().map(|event| if let Event::Write(_, bytes) = event { bytes.len() } else { 0 }).sum()
    };
    write(&world, 1 << 20, &data);
    assert!(written(&world) < 20_000, "two blocks");
    assert_eq!(world.read(1 << 20, data.len()).unwrap(), data);
    // In its own place, and where something was before, it is written as it is.
    write(&world, 0, &data[..65536]);
    write(&world, 1 << 20, &data);
    assert_eq!(written(&world), 65536 + data.len());
    world.plain(op::DISCARD, 1 << 20, 1 << 20, 0).unwrap();
    world.flush().unwrap();
    write(&world, 2 << 20, &data);
    assert_eq!(world.read(2 << 20, data.len()).unwrap(), data, "a cluster that is used again is not fresh");
}
