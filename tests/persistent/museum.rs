//! Eleven ways in which other trackers of changes have lost some, or found too many. Each is a test here, or says where it is.

use super::*;
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
};

/// (1) A hypervisor did not track what was written while snapshots were consolidated: incremental backups were wrong. Here
/// the guest writes while a commit takes the drive's top image away, and a kill follows.
#[test]
fn museum_01_nothing_is_lost_while_the_graph_changes() {
    if !have("museum", &["nbdinfo"]) {
        return;
    }
    let world = layers();
    let daemon = world.start();
    let stop = Arc::new(AtomicBool::new(false));
    let count = Arc::new(AtomicU64::new(0));
    let writer = {
        let (mut guest, stop, count) = (world.guest(), stop.clone(), count.clone());
        std::thread::spawn(move || {
            while !stop.load(SeqCst) {
                let granule = count.load(SeqCst) % (SIZE / GRANULARITY);
                guest.write(granule * GRANULARITY, &[7; 512]).unwrap();
                count.fetch_add(1, SeqCst);
            }
        })
    };
    let mut qmp = daemon.qmp();
    qmp.run("block-commit", json!({ "job-id": "c", "device": "vda" }));
    qmp.wait_event("BLOCK_JOB_READY", "c");
    qmp.run("job-complete", json!({ "id": "c" }));
    qmp.wait_event("BLOCK_JOB_COMPLETED", "c");
    wait_kept_in(&world, "base.qcow2.dlbitmaps");
    stop.store(true, SeqCst);
    writer.join().unwrap();
    daemon.kill();
    let written: BTreeSet<u64> = (0..count.load(SeqCst).min(SIZE / GRANULARITY)).collect();
    let daemon = Daemon::start(world.directory.path(), &world.toml.replace("top.qcow2", "base.qcow2"));
    assert_eq!(world.dirty("daily"), written);
    drop(daemon);
}

/// (2) A disk that grew past a power of two had its changes reported in the wrong places.
#[test]
fn museum_02_a_drive_that_grows_has_its_changes_where_they_are() {
    if !have("museum", &["nbdinfo"]) {
        return;
    }
    let world = World::raw();
    let daemon = world.start();
    let mut written = world.write(&[0, 255, 511]);
    daemon.qmp().run("block_resize", json!({ "device": "vda", "size": SIZE * 2 + 4096 }));
    written.extend(512..=1024);
    written.extend(world.write(&[300, 1023]));
    assert_eq!(world.dirty("daily"), written);
    daemon.kill();
    let daemon = world.start();
    assert_eq!(world.dirty("daily"), written);
    drop(daemon);
}

// (3) A tracker ignored its committed set when it was resumed after a crash, and wiped it in a resize:
// core/store/src/tests/museum.rs. (4) A second writer found the mark in memory and did not wait until it was durable:
// core/graph/tests/kept.rs, and there.

/// (5) A checkpoint was taken while writes were in flight, and some of them were in neither of the two bitmaps. Here one
/// transaction turns from one bitmap to the next, under writes: each write is in one of them at least.
#[test]
fn museum_05_a_write_in_flight_is_in_the_old_bitmap_or_in_the_new_one() {
    if !have("museum", &["nbdinfo"]) {
        return;
    }
    let world = World::qcow2();
    let daemon = world.start();
    let mut qmp = daemon.qmp();
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..3_u64)
        .map(|number| {
            let (mut guest, stop) = (world.guest(), stop.clone());
            std::thread::spawn(move || {
                let mut written = 0;
                while !stop.load(SeqCst) && written < 150 {
                    guest.write((number * 150 + written) * GRANULARITY, &[1; 512]).unwrap();
                    written += 1;
                }
                written
            })
        })
        .collect();
    let of = |name: &str| json!({ "node": "vda", "name": name });
    let mut names = vec!["daily".to_owned()];
    for turn in 0..8 {
        let next = format!("epoch{turn}");
        let mut add = of(&next);
        add["persistent"] = json!(true);
        add["granularity"] = json!(GRANULARITY);
        let actions = json!([
            { "type": "block-dirty-bitmap-disable", "data": of(names.last().unwrap()) },
            { "type": "block-dirty-bitmap-add", "data": add },
        ]);
        qmp.run("transaction", json!({ "actions": actions }));
        names.push(next);
    }
    stop.store(true, SeqCst);
    let counts: Vec<u64> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
    daemon.kill();
    let daemon = world.start();
    let mut qmp = daemon.qmp();
    let all = json!({ "node": "vda", "target": "daily", "bitmaps": names[1..] });
    qmp.run("block-dirty-bitmap-merge", all);
    let written: BTreeSet<u64> =
        (0..3).flat_map(|n| (0..counts[n as usize]).map(move |w| n * 150 + w)).collect();
    assert_eq!(world.dirty("daily"), written);
    drop(daemon);
}

// (6) What a background job wrote counted as the guest's change: tests/real_job.rs.

/// (7) Changes before the tracker was attached, or after it was gone, were lost. Here nobody can write before the bitmaps are
/// there, and what was written without the program is noticed.
#[test]
fn museum_07_nobody_writes_before_the_bitmaps_are_there() {
    if !have("museum", &["nbdinfo"]) {
        return;
    }
    let world = World::raw();
    for turn in 0..4 {
        // Connects as early as there is a socket to connect to.
        let early = {
            let socket = world.path("vda.sock");
            std::thread::spawn(move || {
                loop {
                    if let Ok(mut guest) = Guest::try_connect(&socket, "vda") {
                        return guest.write(turn * GRANULARITY, &[1; 512]);
                    }
                    std::thread::yield_now();
                }
            })
        };
        let daemon = world.start();
        early.join().unwrap().unwrap();
        assert_eq!(world.dirty("daily"), (0..=turn).collect());
        daemon.kill();
    }
}

/// (8) What was trimmed was copied as if it were data. A trim is a change, and a backup tool sees in the same reply of the
/// same export that there is nothing to copy.
#[test]
fn museum_08_what_was_trimmed_is_dirty_and_known_to_be_nothing() {
    if !have("museum", &["nbdinfo"]) {
        return;
    }
    let world = World::qcow2();
    let daemon = world.start();
    world.write(&[1, 2]);
    daemon.qmp().run("block-dirty-bitmap-clear", json!({ "node": "vda", "name": "daily" }));
    let mut guest = world.guest();
    guest.trim(GRANULARITY, GRANULARITY as u32).unwrap();
    drop(guest);
    assert_eq!(world.dirty("daily"), BTreeSet::from([1]));
    let allocated = crate::harness::extents(&world.uri(), "base:allocation");
    let of = |offset| allocated.iter().find(|(start, length, _)| (*start..start + length).contains(&offset));
    assert_eq!(of(GRANULARITY).unwrap().2, 3, "a hole that reads as zeroes: {allocated:?}");
    assert_eq!(of(2 * GRANULARITY).unwrap().2, 0, "data");
    drop(daemon);
}

// (9) A bitmap that a dead program had in use kept the next backup from beginning: ends.rs, the test of a kill in a job.

/// (10) One disk whose bitmap was bad spoiled the backup of all disks of a machine.
#[test]
fn museum_10_a_damaged_store_costs_only_its_own_drive() {
    if !have("museum", &["nbdinfo"]) {
        return;
    }
    let mut world = World::raw();
    world.toml += "[node.second]\ndriver = \"raw\"\nfile = \"second.raw\"\n[drive.vdb]\nroot = \"second\"\n\
        bitmaps = [{ name = \"daily\", granularity = \"64KiB\", persistent = true }]\n\
        [export.vdb]\ntype = \"nbd\"\ndrive = \"vdb\"\nsocket = \"vdb.sock\"\nwritable = true\n\
        bitmaps = [\"daily\"]\n";
    fs::File::create(world.path("second.raw")).unwrap().set_len(SIZE).unwrap();
    let daemon = world.start();
    let written = world.write(&[1, 2]);
    daemon.kill();
    let damages: [fn(&mut Vec<u8>); 3] = [
        |bytes| bytes.fill(0),
        |bytes| bytes.truncate(100),
        |bytes| bytes.iter_mut().take(1 << 20).for_each(|byte| *byte = 0xa5),
    ];
    for damage in damages {
        let store = world.path("vdb.dlbitmaps");
        let mut bytes = fs::read(&store).unwrap();
        damage(&mut bytes);
        // A damaged magic is not ours to know: what is left of the name says it.
        if bytes.starts_with(&[0xa5]) {
            bytes[..8].copy_from_slice(b"DRVLSTOR");
        }
        fs::write(&store, bytes).unwrap();
        let daemon = world.start();
        assert_eq!(world.dirty("daily"), written, "the other drive's is exact");
        let uri = format!("nbd+unix:///vdb?socket={}", world.text("vdb.sock"));
        assert_eq!(
            dirty(&uri, "daily", GRANULARITY),
            all(),
            "nothing is known of it, so everything is dirty"
        );
        let found = daemon.qmp().run("x-driveline-query-recovered-bitmaps", json!({}));
        let of = |drive: &str| found.as_array().unwrap().iter().find(|found| found["node"] == drive).unwrap();
        assert_eq!((&of("vda")["verdict"], &of("vdb")["verdict"]), (&json!("exact"), &json!("all-dirty")));
        daemon.kill();
    }
}

// (11) An image was changed by a program that knew nothing of the bitmaps: ends.rs and qemu.rs, changes from outside.
