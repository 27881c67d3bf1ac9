//! Faults of jobs that a reading found, each with its story.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_graph::{Kind, RootOptions};
use driveline_jobs::{
    BackupArgs, BackupSync, Base, BitmapMode, CommitArgs, Completion, IoStatus, JobStatus, MirrorArgs,
    MirrorSync, OnError, Runtime, StreamArgs,
};
use kit::{
    bench::{Bench, SIZE, object},
    drivers::CLUSTER,
};
use std::{sync::atomic::Ordering::SeqCst, time::Duration};

fn mirror(target: &str) -> MirrorArgs {
    MirrorArgs {
        job_id: Some("j".into()),
        device: "drive-a".into(),
        target: target.into(),
        manual_dismiss: true,
        ..MirrorArgs::default()
    }
}

fn backup(target: &str) -> BackupArgs {
    BackupArgs {
        job_id: Some("j".into()),
        device: "drive-a".into(),
        target: target.into(),
        manual_dismiss: true,
        ..BackupArgs::default()
    }
}

fn start_mirror(bench: &Bench, args: MirrorArgs) {
    bench.start(Completion::Individual, move |start| Box::pin(start.mirror(args))).unwrap();
}

fn start_backup(bench: &Bench, args: BackupArgs) {
    bench.start(Completion::Individual, move |start| Box::pin(start.backup(args))).unwrap();
}

/// Waits for a state, but not for ever.
fn comes_to(bench: &Bench, status: JobStatus) {
    for _ in 0..2000 {
        if bench.status("j") == status {
            return;
        }
        bench.sleep(5);
    }
    panic!("it is still {}", bench.status("j"));
}

/// Part of a granule that was copied did not make it clean, so it was copied again, for ever.
#[test]
fn a_buffer_that_is_no_whole_number_of_granules_does_not_copy_for_ever() {
    for buffer_bytes in [1, 5000, CLUSTER + 512, 3 * CLUSTER - 1] {
        let bench = Bench::new(1);
        bench.image("copy");
        start_mirror(&bench, MirrorArgs { buffer_bytes, granularity: Some(CLUSTER), ..mirror("copy") });
        comes_to(&bench, JobStatus::Ready);
        bench.jobs.cancel("j", false).unwrap();
        assert_eq!(bench.wait("j"), None);
        assert_eq!(bench.read("copy"), bench.read("a2"));
    }
}

/// A piece that failed at once was tried again at once, and nobody else got the thread.
#[test]
fn an_error_that_is_ignored_does_not_spin() {
    let bench = Bench::new(2);
    bench.image("copy");
    bench.fault_above("copy");
    bench.world.faults.store(1, SeqCst);
    start_backup(&bench, BackupArgs { on_target_error: OnError::Ignore, ..backup("copy-fault") });
    bench.sleep(200);
    assert_eq!(bench.status("j"), JobStatus::Running);
    bench.world.faults.store(0, SeqCst);
    comes_to(&bench, JobStatus::Concluded);
    assert_eq!(bench.wait("j"), None);
    assert_eq!(bench.read("copy"), bench.read("a2"));
}

/// The job takes a bit away before it copies. When another piece failed, those in flight were given up, and theirs stayed away.
#[test]
fn every_piece_that_is_given_up_is_dirty_again() {
    for seed in 0..40 {
        let bench = Bench::new(seed);
        bench.image("copy");
        bench.fault_above("copy");
        let guest = bench.root("drive-a");
        for at in 0..SIZE / CLUSTER {
            bench.write(&guest, at * CLUSTER, vec![90 + at as u8; CLUSTER as usize]);
        }
        bench.world.faults.store(6, SeqCst);
        let args = MirrorArgs {
            sync: MirrorSync::Bitmap,
            bitmap: Some("daily".into()),
            bitmap_mode: BitmapMode::Always,
            granularity: Some(512),
            buffer_bytes: 1024,
            ..mirror("copy-fault")
        };
        start_mirror(&bench, args);
        for _ in 0..2000 {
            if matches!(bench.status("j"), JobStatus::Ready | JobStatus::Concluded) {
                break;
            }
            bench.sleep(5);
        }
        let _ = bench.jobs.cancel("j", true);
        bench.wait("j");
        bench.world.faults.store(0, SeqCst);
        let (here, there) = (bench.read("a2"), bench.read("copy"));
        let bitmap = bench.graph.bitmap("drive-a", "daily").unwrap();
        for at in 0..SIZE {
            let same = here[at as usize] == there[at as usize];
            assert!(same || bitmap.bits().is_dirty(at), "seed {seed}: {at} is lost");
        }
    }
}

/// A reader of the target kept the job from taking its filter out.
#[test]
fn a_target_that_somebody_looks_at_does_not_keep_the_filter() {
    let bench = Bench::new(3);
    bench.image("copy");
    start_backup(&bench, BackupArgs { speed: 1, ..backup("copy") });
    let graph = bench.graph.clone();
    let reader =
        bench.sim.run(async move { graph.open_root("copy", RootOptions::reader("a reader")).await.unwrap() });
    bench.jobs.cancel("j", true).unwrap();
    bench.wait("j");
    bench.check_clean();
    bench.sim.run(async move { reader.close().await.unwrap() });
}

/// A stream counts its layers from the top: an image that came between them hid one from it, and was dropped at the end.
#[test]
fn a_snapshot_does_not_come_between_the_layers_of_a_stream() {
    let bench = Bench::new(4);
    let args =
        StreamArgs { job_id: Some("j".into()), device: "drive-a".into(), speed: 1, ..StreamArgs::default() };
    bench.start(Completion::Individual, move |start| Box::pin(start.stream(args))).unwrap();
    let overlay = object(serde_json::json!({ "driver": "cow", "node-name": "between", "size": SIZE }));
    let graph = bench.graph.clone();
    let refused = bench.start(Completion::Individual, move |start| {
        Box::pin(async move {
            start.change().add_node(graph.parse(overlay, &[])?).await?;
            start.change().snapshot("a1", "between")
        })
    });
    assert_eq!(refused.unwrap_err().kind(), Kind::Busy);
    assert_eq!(bench.chain("drive-a"), "a2 a1 a0");
    bench.jobs.cancel("j", true).unwrap();
    bench.wait("j");
    bench.check_clean();
}

/// What was below when the job began was put below at its end: a filter that had come was taken out, one that had gone was named.
#[test]
fn filters_on_the_base_of_a_stream_come_and_go() {
    for goes in [false, true] {
        let bench = Bench::new(5);
        if goes {
            bench.fault_above("a0");
        }
        let args = StreamArgs {
            job_id: Some("j".into()),
            device: "drive-a".into(),
            base: Some(Base::Node("a0".into())),
            speed: 1,
            manual_dismiss: true,
            ..StreamArgs::default()
        };
        bench.start(Completion::Individual, move |start| Box::pin(start.stream(args))).unwrap();
        if goes {
            let graph = bench.graph.clone();
            bench.sim.run(async move {
                let mut change = graph.change().await;
                change.remove_filter("a0-fault").unwrap();
                change.commit().await.unwrap();
            });
        } else {
            bench.fault_above("a0");
        }
        bench.jobs.set_speed("j", 0).unwrap();
        assert_eq!(bench.wait("j"), None);
        assert_eq!(bench.chain("drive-a"), "a2 a0");
        let nodes = bench.graph.nodes();
        let top = nodes.iter().find(|view| view.node.name() == "a2").unwrap();
        assert_eq!(&*top.children[0].node, if goes { "a0" } else { "a0-fault" });
        bench.check_clean();
    }
}

/// The first drive by name that reached a node was taken for the node's: one on an overlay of it, or on its past.
#[test]
fn the_drive_of_a_node_is_the_one_that_shows_it() {
    let bench = Bench::new(6);
    let overlay = serde_json::json!({ "driver": "cow", "node-name": "x", "size": SIZE, "backing": "a2", "read-only": true });
    let graph = bench.graph.clone();
    bench.sim.run(async move {
        let mut change = graph.change().await;
        change.add_node(graph.parse(object(overlay), &["a2"]).unwrap()).await.unwrap();
        change.set_drive("aaa", "x").unwrap();
        change.commit().await.unwrap();
    });
    assert_eq!(bench.graph.drive_of("a2").as_deref(), Some("drive-a"));
    assert_eq!(bench.graph.drive_of("x").as_deref(), Some("aaa"));
}

/// The end of an image in the middle hides what the base has beyond it. A stream or commit that took the image out let it show.
#[test]
fn what_the_end_of_a_short_image_hides_stays_hidden_when_the_image_goes() {
    for job in ["stream", "commit of mid", "commit of all"] {
        let bench = Bench::new(7);
        let graph = bench.graph.clone();
        bench.sim.run(async move {
            let mut change = graph.change().await;
            let nodes = [
                serde_json::json!({ "driver": "cow", "node-name": "base", "size": SIZE, "fill-every": 1,
                    "fill-byte": 1, "read-only": true }),
                serde_json::json!({ "driver": "cow", "node-name": "mid", "size": SIZE / 2, "fill-every": 3,
                    "fill-byte": 2, "backing": "base", "read-only": true }),
                serde_json::json!({ "driver": "cow", "node-name": "top", "size": SIZE, "fill-every": 5,
                    "fill-byte": 3, "backing": "mid" }),
            ];
            for node in nodes {
                change.add_node(graph.parse(object(node), &[]).unwrap()).await.unwrap();
            }
            change.set_drive("vda", "top").unwrap();
            change.commit().await.unwrap();
        });
        let before = bench.read("vda");
        let (device, manual_dismiss) = ("vda".to_owned(), true);
        let base = "base".to_owned();
        if job == "stream" {
            let base = Some(Base::Node(base));
            let args = StreamArgs { device, base, manual_dismiss, ..StreamArgs::default() };
            bench.start(Completion::Individual, move |start| Box::pin(start.stream(args))).unwrap();
        } else {
            let top_node = Some(if job == "commit of mid" { "mid" } else { "top" }.to_owned());
            let args = CommitArgs { device, top_node, manual_dismiss, ..CommitArgs::default() };
            bench.start(Completion::Individual, move |start| Box::pin(start.commit(args))).unwrap();
            if job == "commit of all" {
                bench.until("vda", JobStatus::Ready);
                bench.jobs.complete("vda").unwrap();
            }
        }
        assert_eq!(bench.wait("vda"), None, "{job}");
        assert_eq!(bench.chain("vda"), if job == "commit of all" { "base" } else { "top base" });
        assert!(bench.read("vda") == before, "{job}");
    }
}

/// A target whose backing is opened only afterwards, as libvirt does it, showed zeroes around what was copied of a cluster.
#[test]
fn a_shallow_mirror_fills_the_clusters_of_a_target_without_a_backing() {
    for sync in [MirrorSync::Top, MirrorSync::None] {
        let bench = Bench::new(8);
        let image = object(
            serde_json::json!({ "driver": "cow", "node-name": "copy", "size": SIZE, "backing": null }),
        );
        let graph = bench.graph.clone();
        let empty = bench.sim.run(async move {
            let mut change = graph.change().await;
            let top =
                serde_json::json!({ "driver": "cow", "node-name": "top", "size": SIZE, "backing": "a2" });
            change.add_node(graph.parse(object(top), &[]).unwrap()).await.unwrap();
            change.add_node(graph.parse(image, &[]).unwrap()).await.unwrap();
            change.set_drive("vda", "top").unwrap();
            change.commit().await.unwrap();
            graph.open_root("vda", RootOptions::writer("a guest")).await.unwrap()
        });
        bench.write(&empty, CLUSTER + 512, vec![7; 512]);
        let args = MirrorArgs { device: "vda".into(), sync, granularity: Some(512), ..mirror("copy") };
        start_mirror(&bench, args);
        comes_to(&bench, JobStatus::Ready);
        bench.write(&empty, 3 * CLUSTER + 512, vec![8; 512]);
        bench.write(&empty, 6 * CLUSTER, vec![9; 1024]);
        bench.jobs.cancel("j", false).unwrap();
        assert_eq!(bench.wait("j"), None);
        let graph = bench.graph.clone();
        bench.sim.run(async move {
            let mut change = graph.change().await;
            change.set_backing("copy", Some("a2"), None).unwrap();
            change.commit().await.unwrap();
        });
        let (mut here, there) = (bench.read("vda"), bench.read("copy"));
        if sync == MirrorSync::None {
            // That was there before.
            let before = CLUSTER as usize + 512..CLUSTER as usize + 1024;
            here[before.clone()].copy_from_slice(&there[before]);
        }
        assert!(here == there, "{sync:?}");
    }
}

/// The whole chain was taken out when `bottom` was a node of another one, whose base was none.
#[test]
fn the_bottom_of_a_stream_is_in_its_chain() {
    let bench = Bench::new(9);
    for bottom in ["b0", "b1"] {
        let base = Some(Base::Bottom(bottom.into()));
        let args = StreamArgs { device: "drive-a".into(), base, ..StreamArgs::default() };
        let refused = bench.start(Completion::Individual, move |start| Box::pin(start.stream(args)));
        let expected = format!("Node '{bottom}' is not in a chain starting from 'drive-a'");
        assert_eq!(refused.unwrap_err().to_string(), expected);
    }
    assert_eq!(bench.chain("drive-a"), "a2 a1 a0");
    bench.check_clean();
}

/// What a target has answered and not flushed may be lost there. The bitmap said that nothing of it is missing.
#[test]
fn a_target_that_cannot_be_flushed_leaves_all_dirty() {
    for mode in [BitmapMode::Always, BitmapMode::OnSuccess] {
        let bench = Bench::new(10);
        bench.image("copy");
        bench.fault_above("copy");
        let guest = bench.root("drive-a");
        bench.write(&guest, 3 * CLUSTER, vec![9; 2 * CLUSTER as usize]);
        let before = bench.dirty("drive-a");
        bench.world.flush_fault.store(true, SeqCst);
        let (bitmap, bitmap_mode) = (Some("daily".into()), Some(mode));
        let sync = BackupSync::Bitmap;
        start_backup(&bench, BackupArgs { sync, bitmap, bitmap_mode, ..backup("copy-fault") });
        assert!(bench.wait("j").is_some());
        assert_eq!((before, bench.dirty("drive-a")), (2 * CLUSTER, 2 * CLUSTER), "{mode:?}");
        bench.check_clean();
    }
}

/// Errors after the last guest's write of a job that waits to be finalized failed it, whatever its policy was.
#[test]
fn an_error_at_the_very_end_of_a_job_goes_by_its_policy() {
    for cancels in [false, true] {
        let bench = Bench::new(11);
        bench.image("copy");
        bench.fault_above("copy");
        let guest = bench.root("drive-a");
        let args =
            MirrorArgs { on_target_error: OnError::Stop, manual_finalize: true, ..mirror("copy-fault") };
        start_mirror(&bench, args);
        comes_to(&bench, JobStatus::Ready);
        bench.jobs.complete("j").unwrap();
        comes_to(&bench, JobStatus::Pending);
        bench.world.faults.store(1, SeqCst);
        bench.write(&guest, CLUSTER, vec![99; CLUSTER as usize]);
        bench.jobs.finalize("j").unwrap();
        bench.sleep(1000);
        let info = bench.jobs.get("j").unwrap();
        assert!(
            info.status == JobStatus::Pending && info.paused && info.io_status == IoStatus::Failed,
            "{info:?}"
        );
        if cancels {
            bench.jobs.cancel("j", true).unwrap();
            assert_eq!(bench.wait("j").as_deref(), Some("Operation canceled"));
            assert!(bench.events.lock().contains(&"j CANCELLED".to_owned()));
            assert_eq!(bench.chain("drive-a"), "a2 a1 a0");
        } else {
            bench.world.faults.store(0, SeqCst);
            bench.jobs.resume("j").unwrap();
            assert_eq!(bench.wait("j"), None);
            assert_eq!(bench.chain("drive-a"), "copy");
            assert_eq!(bench.read("drive-a")[CLUSTER as usize], 99);
        }
        bench.world.faults.store(0, SeqCst);
        bench.check_clean();
    }
}

/// The same for what is copied while guests wait, and for a flush.
#[test]
fn errors_that_are_ignored_are_so_to_the_very_end() {
    for seed in 0..30 {
        let bench = Bench::new(seed);
        bench.image("copy");
        bench.fault_above("copy");
        let guest = bench.root("drive-a");
        let args =
            MirrorArgs { on_target_error: OnError::Ignore, manual_finalize: true, ..mirror("copy-fault") };
        start_mirror(&bench, args);
        comes_to(&bench, JobStatus::Ready);
        bench.jobs.complete("j").unwrap();
        comes_to(&bench, JobStatus::Pending);
        bench.world.faults.store(12, SeqCst);
        bench.world.delay_ms.store(2, SeqCst);
        let sim = bench.sim.clone();
        bench.sim.go(async move {
            for at in 0..100 {
                let cluster = sim.below(SIZE / CLUSTER);
                let _ = guest.write(cluster * CLUSTER, &[at; CLUSTER as usize], 0).await;
                sim.sleep(Duration::from_millis(1)).await;
            }
            guest.close().await.unwrap();
        });
        bench.sleep(10);
        bench.jobs.finalize("j").unwrap();
        assert_eq!(bench.wait("j"), None, "seed {seed}");
        bench.sleep(1000);
        bench.world.faults.store(0, SeqCst);
        assert_eq!(bench.chain("drive-a"), "copy");
        bench.check_clean();
    }
}

/// A mirror's bitmap said that nothing was missing in a target that could not be flushed.
#[test]
fn a_mirror_whose_target_cannot_be_flushed_leaves_all_dirty() {
    let bench = Bench::new(12);
    bench.image("copy");
    bench.fault_above("copy");
    let guest = bench.root("drive-a");
    bench.write(&guest, 3 * CLUSTER, vec![9; 2 * CLUSTER as usize]);
    bench.world.flush_fault.store(true, SeqCst);
    let (bitmap, bitmap_mode) = (Some("daily".into()), BitmapMode::Always);
    let sync = MirrorSync::Bitmap;
    start_mirror(&bench, MirrorArgs { sync, bitmap, bitmap_mode, ..mirror("copy-fault") });
    comes_to(&bench, JobStatus::Ready);
    bench.jobs.complete("j").unwrap();
    assert!(bench.wait("j").is_some());
    assert_eq!(bench.dirty("drive-a"), 2 * CLUSTER);
    bench.check_clean();
}
