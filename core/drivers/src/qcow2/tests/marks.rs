//! The marks of an image that is not in order: dirty, and corrupt.

use super::{check::check, harness::*};
use crate::qcow2::{CreateOptions, Repair, Verdict, create_file, header::Header};
use driveline_graph::Kind;
use driveline_op::op;
use futures::executor::block_on;
use std::fs;

fn write(world: &World, offset: u64, data: &[u8]) -> driveline_op::Result<()> {
    block_on(world.ask(op::WRITE, offset, 0, 0, data.into())).result
}

#[test]
fn an_image_that_was_left_dirty_is_repaired_before_it_is_written_to() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lazy.qcow2");
    let text = path.to_str().unwrap();
    create_file(&path, &CreateOptions { lazy_refcounts: true, ..CreateOptions::new(4 << 20) }).unwrap();
    // QEMU dies while its refcounts are stale.
    let out =
        output("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 900k", "-c", "flush", "-c", "abort", text]);
    assert!(!out.status.success());
    let dirty = fs::read(&path).unwrap();
    assert_eq!(Header::parse(&dirty).unwrap().incompatible, 1);
    let (report, _) = check(dirty.clone(), Repair::Nothing);
    assert_eq!(report.verdict(), Verdict::Corrupt, "its clusters are not counted");

    let world = World::open(dirty.clone(), None, true).unwrap();
    assert_eq!(world.read(0, 900 << 10).unwrap(), [7; 900 << 10]);
    assert_eq!(world.node.details()["dirty"], true);
    assert!(world.bytes() == dirty, "a reader changes nothing");
    block_on(world.node.set_read_only(&world.children, false)).unwrap();
    let other = World::open(dirty, None, false).unwrap();
    for world in [world, other] {
        assert_eq!(world.node.details()["dirty"], false);
        assert_eq!(world.node.details()["lazy-refcounts"], true);
        write(&world, 1 << 20, &[9; 300_000]).unwrap();
        world.flush().unwrap();
        fs::write(&path, world.bytes()).unwrap();
        run("qemu-img", &["check", text]);
        assert_eq!(world.read(800 << 10, 100 << 10).unwrap(), [7; 100 << 10]);
        assert_eq!(world.read(1 << 20, 300_000).unwrap(), [9; 300_000]);
    }
}

#[test]
fn data_is_not_written_over_metadata_and_the_image_is_marked() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let text = path.to_str().unwrap();
    run("qemu-img", &["create", "-f", "qcow2", text, "4M"]);
    qemu_io(&path, &["write -P 7 0 900k".into()]);
    run("qemu-img", &["snapshot", "-c", "s", text]);
    qemu_io(&path, &["write -P 8 0 900k".into()]);
    let good = fs::read(&path).unwrap();
    let header = Header::parse(&good).unwrap();
    let word = |at: u64| u64::from_be_bytes(good[at as usize..at as usize + 8].try_into().unwrap());
    let l2 = word(header.l1_offset) & 0xff_ffff_ffff_0000;
    let block = word(header.reftable_offset);
    for (what, place) in [
        ("header", 0),
        ("L1", header.l1_offset),
        ("L2", l2),
        ("refcounts", block),
        ("snapshots", header.snapshots_offset),
    ] {
        let mut bytes = good.clone();
        if what == "header" {
            // Not at a cluster's beginning.
            bytes[l2 as usize + 6] ^= 2;
        } else {
            bytes[l2 as usize..l2 as usize + 8].copy_from_slice(&(place | 1 << 63).to_be_bytes());
        }
        let world = World::open(bytes.clone(), None, false).unwrap();
        write(&world, 128 << 10, &[1; 70_000]).unwrap();
        let error = write(&world, 100, &[3; 5000]).unwrap_err();
        assert_eq!(error.code(), 5, "{what}");
        // Nothing is written any more, wherever it is; what can be read is.
        let error = write(&world, 128 << 10, &[2; 70_000]).unwrap_err();
        assert_eq!(error.code(), 5, "{what}");
        assert_eq!(world.read(128 << 10, 70_000).unwrap(), [1; 70_000]);
        world.close().unwrap();
        let marked = world.bytes();
        let expected = &bytes[place as usize..][..if place == 0 { 72 } else { 4096 }];
        assert!(marked[place as usize..][..expected.len()] == *expected, "{what} was written over");
        assert_eq!(Header::parse(&marked).unwrap().incompatible, 2, "{what}");
        fs::write(&path, &marked).unwrap();
        let info = run("qemu-img", &["info", "--output=json", text]);
        assert!(info.contains("\"corrupt\": true"), "{info}");

        World::open(marked.clone(), None, true).unwrap();
        let refused = World::open(marked.clone(), None, false).err().unwrap();
        assert_eq!(refused.kind(), Kind::Corrupt, "{refused}");
        let (report, repaired) = check(marked, Repair::All);
        assert_eq!(report.verdict(), Verdict::Clean, "{what}: {report:#?}");
        fs::write(&path, &repaired).unwrap();
        run("qemu-img", &["check", text]);
        let world = World::open(repaired, None, false).unwrap();
        write(&world, 100, &[3; 5000]).unwrap();
        assert_eq!(world.read(128 << 10, 70_000).unwrap(), [1; 70_000]);
        world.close().unwrap();
        fs::write(&path, world.bytes()).unwrap();
        run("qemu-img", &["check", text]);
    }
}
