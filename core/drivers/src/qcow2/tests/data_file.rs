//! Images that keep their data in another file.

use super::{check::check, harness::*};
use crate::{
    conformance::{Check, check as conforms, open_node},
    qcow2::{CreateOptions, Qcow2Driver, Repair, Verdict, create_file},
};
use driveline_graph::{Driver, Kind, OpenChild};
use driveline_op::{flag, op};
use futures::executor::block_on;
use std::{fs, path::Path};

fn made(directory: &Path, raw: bool) -> (Vec<u8>, Vec<u8>, String) {
    let path = directory.join(format!("{raw}.qcow2"));
    // QEMU takes relative names as relative to where it runs.
    let name = directory.join(format!("{raw}.data")).to_str().unwrap().to_owned();
    let options = CreateOptions {
        data_file: Some(name.clone()),
        data_file_raw: raw,
        cluster_bytes: 4096,
        ..CreateOptions::new(3 << 20)
    };
    create_file(&path, &options).unwrap();
    let data = fs::read(directory.join(name)).unwrap();
    (fs::read(&path).unwrap(), data, path.to_str().unwrap().to_owned())
}

#[test]
fn images_with_a_data_file_are_made_as_qemu_understands_them() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for raw in [false, true] {
        let (image, data, path) = made(dir.path(), raw);
        assert!(data.len() == 3 << 20 && data.iter().all(|&byte| byte == 0));
        run("qemu-img", &["check", &path]);
        let info: serde_json::Value =
            serde_json::from_str(&run("qemu-img", &["info", "--output=json", &path])).unwrap();
        assert_eq!(
            info["format-specific"]["data"]["data-file"],
            dir.path().join(format!("{raw}.data")).to_str().unwrap()
        );
        assert_eq!(info["format-specific"]["data"]["data-file-raw"], raw);

        let data = leaf(data);
        let world = World::with_data(leaf(image), Some(&data), None, false, serde_json::json!({})).unwrap();
        let put =
            |at, bytes: Vec<u8>| block_on(world.ask(op::WRITE, at, 0, 0, bytes[..].into())).result.unwrap();
        put(0, pattern(1, 10_000));
        put(100_001, pattern(2, 300_000));
        world.plain(op::WRITE_ZEROES, 5000, 20_000, flag::MAY_UNMAP).unwrap();
        world.plain(op::DISCARD, 200_000, 60_000, 0).unwrap();
        block_on(world.node.resize(&world.children, 5 << 20)).unwrap();
        put((5 << 20) - 700, pattern(3, 700));
        block_on(world.node.resize(&world.children, 4 << 20)).unwrap();
        let contents = world.contents();
        assert!(contents[..5000] == pattern(1, 5000) && contents[5000..25_000] == [0; 20_000]);
        world.close().unwrap();
        let data = data.driver.data.lock().clone();
        if raw {
            assert!(
                data[..contents.len()] == contents && data.len() == 5 << 20,
                "whoever reads the data file sees the disk"
            );
            assert_eq!(world.node.details()["data-file-raw"], true);
        }
        fs::write(&path, world.bytes()).unwrap();
        fs::write(dir.path().join(format!("{raw}.data")), data).unwrap();
        run("qemu-img", &["check", &path]);
        assert_eq!(check(world.bytes(), Repair::Nothing).0.verdict(), Verdict::Clean);
        let converted = dir.path().join("converted");
        run("qemu-img", &["convert", "-O", "raw", &path, converted.to_str().unwrap()]);
        assert!(fs::read(&converted).unwrap() == contents);
        let backing = block_on(world.node.set_backing_file(&world.children, Some(("base", "raw"))));
        assert_eq!(backing.is_err(), raw);
        let error = create_file(Path::new(&path), &CreateOptions::new(512)).unwrap_err();
        assert_eq!(error.kind(), Kind::Exists);
    }
}

#[test]
fn the_data_file_of_the_header_is_a_child_and_must_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let (image, data, path) = made(dir.path(), false);
    let driver = Qcow2Driver::new();
    let children = [file_child(&leaf(image.clone()), Some(Path::new(&path)))];
    let implied = block_on(driver.implied_children(&Default::default(), &children)).unwrap();
    assert_eq!((implied.len(), &*implied[0].name), (1, "data-file"));
    let definition = serde_json::Value::Object(implied[0].definition.clone());
    assert_eq!(definition["driver"], "file");
    assert_eq!(definition["path"], dir.path().join("false.data").to_str().unwrap());

    let refused = World::open(image.clone(), None, true).err().unwrap();
    assert_eq!(refused.option(), Some("data-file"), "{refused}");
    let data = leaf(data);
    let plain = dir.path().join("plain.qcow2");
    create_file(&plain, &CreateOptions::new(1 << 20)).unwrap();
    let plain = leaf(fs::read(plain).unwrap());
    let refused = World::with_data(plain, Some(&data), None, true, serde_json::json!({})).err().unwrap();
    assert_eq!(refused.option(), Some("data-file"), "{refused}");
}

#[test]
fn a_node_with_a_data_file_does_what_every_writable_node_does() {
    let dir = tempfile::tempdir().unwrap();
    for raw in [false, true] {
        let (image, data, _) = made(dir.path(), raw);
        let file = file_child(&leaf(image), None);
        let data = OpenChild { name: "data-file".into(), ..file_child(&leaf(data), None) };
        let node = block_on(open_node(&Qcow2Driver::new(), serde_json::json!({}), vec![file, data])).unwrap();
        block_on(conforms(&node.edge, Check { seed: 4, steps: 150, ..Check::default() }));
    }
}
