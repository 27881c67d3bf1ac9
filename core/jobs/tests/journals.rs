//! What is written down of jobs, and what they do when they are found again.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_drivers::{CopyBeforeWriteDriver, SnapshotAccessDriver};
use driveline_graph::{Graph, GraphOptions, NewBitmap, RootOptions};
use driveline_jobs::{
    BackupArgs, BitmapMode, Completion, FoundJob, JobInfo, JobStatus, Jobs, MirrorArgs, MirrorSync, Phase,
    Restarted, Runtime,
};
use kit::{
    bench::object,
    drivers::{World, register},
    notes::Notes,
    sim::Sim,
};
use serde_json::json;
use std::{sync::Arc, time::Duration};

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
}

impl Bench {
    fn new(seed: u64) -> Self {
        let sim = Sim::new(seed);
        let graph = Graph::new(GraphOptions::default());
        register(&graph, &World::new(&sim));
        graph.register(Arc::new(CopyBeforeWriteDriver::default())).unwrap();
        graph.register(Arc::new(SnapshotAccessDriver::default())).unwrap();
        let (jobs, notes) = (Jobs::new(graph.clone(), Arc::new(sim.clone())), Notes::default());
        jobs.set_journal(Arc::new(notes.clone()));
        let bench = Self { sim: sim.clone(), graph, jobs, notes };
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
