//! The witness: who takes it away, and who does not.

use super::*;
use crate::qcow2::create_file;
use driveline_graph::Witness;

fn set(world: &World, set: bool) -> Result<()> {
    block_on(world.node.set_witness(&world.children, set))
}

fn witness(world: &World) -> (bool, bool) {
    let Witness { at_open, set } = world.node.witness().unwrap();
    (at_open, set)
}

#[test]
fn a_writer_knows_of_the_witness_and_takes_it_away() {
    let world = World::open(image(1 << 20, 65536), None, false).unwrap();
    assert_eq!(witness(&world), (false, false));
    set(&world, true).unwrap();
    assert_eq!(witness(&world), (false, true));
    let reader = World::open(world.bytes(), None, true).unwrap();
    assert_eq!(witness(&reader), (true, true));
    says(set(&reader, false), "not permitted");
    assert!(reader.bytes() == world.bytes());
    block_on(reader.node.set_read_only(&reader.children, false)).unwrap();
    assert_eq!(witness(&reader), (true, false));
    set(&reader, true).unwrap();
    block_on(reader.node.set_read_only(&reader.children, true)).unwrap();
    let again = World::open(reader.bytes(), None, false).unwrap();
    assert_eq!(witness(&again), (true, false));
    set(&again, true).unwrap();
    set(&again, false).unwrap();
    let last = World::open(again.bytes(), None, false).unwrap();
    assert_eq!(witness(&last), (false, false));
}

/// A program that opened an image after a crash and could not start took the witness away with it: nobody could tell any more
/// that the bitmaps beside the image were exact.
#[test]
fn an_image_that_was_opened_and_not_written_keeps_its_witness() {
    let first = World::open(image(1 << 20, 65536), None, false).unwrap();
    set(&first, true).unwrap();
    let bytes = first.bytes();
    type Change = fn(&World);
    let changes: [(&str, Change); 6] = [
        ("write", |world| world.write(0, &[1; 512])),
        ("flag", |world| drop(world.store(&[kept("b", Bits::new(granularity(65536), 1 << 20))]))),
        ("resize", |world| block_on(world.node.resize(&world.children, 2 << 20)).unwrap()),
        ("backing", |world| block_on(world.node.set_backing_file(&world.children, None)).unwrap()),
        ("snapshot", |world| drop(block_on(world.node.take_snapshot(&world.children, "s")).unwrap())),
        ("no witness", |world| set(world, false).unwrap()),
    ];
    for (name, change) in changes {
        let opened = World::open(bytes.clone(), None, false).unwrap();
        assert_eq!(witness(&opened), (true, false), "{name}");
        assert!(opened.bytes() == bytes, "opening writes nothing");
        // Nor do a flush, and an end in good order.
        block_on(opened.node.set_read_only(&opened.children, true)).unwrap();
        block_on(opened.node.set_read_only(&opened.children, false)).unwrap();
        assert_eq!(witness(&opened), (true, false), "{name}");
        assert!(opened.bytes() == bytes);
        change(&opened);
        let after = World::open(opened.bytes(), None, true).unwrap();
        assert_eq!(witness(&after), (false, false), "{name}: it was changed, and nobody has recorded that");
    }
    let again = World::open(bytes.clone(), None, false).unwrap();
    set(&again, true).unwrap();
    again.write(0, &[1; 512]);
    assert_eq!(witness(&World::open(again.bytes(), None, true).unwrap()), (true, true));
}

#[test]
fn the_witness_stays_through_changes_of_ours_and_a_crash() {
    let world = World::open(image(1 << 20, 512), None, false).unwrap();
    set(&world, true).unwrap();
    world.write(0, &[1; 300_000]);
    block_on(world.node.resize(&world.children, 40 << 20)).unwrap();
    world.store(&[kept("a", Bits::new(granularity(65536), 40 << 20))]).unwrap();
    world.store(&[]).unwrap();
    let after = World::open(world.bytes(), None, false).unwrap();
    assert_eq!(witness(&after), (true, false));
}

#[test]
fn version_2_has_none() {
    let leaf = leaf(Vec::new());
    let options = CreateOptions { version: 2, ..CreateOptions::new(1 << 20) };
    block_on(create(&file_child(&leaf, None).edge, &options)).unwrap();
    let world = World::on(leaf, None, false, serde_json::json!({})).unwrap();
    assert_eq!(world.node.witness(), None);
    says(set(&world, true), "version 2");
}

#[test]
fn qemu_keeps_it_when_it_reads_and_takes_it_away_when_it_may_write() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    create_file(&path, &CreateOptions::new(1 << 20)).unwrap();
    let put = |bitmap: bool| {
        let world = open_file(&path, false);
        let bitmap = bitmap.then(|| kept("a", Bits::new(granularity(65536), 1 << 20)));
        world.store(bitmap.as_slice()).unwrap();
        set(&world, true).unwrap();
        world.close().unwrap();
        fs::write(&path, world.bytes()).unwrap();
    };
    let name = text(&path);
    for bitmap in [false, true] {
        put(bitmap);
        let raw = dir.path().join("raw");
        run("qemu-img", &["info", name]);
        run("qemu-img", &["check", name]);
        run("qemu-img", &["map", name]);
        run("qemu-img", &["compare", name, name]);
        run("qemu-img", &["convert", "-O", "raw", name, text(&raw)]);
        run("qemu-io", &["-r", "-f", "qcow2", "-c", "read 0 64k", name]);
        sums_of_qemu(&path, if bitmap { &["a"] } else { &[] });
        assert_eq!(witness(&open_file(&path, true)), (true, true));
        let writers: [(&str, &[&str]); 6] = [
            ("qemu-io", &["-f", "qcow2", "-c", "write 0 1", name]),
            ("qemu-io", &["-f", "qcow2", "-c", "read 0 1", name]),
            ("qemu-img", &["resize", "--shrink", "-f", "qcow2", name, "1M"]),
            ("qemu-img", &["snapshot", "-c", "s", name]),
            ("qemu-img", &["check", "-r", "all", name]),
            ("qemu-img", &["bitmap", "--add", name, "b"]),
        ];
        for (tool, args) in writers {
            put(bitmap);
            assert_eq!(witness(&open_file(&path, true)), (true, true));
            run(tool, args);
            assert_eq!(witness(&open_file(&path, true)), (false, false), "{tool} {args:?}");
        }
        put(bitmap);
        storage_daemon(&path, false, if bitmap { &["a"] } else { &[] });
        assert_eq!(witness(&open_file(&path, true)), (false, false));
    }
}
