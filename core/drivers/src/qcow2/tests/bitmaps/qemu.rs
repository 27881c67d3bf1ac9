//! QEMU as referee: what it stores we load, and what we store it loads, bit by bit.

use super::*;
use crate::qcow2::create_file;
use rand::SeedableRng;

#[test]
fn what_qemu_records_is_listed_and_loaded_as_qemu_loads_it() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    for (options, size, granularities) in [
        ("cluster_size=512", "5000192", &["512", "64k", "2G"][..]),
        ("cluster_size=64k", "300M", &["512", "4k", "1M", "2G"]),
        ("cluster_size=2M", "17M", &["512", "2M"]),
    ] {
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&path), size]);
        for granularity in granularities {
            run("qemu-img", &["bitmap", "--add", "-g", granularity, text(&path), &format!("b{granularity}")]);
        }
        run("qemu-img", &["bitmap", "--add", "--disable", text(&path), "asleep"]);
        run("qemu-img", &["bitmap", "--add", text(&path), "idle"]);
        qemu_io(&path, &["write 4k 100k".into(), "write -z 4000k 9k".into(), "discard 2M 64k".into()]);
        run("qemu-img", &["bitmap", "--clear", "--disable", "--enable", text(&path), "idle"]);
        run("qemu-img", &["bitmap", "--add", text(&path), "merged", "--merge", "b512"]);
        let world = open_file(&path, true);
        let list = world.list();
        assert!(!list.outdated && list.unreadable.is_none(), "{options}: {list:?}");
        let found = list.bitmaps.iter().map(|b| {
            assert_eq!((b.in_use, &b.inconsistent), (false, &None), "{options}: {b:?}");
            let flags = if b.recording { vec!["auto".to_owned()] } else { vec![] };
            (b.name.clone(), b.granularity.unwrap().bytes(), flags)
        });
        assert_eq!(found.collect::<Vec<_>>(), info(&path), "{options}");
        let names: Vec<_> = list.bitmaps.iter().map(|b| b.name.as_str()).collect();
        let ours: Vec<_> = names.iter().map(|name| sum(&world.load(name).unwrap())).collect();
        assert_eq!(ours, sums_of_qemu(&path, &names), "{options}");
        assert!(world.load("idle").unwrap().is_clean() && world.load("asleep").unwrap().is_clean());
        assert!(world.load("merged").unwrap().is_dirty(4096));
        world.close().unwrap();
        assert!(world.bytes() == fs::read(&path).unwrap(), "{options}: reading changed the image");
        // The same, stored by us into an image of QEMU's.
        let (expected, set) = (info(&path), world.usable());
        let world = open_file(&path, false);
        world.store(&set).unwrap();
        world.close().unwrap();
        fs::write(&path, world.bytes()).unwrap();
        check(&path);
        assert_eq!((info(&path), sums_of_qemu(&path, &names)), (expected, ours), "{options}");
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn what_we_store_is_what_qemu_loads() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let mut random = StdRng::seed_from_u64(7);
    for (cluster_bytes, size) in [
        (512, 512),
        (512, 5_000_192),
        (4096, 33 << 20),
        (65536, (1 << 30) + 512),
        (65536, 40 << 40),
        (2 << 20, 3_000_320),
    ] {
        create_file(&path, &CreateOptions { cluster_bytes, ..CreateOptions::new(size) }).unwrap();
        let mut set = Vec::new();
        for shift in [9, 12, 16, 20, 31] {
            let granularity = granularity(1 << shift);
            if size >> shift > 1 << 22 {
                continue;
            }
            let full = Bits::new(granularity, size);
            full.mark(0..size);
            let almost = full.clone();
            almost.clear_range(0..granularity.bytes());
            set.extend([
                kept(&format!("empty{shift}"), Bits::new(granularity, size)),
                kept(&format!("full{shift}"), full),
                kept(&format!("almost{shift}"), almost),
                kept(&format!("random{shift}"), random_bits(&mut random, granularity, size)),
            ]);
        }
        set[0].recording = false;
        set[1].name = "ü".repeat(511);
        // Stored, replaced by others, some kept as they are, and all removed.
        for round in 0..3 {
            let context = format!("clusters of {cluster_bytes}, {size} bytes, round {round}");
            let world = open_file(&path, false);
            let mut next: Vec<_> = set.iter().map(Kept::to_store).collect();
            if round == 1 {
                next.iter_mut().step_by(2).for_each(|bitmap| bitmap.bits = None);
                next.rotate_left(3);
            } else if round == 2 {
                next.clear();
            }
            world.store_these(&next).unwrap();
            assert_eq!(world.usable().len(), next.len(), "{context}");
            world.close().unwrap();
            fs::write(&path, world.bytes()).unwrap();
            check(&path);
            let expected = next.iter().map(|bitmap| {
                let flags = if bitmap.recording { vec!["auto".to_owned()] } else { vec![] };
                (bitmap.name.to_owned(), bitmap.granularity.bytes(), flags)
            });
            assert_eq!(info(&path), expected.collect::<Vec<_>>(), "{context}");
            if !next.is_empty() {
                let names: Vec<_> = set.iter().map(|kept| kept.name.as_str()).collect();
                let sums: Vec<_> = set.iter().map(|kept| sum(&kept.bits)).collect();
                assert_eq!(sums_of_qemu(&path, &names), sums, "{context}");
                let read = open_file(&path, true);
                for kept in &set {
                    assert_eq!(read.load(&kept.name).unwrap(), kept.bits, "{context}, {}", kept.name);
                }
            }
        }
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn qemu_goes_on_where_we_stopped_and_we_where_qemu_did() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    create_file(&path, &CreateOptions::new(64 << 20)).unwrap();
    let size = 64 << 20;
    let model = Bits::new(granularity(65536), size);
    let world = open_file(&path, false);
    world.store(&[kept("daily", model.clone())]).unwrap();
    world.close().unwrap();
    fs::write(&path, world.bytes()).unwrap();
    for round in 0..3 {
        let at = round * 10_000_000;
        qemu_io(&path, &[format!("write -P 3 {at} 70000")]);
        model.mark(at..at + 70_000);
        let world = open_file(&path, false);
        let bits = world.load("daily").unwrap();
        assert_eq!(bits, model, "round {round}");
        world.write(at + 5_000_000, &[round as u8 + 1; 1000]);
        model.mark(at + 5_000_000..at + 5_001_000);
        world.store(&[kept("daily", model.clone())]).unwrap();
        world.close().unwrap();
        fs::write(&path, world.bytes()).unwrap();
        check(&path);
        assert_eq!(sums_of_qemu(&path, &["daily"]), [sum(&model)], "round {round}");
    }
}

#[test]
fn the_extension_survives_other_changes_of_the_header() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, base) = (dir.path().join("image.qcow2"), dir.path().join("base.qcow2"));
    create_file(&base, &CreateOptions::new(8 << 20)).unwrap();
    for cluster_bytes in [512, 65536] {
        let options = CreateOptions {
            cluster_bytes,
            backing: Some(("base.qcow2".into(), "qcow2".into())),
            ..CreateOptions::new(8 << 20)
        };
        create_file(&path, &options).unwrap();
        let below = open_file(&base, true);
        let world = World::open(fs::read(&path).unwrap(), Some(&below), false).unwrap();
        let bits = |size| {
            let bits = Bits::new(granularity(4096), size);
            bits.mark(9000..70_000);
            bits
        };
        world.store(&[kept("a", bits(8 << 20))]).unwrap();
        world.write(1 << 20, &[1; 300_000]);
        assert!(world.bitmap("a").in_use, "it was written to");
        block_on(world.node.set_backing_file(&world.children, Some(("other", "raw")))).unwrap();
        block_on(world.node.resize(&world.children, 40 << 20)).unwrap();
        says(world.load("a"), "resized");
        assert!(world.bitmap("a").inconsistent.is_some());
        block_on(world.node.make_empty(&world.children)).unwrap();
        block_on(world.node.set_backing_file(&world.children, None)).unwrap();
        // Nobody stored it, and the disk is larger: QEMU takes the image nevertheless.
        fs::write(&path, world.bytes()).unwrap();
        crate::qcow2::tests::crash::at_worst_leaks(&path, "not closed");
        assert_eq!(info(&path), [("a".to_owned(), 4096, vec!["in-use".to_owned(), "auto".to_owned()])]);
        world.close().unwrap();
        fs::write(&path, world.bytes()).unwrap();
        check(&path);
        let world = open_file(&path, false);
        assert!(world.bitmap("a").inconsistent.is_some());
        says(world.load("a"), "in use");
        world.store(&[kept("a", bits(40 << 20))]).unwrap();
        world.close().unwrap();
        fs::write(&path, world.bytes()).unwrap();
        check(&path);
        assert_eq!(sums_of_qemu(&path, &["a"]), [sum(&bits(40 << 20))]);
        fs::remove_file(&path).unwrap();
    }
}
