//! Mirrors: what is on the target when, and what becomes of the drive and its bitmaps.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_graph::{Kind, Options, Result, RootOptions};
use driveline_jobs::{
    BackupArgs, BackupSync, BitmapMode, Completion, CopyMode, JobStatus, MirrorArgs, MirrorSync, OnError,
    Runtime,
};
use driveline_op::{Ask, Buffer, op};
use kit::{
    bench::{Bench, SIZE, object},
    drivers::CLUSTER,
};
use std::{sync::atomic::Ordering::SeqCst, time::Duration};

fn mirror(drive: &str, target: &str) -> MirrorArgs {
    MirrorArgs {
        job_id: Some(format!("mirror-{drive}")),
        device: format!("drive-{drive}"),
        target: target.into(),
        granularity: Some(512),
        manual_dismiss: true,
        ..MirrorArgs::default()
    }
}

fn start(bench: &Bench, args: MirrorArgs) -> Result<Vec<String>> {
    bench.start(Completion::Individual, |start| Box::pin(start.mirror(args)))
}

#[test]
fn a_completed_mirror_takes_the_drives_place_and_the_bitmap_follows() {
    for seed in 0..10 {
        let bench = Bench::new(seed);
        bench.image("copy");
        let (guest, bitmap) = (bench.root("drive-a"), bench.graph.bitmap("drive-a", "daily").unwrap());
        start(&bench, mirror("a", "copy")).unwrap();
        bench.write(&guest, 5 * 512, vec![77; 512]);
        bench.until("mirror-a", JobStatus::Ready);
        bench.write(&guest, 2 * CLUSTER, vec![78; 1024]);
        bench.jobs.complete("mirror-a").unwrap();
        assert_eq!(bench.wait("mirror-a"), None);
        let before = bench.read("a2");
        assert_eq!(bench.read("drive-a"), before);
        bench.write(&guest, 0, vec![79; 512]);
        assert_eq!(bench.chain("drive-a"), "copy");
        assert_eq!(bench.read("a2"), before, "the source does not follow");
        assert_eq!(bench.graph.bitmap("drive-a", "daily").unwrap().id(), bitmap.id());
        let dirty: Vec<_> = bitmap.bits().iter_dirty().collect();
        assert_eq!(dirty, [0..CLUSTER, 2 * CLUSTER..3 * CLUSTER]);
        bench.check_clean();
    }
}

#[test]
fn a_soft_cancel_of_a_ready_mirror_leaves_a_whole_copy_and_a_forced_one_leaves_the_drive() {
    for seed in 0..10 {
        for force in [false, true] {
            let bench = Bench::new(seed);
            bench.image("copy");
            let guest = bench.root("drive-a");
            start(&bench, mirror("a", "copy")).unwrap();
            bench.until("mirror-a", JobStatus::Ready);
            bench.write(&guest, 7 * 512, vec![77; 2048]);
            bench.jobs.cancel("mirror-a", force).unwrap();
            let error = bench.wait("mirror-a");
            assert_eq!(error.as_deref(), force.then_some("Operation canceled"));
            let events = bench.events.lock().clone();
            let said = if force { "mirror-a CANCELLED" } else { "mirror-a COMPLETED false" };
            assert!(events.contains(&said.to_owned()), "{events:?}");
            assert_eq!(bench.chain("drive-a"), "a2 a1 a0");
            if !force {
                assert_eq!(bench.read("copy"), bench.read("drive-a"));
            }
            bench.check_clean();
        }
    }
}

#[test]
fn when_it_is_actively_synced_an_answered_write_is_on_both() {
    for seed in 0..10 {
        let bench = Bench::new(seed);
        bench.image("copy");
        let guest = bench.root("drive-a");
        start(&bench, MirrorArgs { copy_mode: CopyMode::WriteBlocking, ..mirror("a", "copy") }).unwrap();
        bench.until("mirror-a", JobStatus::Ready);
        let synced = || bench.jobs.get("mirror-a").unwrap().actively_synced;
        assert_eq!(synced(), Some(true));
        for at in 0..10 {
            bench.write(&guest, at * 1536, vec![100 + at as u8; 1024]);
            assert_eq!(bench.read("copy"), bench.read("a2"));
            let dirty = bench.graph.bitmap("a2", "#mirror-mirror-a").unwrap();
            assert!(dirty.bits().is_clean(), "nothing is left for the job");
        }
        let (jobs, sim) = (bench.jobs.clone(), bench.sim.clone());
        sim.run(async move { jobs.set_copy_mode("mirror-a", CopyMode::Background).await.unwrap() });
        assert_eq!(synced(), Some(false));
        bench.write(&guest, 0, vec![5; 512]);
        bench.jobs.complete("mirror-a").unwrap();
        assert_eq!(bench.wait("mirror-a"), None);
        assert_eq!(bench.read("drive-a"), bench.read("a2"));
        bench.check_clean();
    }
}

/// A quorum repairs a child under a mirror of that child: for who reads the quorum nothing changes, for the mirror it does. The
/// repair went past the target.
#[test]
fn what_is_unchanged_only_from_a_node_above_is_on_both_as_well() {
    let bench = Bench::new(3);
    bench.image("copy");
    let guest = bench.root("drive-a");
    start(&bench, MirrorArgs { copy_mode: CopyMode::WriteBlocking, ..mirror("a", "copy") }).unwrap();
    bench.until("mirror-a", JobStatus::Ready);
    bench.jobs.set_speed("mirror-a", 1).unwrap();
    let elsewhere = u64::MAX;
    for (scope, copied) in [(0, false), (elsewhere, true)] {
        let (guest, flags) = (guest.clone(), driveline_op::flag::UNCHANGED);
        let ask = Ask { op: op::WRITE, flags, scope, ..Ask::default() };
        bench.sim.run(async move { guest.submit(ask, Buffer::from(&[42; 512][..])).await.result.unwrap() });
        assert_eq!(bench.read("copy")[..512] == [42; 512], copied, "scope {scope}");
        let dirty = bench.graph.bitmap("a2", "#mirror-mirror-a").unwrap();
        assert!(dirty.bits().is_clean(), "scope {scope}");
    }
    bench.jobs.cancel("mirror-a", true).unwrap();
    bench.wait("mirror-a");
}

#[test]
fn a_target_that_fails_does_not_fail_the_guest() {
    let bench = Bench::new(5);
    bench.image("copy");
    bench.fault_above("copy");
    let guest = bench.root("drive-a");
    let args = MirrorArgs {
        copy_mode: CopyMode::WriteBlocking,
        on_target_error: OnError::Stop,
        ..mirror("a", "copy-fault")
    };
    start(&bench, args).unwrap();
    bench.until("mirror-a", JobStatus::Ready);
    bench.world.faults.store(1, SeqCst);
    bench.write(&guest, 0, vec![9; 512]);
    bench.until("mirror-a", JobStatus::Standby);
    let info = bench.jobs.get("mirror-a").unwrap();
    assert_eq!((info.actively_synced, info.io_status.name()), (Some(false), "failed"));
    bench.world.faults.store(0, SeqCst);
    bench.jobs.resume("mirror-a").unwrap();
    bench.until("mirror-a", JobStatus::Ready);
    assert_eq!(bench.jobs.get("mirror-a").unwrap().io_status.name(), "ok");
    bench.jobs.cancel("mirror-a", false).unwrap();
    assert_eq!(bench.wait("mirror-a"), None);
    assert_eq!(bench.read("copy"), bench.read("a2"));
}

/// A mirror to a server that hung stopped its guests as well.
#[test]
fn a_target_that_is_slow_does_not_hold_up_guests_in_the_background() {
    for seed in 0..10 {
        let bench = Bench::new(seed);
        bench.image("copy");
        bench.fault_above("copy");
        let guest = bench.root("drive-a");
        bench.world.delay_ms.store(1000, SeqCst);
        start(&bench, mirror("a", "copy-fault")).unwrap();
        bench.sleep(10);
        let begin = bench.sim.now();
        for at in 0..SIZE / CLUSTER {
            bench.write(&guest, at * CLUSTER, vec![60 + at as u8; 512]);
        }
        assert!(bench.sim.now() - begin < Duration::from_millis(500), "they waited for the target");
        bench.world.delay_ms.store(1, SeqCst);
        bench.until("mirror-a", JobStatus::Ready);
        bench.jobs.cancel("mirror-a", false).unwrap();
        assert_eq!(bench.wait("mirror-a"), None);
        assert_eq!(bench.read("copy"), bench.read("a2"));
    }
}

/// A write that had reached the source, and the target not yet, took away the mark of a discard that came between.
#[test]
fn a_discard_beside_a_write_reaches_the_target_in_write_blocking_mode() {
    for seed in 0..10 {
        let bench = Bench::new(seed);
        bench.image("copy");
        bench.fault_above("copy");
        let guest = bench.root("drive-a");
        let args = MirrorArgs { copy_mode: CopyMode::WriteBlocking, ..mirror("a", "copy-fault") };
        start(&bench, args).unwrap();
        bench.until("mirror-a", JobStatus::Ready);
        bench.world.delay_ms.store(20, SeqCst);
        let writer = guest.clone();
        bench.sim.go(async move { writer.write(0, &[9; CLUSTER as usize], 0).await.unwrap() });
        bench.sleep(5);
        let (discarder, sim) = (guest.clone(), bench.sim.clone());
        sim.run(async move { discarder.discard(0..CLUSTER, 0).await.unwrap() });
        bench.sleep(200);
        bench.jobs.cancel("mirror-a", false).unwrap();
        assert_eq!(bench.wait("mirror-a"), None);
        assert_eq!(bench.read("a2")[..CLUSTER as usize], [0; CLUSTER as usize]);
        assert_eq!(bench.read("copy"), bench.read("a2"));
    }
}

/// A piece that guests did not have to wait for was still on its way to the target when their writes began to go there.
#[test]
fn pieces_of_background_mode_are_over_when_writes_are_blocking() {
    for seed in 0..20 {
        let bench = Bench::new(seed);
        bench.image("copy");
        bench.fault_above("copy");
        let guest = bench.root("drive-a");
        bench.world.delay_ms.store(50, SeqCst);
        start(&bench, mirror("a", "copy-fault")).unwrap();
        bench.sleep(10);
        let (jobs, sim) = (bench.jobs.clone(), bench.sim.clone());
        sim.run(async move { jobs.set_copy_mode("mirror-a", CopyMode::WriteBlocking).await.unwrap() });
        bench.world.delay_ms.store(seed % 3, SeqCst);
        bench.write(&guest, 0, vec![8; 4 * CLUSTER as usize]);
        bench.until("mirror-a", JobStatus::Ready);
        bench.sleep(100);
        assert_eq!(bench.read("copy"), bench.read("a2"));
    }
}

#[test]
fn a_bitmap_says_what_is_copied_and_then_what_is_missing() {
    for seed in 0..10 {
        for mode in [BitmapMode::OnSuccess, BitmapMode::Never, BitmapMode::Always] {
            let bench = Bench::new(seed);
            bench.image("copy");
            let guest = bench.root("drive-a");
            // A full copy, and a clean bitmap at the same moment: nobody writes.
            start(&bench, MirrorArgs { job_id: Some("full".into()), ..mirror("a", "copy") }).unwrap();
            bench.until("full", JobStatus::Ready);
            bench.jobs.cancel("full", false).unwrap();
            bench.wait("full");
            assert_eq!(bench.dirty("drive-a"), 0);
            bench.write(&guest, CLUSTER, vec![40; CLUSTER as usize]);
            bench.write(&guest, 9 * CLUSTER, vec![41; 512]);

            let by_bitmap = MirrorArgs {
                sync: MirrorSync::Bitmap,
                bitmap: Some("daily".into()),
                bitmap_mode: mode,
                speed: 1,
                ..mirror("a", "copy")
            };
            // Cancelled when it has not done all, it says what is missing only if that is wanted.
            start(&bench, by_bitmap.clone()).unwrap();
            bench.write(&guest, 3 * CLUSTER, vec![42; 512]);
            bench.jobs.cancel("mirror-a", true).unwrap();
            bench.wait("mirror-a");
            bench.jobs.dismiss("mirror-a").unwrap();
            bench.sleep(10);
            let bitmap = bench.graph.bitmap("drive-a", "daily").unwrap();
            let (here, there) = (bench.read("a2"), bench.read("copy"));
            for at in 0..SIZE {
                assert!(
                    here[at as usize] == there[at as usize] || bitmap.bits().is_dirty(at),
                    "{mode:?} forgets {at}"
                );
            }
            if mode != BitmapMode::Always {
                assert_eq!(bench.dirty("drive-a"), 3 * CLUSTER, "{mode:?}");
            }

            start(&bench, MirrorArgs { speed: 0, ..by_bitmap }).unwrap();
            bench.until("mirror-a", JobStatus::Ready);
            let info = bench.jobs.get("mirror-a").unwrap();
            assert!(info.total_progress <= 3 * CLUSTER, "{} bytes are copied", info.total_progress);
            assert!(bitmap.is_busy());
            bench.write(&guest, 12 * CLUSTER, vec![43; 512]);
            bench.jobs.cancel("mirror-a", false).unwrap();
            assert_eq!(bench.wait("mirror-a"), None);
            assert_eq!(bench.read("copy"), bench.read("drive-a"));
            let left = if mode == BitmapMode::Never { 4 * CLUSTER } else { 0 };
            assert_eq!(bench.dirty("drive-a"), left, "{mode:?}");
            bench.check_clean();
        }
    }
}

/// A backup took the mirror's own bitmap for its `incremental`, and cleared it: the mirror completed with next to nothing copied.
#[test]
fn nobody_takes_a_mirrors_own_bitmap() {
    let bench = Bench::new(3);
    bench.image("copy");
    bench.image("other");
    let guest = bench.root("drive-a");
    start(&bench, MirrorArgs { speed: 1, ..mirror("a", "copy") }).unwrap();
    let own = bench.graph.bitmap("a2", "#mirror-mirror-a").unwrap();
    assert_eq!(own.users(), ["job 'mirror-a'"]);
    let backup = |bitmap_mode| BackupArgs {
        job_id: Some("backup".into()),
        device: "drive-a".into(),
        target: "other".into(),
        sync: BackupSync::Bitmap,
        bitmap: Some("#mirror-mirror-a".into()),
        bitmap_mode: Some(bitmap_mode),
        ..BackupArgs::default()
    };
    for mode in [BitmapMode::OnSuccess, BitmapMode::Never, BitmapMode::Always] {
        let args = backup(mode);
        let refused = bench.start(Completion::Individual, |start| Box::pin(start.backup(args)));
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("in use by job 'mirror-a'"), "{mode:?}: {refused}");
    }
    let by_own = MirrorArgs {
        job_id: Some("second".into()),
        sync: MirrorSync::Bitmap,
        bitmap: Some("#mirror-mirror-a".into()),
        bitmap_mode: BitmapMode::Never,
        ..mirror("a", "other")
    };
    start(&bench, by_own).unwrap_err();
    bench.jobs.set_speed("mirror-a", 0).unwrap();
    bench.until("mirror-a", JobStatus::Ready);
    bench.write(&guest, 0, vec![8; 512]);
    bench.jobs.complete("mirror-a").unwrap();
    assert_eq!(bench.wait("mirror-a"), None);
    assert_eq!(bench.read("drive-a"), bench.read("a2"));
    bench.check_clean();
}

#[test]
fn with_sync_none_only_what_is_written_is_copied() {
    let bench = Bench::new(6);
    bench.image("copy");
    let guest = bench.root("drive-a");
    start(&bench, MirrorArgs { sync: MirrorSync::None, ..mirror("a", "copy") }).unwrap();
    bench.until("mirror-a", JobStatus::Ready);
    bench.write(&guest, 4 * CLUSTER, vec![9; 512]);
    bench.jobs.cancel("mirror-a", false).unwrap();
    bench.wait("mirror-a");
    // The target has no backing: a cluster of it is written as a whole.
    let (mut expected, cluster) = (vec![0; SIZE as usize], 4 * CLUSTER as usize..5 * CLUSTER as usize);
    expected[cluster.clone()].copy_from_slice(&bench.read("drive-a")[cluster]);
    assert!(bench.read("copy") == expected);
}

#[test]
fn mirrors_of_two_drives_in_a_group_pivot_in_one_moment() {
    for seed in 0..10 {
        let bench = Bench::new(seed);
        bench.image("copy-a");
        bench.image("copy-b");
        bench
            .start(Completion::Grouped, |start| {
                Box::pin(async move {
                    start.mirror(mirror("a", "copy-a")).await?;
                    start.mirror(mirror("b", "copy-b")).await
                })
            })
            .unwrap();
        bench.until("mirror-a", JobStatus::Ready);
        bench.until("mirror-b", JobStatus::Ready);
        bench.jobs.complete("mirror-a").unwrap();
        bench.until("mirror-a", JobStatus::Waiting);
        assert_eq!(bench.chain("drive-a"), "a2 a1 a0");
        if seed % 2 == 0 {
            bench.jobs.complete("mirror-b").unwrap();
            assert_eq!((bench.wait("mirror-a"), bench.wait("mirror-b")), (None, None));
            assert_eq!((bench.chain("drive-a"), bench.chain("drive-b")), ("copy-a".into(), "copy-b".into()));
        } else {
            bench.jobs.cancel("mirror-b", true).unwrap();
            bench.wait("mirror-a");
            bench.wait("mirror-b");
            assert_eq!(
                (bench.chain("drive-a"), bench.chain("drive-b")),
                ("a2 a1 a0".into(), "b2 b1 b0".into())
            );
        }
        bench.check_clean();
    }
}

#[test]
fn a_mirror_that_cannot_be_is_refused_and_what_it_uses_is_kept() {
    let bench = Bench::new(8);
    bench.image("copy");
    let refuse = |args: MirrorArgs| start(&bench, args).unwrap_err().to_string();
    assert_eq!(refuse(mirror("a", "a2")), "Can't mirror node into itself");
    assert!(refuse(mirror("a", "a1")).contains("is below 'a2'"));
    let wrong = MirrorArgs { granularity: Some(256), ..mirror("a", "copy") };
    assert_eq!(refuse(wrong), "Parameter 'granularity' expects a value in range [512B, 64MB]");
    let wrong = MirrorArgs { sync: MirrorSync::Bitmap, bitmap: Some("none".into()), ..mirror("a", "copy") };
    assert_eq!(refuse(wrong), "Bitmap 'none' could not be found");
    let wrong = MirrorArgs { replaces: Some("b2".into()), ..mirror("a", "copy") };
    assert!(refuse(wrong).contains("is not below 'a2'"));
    assert!(bench.jobs.list().is_empty());
    bench.check_clean();

    let named = MirrorArgs { filter_node_name: Some("top".into()), ..mirror("a", "copy") };
    start(&bench, named).unwrap();
    assert!(refuse(mirror("b", "copy")).contains("in use"));
    let graph = bench.graph.clone();
    bench.sim.run(async move {
        let error = graph.open_root("copy", RootOptions::writer("another")).await.unwrap_err();
        assert_eq!(error.kind(), Kind::NotPermitted);
        for node in ["top", "copy", "a2"] {
            let mut change = graph.change().await;
            assert!(change.remove_filter(node).is_err() && change.remove_node(node).is_err());
        }
        let error = graph.parse(Options::from_iter([("driver".into(), "mirror_top".into())]), &[]);
        assert!(error.is_err(), "nobody else can make one");
    });
    assert_eq!(bench.graph.node("top").unwrap().driver_name(), "mirror_top");
    bench.until("mirror-a", JobStatus::Ready);
    bench.jobs.cancel("mirror-a", true).unwrap();
    bench.wait("mirror-a");
    bench.check_clean();
}

#[test]
fn only_the_node_that_is_named_is_replaced() {
    let bench = Bench::new(9);
    bench.image("copy");
    let guest = bench.root("drive-a");
    bench.fault_above("a2");
    start(&bench, MirrorArgs { replaces: Some("a2".into()), ..mirror("a", "copy") }).unwrap();
    bench.until("mirror-a", JobStatus::Ready);
    bench.write(&guest, 0, vec![3; 512]);
    bench.jobs.complete("mirror-a").unwrap();
    assert_eq!(bench.wait("mirror-a"), None);
    assert_eq!(&*bench.graph.drives()[0].root, "a2-fault");
    assert_eq!(bench.chain("drive-a"), "copy");
    assert_eq!(bench.read("drive-a"), bench.read("a2"));
    bench.check_clean();
}

/// The program's thread that ended the job panicked, and the job stayed `pending` for ever: the target takes over that its source is
/// read-only, but nobody used either, so that a target of `drive-mirror` went in the same change.
#[test]
fn a_mirror_of_a_read_only_node_that_nobody_uses_ends() {
    let bench = Bench::new(11);
    let node = |name: &str, read_only: bool| {
        object(
            serde_json::json!({ "driver": "cow", "node-name": name, "size": SIZE, "read-only": read_only }),
        )
    };
    let (lonely, target) = (node("lonely", true), node("copy", false));
    let graph = bench.graph.clone();
    bench.sim.run(async move {
        let mut change = graph.change().await;
        change.add_node(graph.parse(lonely, &[]).unwrap()).await.unwrap();
        change.commit().await.unwrap();
    });
    let (graph, args) = (bench.graph.clone(), MirrorArgs { device: "lonely".into(), ..mirror("a", "copy") });
    bench
        .start(Completion::Individual, move |start| {
            Box::pin(async move {
                start.change().add_implicit(graph.parse(target, &[])?).await?;
                start.mirror(args).await
            })
        })
        .unwrap();
    bench.until("mirror-a", JobStatus::Ready);
    bench.jobs.complete("mirror-a").unwrap();
    assert_eq!(bench.wait("mirror-a"), None);
    bench.check_clean();
}

/// A mirror of what is below a filter did not keep a snapshot from coming in between: with `sync=top` what the image held was not
/// copied any more. And as the image on top was another then, a second mirror began, of the first one's filter, which could
/// not go when the first ended: it stayed for ever, and so did the holder.
#[test]
fn nothing_comes_between_a_mirror_and_the_image_that_it_is_of() {
    let bench = Bench::new(12);
    ["copy", "other"].iter().for_each(|name| bench.image(name));
    bench.fault_above("a2");
    start(&bench, mirror("a", "copy")).unwrap();
    bench.until("mirror-a", JobStatus::Ready);
    for node in ["drive-a", "a2"] {
        let (graph, node) = (bench.graph.clone(), node.to_owned());
        let overlay = object(serde_json::json!({ "driver": "cow", "node-name": "a3", "size": SIZE }));
        bench.sim.run(async move {
            let mut change = graph.change().await;
            change.add_node(graph.parse(overlay, &[]).unwrap()).await.unwrap();
            let refused = change.snapshot(&node, "a3").unwrap_err();
            assert_eq!(refused.kind(), Kind::Busy, "{refused}");
        });
    }
    let second = MirrorArgs { job_id: Some("second".into()), ..mirror("a", "other") };
    let refused = start(&bench, second).unwrap_err();
    assert!(refused.message().ends_with("is busy: block device is in use by job 'mirror-a'"), "{refused}");
    bench.jobs.cancel("mirror-a", true).unwrap();
    bench.wait("mirror-a");
    bench.check_clean();
}
