//! What is written down of jobs, and what they do when they are found again.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_drivers::{CopyBeforeWriteDriver, SnapshotAccessDriver};
use driveline_graph::{Graph, GraphOptions, NewBitmap, RootOptions};
use driveline_jobs::{
    BackupArgs, BitmapMode, Completion, FoundJob, JobInfo, JobStatus, Jobs, MirrorArgs, MirrorSync, Phase,
    Restarted, Runtime, undo_half_end,
};
use kit::{
    bench::object,
    drivers::{World, register},
    notes::Notes,
    sim::Sim,
};
use serde_json::json;
use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

/// A backup's cluster.
const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 16 * CLUSTER;

/// A drive `vda` on an image `top`, which is full, and an empty image `copy`.
#[derive(Clone)]
struct Bench {
    sim: Sim,
    graph: Graph,
    jobs: Jobs,
    notes: Notes,
    world: World,
}

impl Bench {
    fn new(seed: u64) -> Self {
        let sim = Sim::new(seed);
        let graph = Graph::new(GraphOptions::default());
        let world = World::new(&sim);
        register(&graph, &world);
        graph.register(Arc::new(CopyBeforeWriteDriver::default())).unwrap();
        graph.register(Arc::new(SnapshotAccessDriver::default())).unwrap();
        let (jobs, notes) = (Jobs::new(graph.clone(), Arc::new(sim.clone())), Notes::default());
        jobs.set_journal(Arc::new(notes.clone()));
        let bench = Self { sim: sim.clone(), graph, jobs, notes, world };
        let graph = bench.graph.clone();
        sim.run(async move {
            let mut change = graph.change().await;
            let nodes = [
                json!({ "driver": "cow", "node-name": "top", "size": SIZE, "fill-every": 1, "fill-byte": 1 }),
                json!({ "driver": "cow", "node-name": "copy", "size": SIZE }),
            ];
            for node in nodes {
                change.add_node(graph.parse(object(node), &[]).unwrap()).await.unwrap();
            }
            change.set_drive("vda", "top").unwrap();
            change.commit().await.unwrap();
        });
        bench
    }

    async fn read(&self, node: &str) -> Vec<u8> {
        let root = self.graph.open_root(node, RootOptions::reader("a reader")).await.unwrap();
        let data = root.read(0..SIZE).await.unwrap().to_vec();
        root.close().await.unwrap();
        data
    }

    fn status(&self) -> JobStatus {
        self.jobs.get("j").unwrap().status
    }

    /// What would be found if the program were killed now. The job ends, and its page is gone.
    async fn kill(&self) -> FoundJob {
        let found = self.notes.found("j");
        self.jobs.cancel("j", true).unwrap();
        self.ended().await;
        self.jobs.dismiss("j").unwrap();
        found
    }

    async fn restart(&self, found: FoundJob) -> Restarted {
        let mut start = self.jobs.begin().await;
        let restarted = start.restart(found, false).await.unwrap();
        start.make(Completion::Individual).await.unwrap();
        restarted
    }

    async fn ended(&self) -> JobInfo {
        self.jobs.wait("j").await.unwrap()
    }
}

fn backup() -> BackupArgs {
    BackupArgs {
        job_id: Some("j".into()),
        device: "vda".into(),
        target: "copy".into(),
        manual_dismiss: true,
        ..BackupArgs::default()
    }
}

/// The source gave up a cluster as soon as the target had it; killed before the next flush the target did not have it any more, and
/// nobody did.
#[test]
fn a_source_gives_up_only_what_is_safe_in_the_target() {
    for seed in 0..8 {
        let bench = Bench::new(seed);
        bench.sim.clone().run(async move {
            let before = bench.read("top").await;
            let guest = bench.graph.open_root("vda", RootOptions::writer("a guest")).await.unwrap();
            let args = BackupArgs { discard_source: true, speed: 512 << 10, ..backup() };
            bench.jobs.backup(args).await.unwrap();
            let mut written = Vec::new();
            while bench.status() != JobStatus::Concluded {
                bench.sim.sleep(Duration::from_millis(70)).await;
                if bench.sim.chance(4) {
                    let at = bench.sim.below(SIZE / CLUSTER);
                    guest.write(at * CLUSTER, &[7; CLUSTER as usize], 0).await.unwrap();
                    written.push(at);
                }
                if !bench.notes.has("j") {
                    continue;
                }
                let now = bench.read("top").await;
                // It is over meanwhile, perhaps.
                if !bench.notes.has("j") {
                    continue;
                }
                let safe = bench.notes.bits("j", "#copied");
                for at in (0..SIZE).step_by(CLUSTER as usize).filter(|at| !safe.is_dirty(*at)) {
                    let range = at as usize..(at + CLUSTER) as usize;
                    assert!(
                        now[range.clone()] == before[range],
                        "seed {seed}: at {at} it is nowhere for sure"
                    );
                }
            }
            assert_eq!(bench.ended().await.error, None);
            assert!(bench.read("copy").await == before, "seed {seed}");
            let after = bench.read("top").await;
            for at in 0..SIZE / CLUSTER {
                let is = if written.contains(&at) { 7 } else { 0 };
                let range = (at * CLUSTER) as usize..((at + 1) * CLUSTER) as usize;
                assert!(after[range].iter().all(|byte| *byte == is), "seed {seed}: cluster {at} is not {is}");
            }
        });
    }
}

/// The point in time that a `snapshot-access` shows begins when its node is opened. A backup of it went on with another one.
#[test]
fn a_job_on_a_point_in_time_ends_with_it() {
    let bench = Bench::new(1);
    bench.sim.clone().run(async move {
        let mut change = bench.graph.change().await;
        let notes = json!({ "driver": "cow", "node-name": "old", "size": SIZE });
        change.add_node(bench.graph.parse(object(notes), &[]).unwrap()).await.unwrap();
        let filter = json!({ "driver": "copy-before-write", "node-name": "cbw", "target": "old" });
        change.insert_filter(object(filter), "vda").await.unwrap();
        let view = json!({ "driver": "snapshot-access", "node-name": "view", "file": "cbw" });
        change.add_node(bench.graph.parse(object(view), &["cbw"]).unwrap()).await.unwrap();
        change.commit().await.unwrap();
        bench.jobs.backup(BackupArgs { device: "view".into(), speed: 512 << 10, ..backup() }).await.unwrap();
        bench.sim.sleep(Duration::from_millis(500)).await;
        let found = bench.kill().await;
        let expected = "the point in time that 'view' showed ended with the program";
        assert_eq!(bench.restart(found).await, Restarted::Lost(expected.into()));
        // Of the drive itself, which has the filter, a backup goes on.
        bench.jobs.backup(BackupArgs { speed: 512 << 10, ..backup() }).await.unwrap();
        bench.sim.sleep(Duration::from_millis(500)).await;
        let found = bench.kill().await;
        assert_eq!(bench.restart(found).await, Restarted::Staged("j".into()));
        bench.jobs.set_speed("j", 0).unwrap();
        assert_eq!(bench.ended().await.error, None);
    });
}

/// The bitmap that a mirror began with ended with the program, because it was not persistent; and the job could never go on.
#[test]
fn a_mirror_goes_on_without_the_bitmap_that_ended_with_the_program() {
    for has_looked in [true, false] {
        let bench = Bench::new(2);
        bench.sim.clone().run(async move {
            let guest = bench.graph.open_root("vda", RootOptions::writer("a guest")).await.unwrap();
            let args = MirrorArgs {
                job_id: Some("j".into()),
                device: "vda".into(),
                target: "copy".into(),
                manual_dismiss: true,
                ..MirrorArgs::default()
            };
            bench.jobs.mirror(args.clone()).await.unwrap();
            while bench.status() != JobStatus::Ready {
                bench.sim.sleep(Duration::from_millis(20)).await;
            }
            bench.jobs.cancel("j", false).unwrap();
            assert_eq!(bench.ended().await.error, None);
            bench.jobs.dismiss("j").unwrap();
            let mut change = bench.graph.change().await;
            change.add_bitmap("vda", NewBitmap::named("daily")).unwrap();
            change.commit().await.unwrap();
            guest.write(3 * CLUSTER, &[7; 12 * CLUSTER as usize], 0).await.unwrap();
            let (bitmap, bitmap_mode) = (Some("daily".into()), BitmapMode::Always);
            let sync = MirrorSync::Bitmap;
            bench
                .jobs
                .mirror(MirrorArgs { sync, bitmap, bitmap_mode, speed: 512 << 10, ..args })
                .await
                .unwrap();
            bench.sim.sleep(Duration::from_millis(500)).await;
            let mut found = bench.kill().await;
            if !has_looked {
                found.record.phase = Phase::Finding;
                found.bitmaps.iter().for_each(|found| found.bits.clear_all());
            }
            let mut change = bench.graph.change().await;
            change.remove_bitmap("vda", "daily").unwrap();
            change.commit().await.unwrap();
            assert_eq!(bench.restart(found).await, Restarted::Staged("j".into()));
            bench.jobs.set_speed("j", 0).unwrap();
            while bench.status() != JobStatus::Ready {
                bench.sim.sleep(Duration::from_millis(20)).await;
            }
            bench.jobs.cancel("j", false).unwrap();
            assert_eq!(bench.ended().await.error, None);
            assert!(bench.read("copy").await == bench.read("top").await);
        });
    }
}

/// A mirror of `vda` that takes its place as soon as it can.
async fn pivot(bench: &Bench) {
    while bench.status() != JobStatus::Ready {
        if bench.status() == JobStatus::Concluded {
            return;
        }
        bench.sim.sleep(Duration::from_millis(20)).await;
    }
    bench.jobs.complete("j").unwrap();
    bench.ended().await;
}

/// The record of a mirror said that its target had taken the drive's place before it had. Killed in between, the drive came back on
/// its source, its user was told to change that, and what guests had written meanwhile was gone.
#[test]
fn a_mirror_that_is_killed_at_any_step_of_its_end_loses_nothing() {
    let mut seen = Vec::new();
    for steps in 1.. {
        let bench = Bench::new(steps);
        let (phase, shown, is_over) = bench.sim.clone().run(async move {
            let guest = bench.graph.open_root("vda", RootOptions::writer("a guest")).await.unwrap();
            bench.notes.stop_after(steps);
            let args = MirrorArgs {
                job_id: Some("j".into()),
                device: "vda".into(),
                target: "copy".into(),
                manual_dismiss: true,
                ..MirrorArgs::default()
            };
            bench.jobs.mirror(args).await.unwrap();
            pivot(&bench).await;
            let is_over = !bench.notes.has_stopped();
            if !bench.notes.has("j") {
                assert_eq!(&*bench.graph.drives()[0].format, "copy");
                return (None, String::new(), is_over);
            }
            let found = bench.notes.found("j");
            let (again, phase) = (bench.notes.found("j"), found.record.phase);
            bench.jobs.dismiss("j").unwrap();
            bench.notes.go_on();
            let shown = bench.graph.drives()[0].format.to_string();
            let mut start = bench.jobs.begin().await;
            let restarted = start.restart(found, false).await;
            start.give_up().await;
            let expected = match (phase, &*shown) {
                (Phase::Pivoting, "top") => {
                    let error = restarted.clone().unwrap_err().to_string();
                    assert!(error.contains("was about to take the place of"), "{error}");
                    // Served without the job, as it is undecided.
                    guest.write(0, &[9; CLUSTER as usize], 0).await.unwrap();
                    None
                }
                (Phase::Pivoting, _) => {
                    let Restarted::Finished(text) = restarted.unwrap() else { panic!("it is over") };
                    assert!(text.ends_with("took the place of what 'vda' showed"), "{text}");
                    return (Some(phase), shown, is_over);
                }
                (Phase::Starting, _) => Some("it had not begun when the program ended"),
                (Phase::Cancelled, _) => Some("it had been cancelled, or had failed"),
                _ => None,
            };
            match expected {
                Some(text) => assert_eq!(restarted.unwrap(), Restarted::Lost(text.into())),
                None => {
                    let mut start = bench.jobs.begin().await;
                    assert_eq!(start.restart(again, true).await.unwrap(), Restarted::Staged("j".into()));
                    start.make(Completion::Individual).await.unwrap();
                    guest.write(3 * CLUSTER, &[8; CLUSTER as usize], 0).await.unwrap();
                    pivot(&bench).await;
                    assert_eq!(&*bench.graph.drives()[0].format, "copy");
                    assert!(bench.read("copy").await == bench.read("top").await, "killed after {steps}");
                }
            }
            (Some(phase), shown, is_over)
        });
        seen.push((phase, shown));
        if is_over {
            break;
        }
    }
    for expected in [(Some(Phase::Working), "top"), (Some(Phase::Pivoting), "top")] {
        assert!(seen.iter().any(|(phase, shown)| (*phase, &**shown) == expected), "{seen:?}");
    }
}

/// Jobs that end together say that they do one after the other. Killed between two of them, one was told to have finished and the
/// other was given up, though neither had.
#[test]
fn of_jobs_that_end_together_none_has_ended_while_one_is_at_work() {
    let bench = Bench::new(3);
    bench.sim.clone().run(async move {
        bench.jobs.backup(BackupArgs { speed: 512 << 10, ..backup() }).await.unwrap();
        bench.sim.sleep(Duration::from_millis(500)).await;
        let group = |phases: [Phase; 2]| {
            let mut group = phases.map(|phase| {
                let mut found = bench.notes.found("j");
                found.record.phase = phase;
                found
            });
            undo_half_end(&mut group);
            group.map(|found| found.record.phase)
        };
        let working = [Phase::Working; 2];
        assert_eq!(group([Phase::Completed, Phase::Working]), working);
        assert_eq!(group([Phase::Working, Phase::Pivoting]), working);
        for as_it_is in
            [[Phase::Completed; 2], [Phase::Cancelled, Phase::Working], [Phase::Completed, Phase::Cancelled]]
        {
            assert_eq!(group(as_it_is), as_it_is);
        }
        bench.jobs.cancel("j", true).unwrap();
        bench.ended().await;
    });
}

/// A disk says once that it has lost something. The flush that saves the progress was the one that heard it, and told nobody: the job ended
/// well, and the bitmap was cleared.
#[test]
fn a_flush_that_saves_the_progress_and_fails_is_decided_about_as_any_other() {
    for mirrors in [false, true] {
        let bench = Bench::new(5);
        bench.sim.clone().run(async move {
            let mut change = bench.graph.change().await;
            let fault = json!({ "driver": "fault", "node-name": "copy-fault" });
            change.insert_filter(object(fault), "copy").await.unwrap();
            change.add_bitmap("vda", NewBitmap::named("daily")).unwrap();
            change.commit().await.unwrap();
            let guest = bench.graph.open_root("vda", RootOptions::writer("a guest")).await.unwrap();
            guest.write(0, &[7; CLUSTER as usize], 0).await.unwrap();
            let (target, speed) = ("copy-fault".to_owned(), 256 << 10);
            let (bitmap, bitmap_mode) = (Some("daily".to_owned()), Some(BitmapMode::OnSuccess));
            if mirrors {
                let args = MirrorArgs {
                    job_id: Some("j".into()),
                    device: "vda".into(),
                    target,
                    sync: MirrorSync::Full,
                    speed,
                    manual_dismiss: true,
                    ..MirrorArgs::default()
                };
                bench.jobs.mirror(args).await.unwrap();
            } else {
                bench
                    .jobs
                    .backup(BackupArgs { target, speed, bitmap, bitmap_mode, ..backup() })
                    .await
                    .unwrap();
            }
            bench.sim.sleep(Duration::from_millis(500)).await;
            bench.world.flush_fault.store(true, SeqCst);
            bench.sim.sleep(Duration::from_millis(1500)).await;
            bench.world.flush_fault.store(false, SeqCst);
            if bench.status() != JobStatus::Concluded {
                bench.jobs.set_speed("j", 0).unwrap();
                bench.sim.sleep(Duration::from_millis(500)).await;
                if mirrors && bench.status() == JobStatus::Ready {
                    bench.jobs.complete("j").unwrap();
                }
            }
            let error = bench.ended().await.error;
            assert!(error.is_some(), "a mirror: {mirrors}; it ended as if nothing had happened");
            let dirty = bench.graph.bitmap("vda", "daily").unwrap().bits().dirty_bytes();
            assert_eq!(dirty, CLUSTER, "a mirror: {mirrors}");
            guest.close().await.unwrap();
        });
    }
}
