//! What is not opened, or not for writing, and stays as it is; and what the driver says about options and chains.

use super::harness::*;
use crate::{
    conformance::{Check, check, open_node},
    qcow2::{CreateOptions, Qcow2Driver, create},
};
use driveline_graph::{Driver, Kind, Options};
use driveline_op::{info, op};
use futures::executor::block_on;
use std::path::Path;

fn image(options: &CreateOptions) -> Vec<u8> {
    let leaf = leaf(Vec::new());
    block_on(create(&file_child(&leaf, None).edge, options)).unwrap();
    leaf.driver.data.lock().clone()
}

fn options(value: serde_json::Value) -> Options {
    value.as_object().unwrap().clone()
}

#[test]
fn refused_images_are_not_changed() {
    let good = image(&CreateOptions::new(1 << 20));
    for (at, byte, word) in
        [(79, 2, "driveline check-image --repair"), (77, 1, "incompatible"), (35, 1, "AES")]
    {
        let mut bytes = good.clone();
        bytes[at] = byte;
        // An unknown autoclear bit would be cleared, had it been opened.
        bytes[88] = 0x40;
        let leaf = leaf(bytes.clone());
        let error = World::on(leaf.clone(), None, false, serde_json::json!({})).err().unwrap();
        assert!(error.to_string().contains(word), "{error}");
        assert!(*leaf.driver.data.lock() == bytes, "{word}: a refused image was changed");
    }
    let cut = World::open(good[..50].to_vec(), None, true).err().unwrap();
    assert_eq!(cut.kind(), Kind::Invalid, "{cut}");
}

#[test]
fn unknown_autoclear_bits_are_cleared_by_the_first_writer_only() {
    let mut bytes = image(&CreateOptions::new(1 << 20));
    bytes[88] = 0x40;
    let reader = World::open(bytes.clone(), None, true).unwrap();
    reader.close().unwrap();
    assert!(reader.bytes() == bytes);
    block_on(reader.node.set_read_only(&reader.children, false)).unwrap();
    assert_eq!(reader.bytes()[88], 0);
    let writer = World::open(bytes, None, false).unwrap();
    assert_eq!(writer.bytes()[88], 0);
}

#[test]
fn a_node_becomes_read_only_and_writable_again() {
    let world = World::open(image(&CreateOptions::new(1 << 20)), None, false).unwrap();
    let write = |byte: u8| block_on(world.ask(op::WRITE, 5, 0, 0, [byte; 9][..].into())).result;
    write(1).unwrap();
    block_on(world.node.set_read_only(&world.children, true)).unwrap();
    assert_eq!(write(2).unwrap_err().code(), 1);
    assert_ne!(world.edge().info().flags & info::READ_ONLY, 0);
    // Everything is in the file by now.
    assert_eq!(World::open(world.bytes(), None, true).unwrap().read(5, 9).unwrap(), [1; 9]);
    block_on(world.node.set_read_only(&world.children, false)).unwrap();
    write(3).unwrap();
    assert_eq!(world.read(4, 3).unwrap(), [0, 3, 3]);
}

#[test]
fn wrong_options_are_named() {
    let driver = Qcow2Driver::new();
    driver.check(&options(serde_json::json!({}))).unwrap();
    driver.check(&options(serde_json::json!({ "cache-size": "4MiB", "backing": null }))).unwrap();
    for (given, word) in [
        (serde_json::json!({ "cache-size": "much" }), "much"),
        (
            serde_json::json!({ "cache-size": 5, "l2-cache-size": 6 }),
            "l2-cache-size may not exceed cache-size",
        ),
        (serde_json::json!({ "lazy-refcounts": 1 }), "lazy-refcounts"),
        (serde_json::json!({ "overlap-check": { "template": "all", "l1": true } }), "overlap-check.l1"),
        (serde_json::json!({ "encrypt": { "format": "luks" } }), "No encryption in image header"),
        (serde_json::json!({ "cache_size": 1 << 20 }), "cache_size"),
    ] {
        let error = driver.check(&options(given)).unwrap_err();
        assert!(error.kind() == Kind::Invalid && error.to_string().contains(word), "{error}");
    }
}

#[test]
fn the_backing_file_of_the_header_is_a_child() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("raw.img"), [0; 512]).unwrap();
    std::fs::write(at("probed.img"), b"QFI\xfb and more").unwrap();
    let implied = |name: &str, format: &str, path: Option<&Path>, given: serde_json::Value| {
        let backing = Some((name.to_owned(), format.to_owned()));
        let leaf = leaf(image(&CreateOptions { backing, ..CreateOptions::new(1 << 20) }));
        let children = [file_child(&leaf, path)];
        block_on(Qcow2Driver::new().implied_children(&options(given), &children))
    };
    let own = at("top.qcow2");
    let absolute = at("raw.img").to_str().unwrap().to_owned();
    for (name, format, driver, path) in [
        ("raw.img", "", "raw", "raw.img"),
        ("probed.img", "", "qcow2", "probed.img"),
        ("raw.img", "qcow2", "qcow2", "raw.img"),
        ("file:raw.img", "raw", "raw", "raw.img"),
        ("sub:dir/../raw.img", "raw", "", ""),
        (&absolute, "raw", "raw", "raw.img"),
        ("gone.img", "raw", "raw", "gone.img"),
    ] {
        let found = implied(name, format, Some(&own), serde_json::json!({}));
        if driver.is_empty() {
            assert_eq!(found.unwrap_err().option(), Some("backing"));
            continue;
        }
        let found = found.unwrap();
        assert_eq!((found.len(), &*found[0].name), (1, "backing"));
        let definition = serde_json::Value::Object(found[0].definition.clone());
        assert_eq!(definition["driver"], driver);
        assert_eq!(definition["file"]["path"], at(path).to_str().unwrap());
    }
    for (name, path) in [("gone.img", Some(&*own)), ("raw.img", None), ("ssh://host/x", Some(&*own))] {
        let error = implied(name, "", path, serde_json::json!({})).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    assert!(implied("gone.img", "", None, serde_json::json!({ "backing": null })).unwrap().is_empty());
}

#[test]
fn the_node_does_what_every_writable_node_does() {
    for (seed, version, cluster_bytes, extended_l2) in
        [(1, 3, 65536, false), (2, 2, 4096, false), (3, 3, 512, false), (4, 3, 16384, true)]
    {
        let options = CreateOptions { version, cluster_bytes, extended_l2, ..CreateOptions::new(3 << 20) };
        let leaf = leaf(image(&options));
        let node =
            block_on(open_node(&Qcow2Driver::new(), serde_json::json!({}), vec![file_child(&leaf, None)]));
        block_on(check(&node.unwrap().edge, Check { seed, steps: 150, ..Check::default() }));
    }
}
