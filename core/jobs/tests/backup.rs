//! A point in time stays what it was, whatever guests write meanwhile and whatever fails; and backups of it are exact.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_drivers::{CopyBeforeWriteDriver, SnapshotAccessDriver};
use driveline_graph::{Graph, GraphOptions, Kind, NewBitmap, Options, Root, RootOptions};
use driveline_jobs::{
    BackupArgs, BackupSync, BitmapMode, Completion, JobEvent, Jobs, OnError, Perf, Runtime,
};
use driveline_op::{Ask, Buffer, flag, op, status};
use kit::{
    drivers::{World, register},
    sim::Sim,
};
use parking_lot::Mutex;
use serde_json::json;
use std::{
    collections::BTreeSet,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 9 * CLUSTER + 4096;

fn object(value: serde_json::Value) -> Options {
    value.as_object().unwrap().clone()
}

#[derive(Clone)]
struct Bench {
    sim: Sim,
    world: World,
    graph: Graph,
    jobs: Jobs,
}

impl Bench {
    /// A drive `vda` on `active`, on `base`, with a bitmap `daily` of a granularity; and an image `target`, behind a filter
    /// that fails when it is told to if that is wanted there. Else the source is behind one.
    fn new(seed: u64, faulty_target: bool, granularity: u64) -> Self {
        let sim = Sim::new(seed);
        let world = World::new(&sim);
        let graph = Graph::new(GraphOptions::default());
        register(&graph, &world);
        graph.register(Arc::new(CopyBeforeWriteDriver::default())).unwrap();
        graph.register(Arc::new(SnapshotAccessDriver::default())).unwrap();
        let jobs = Jobs::new(graph.clone(), Arc::new(sim.clone()));
        let bench = Self { sim, world, graph: graph.clone(), jobs };
        bench.sim.run(async move {
            let mut change = graph.change().await;
            let (source, behind) = if faulty_target { ("pass", "fault") } else { ("fault", "pass") };
            let nodes = [
                json!({ "driver": "cow", "node-name": "base", "size": SIZE, "fill-every": 3, "fill-byte": 1, "read-only": true }),
                json!({ "driver": "cow", "node-name": "active", "size": SIZE, "fill-every": 5, "fill-byte": 2, "backing": "base" }),
                json!({ "driver": source, "node-name": "source", "child": "active" }),
                json!({ "driver": "cow", "node-name": "file", "size": SIZE }),
                json!({ "driver": behind, "node-name": "target", "child": "file" }),
            ];
            for node in nodes {
                change.add_node(graph.parse(object(node), &[]).unwrap()).await.unwrap();
            }
            change.set_drive("vda", "source").unwrap();
            let daily = NewBitmap { granularity: Some(granularity), ..NewBitmap::named("daily") };
            change.add_bitmap("vda", daily).unwrap();
            change.commit().await.unwrap();
        });
        bench
    }

    async fn guest(&self) -> Root {
        self.graph.open_root("vda", RootOptions::writer("a guest")).await.unwrap()
    }

    fn range(&self, longest: u64) -> Range<u64> {
        let start = self.sim.below(SIZE);
        start..(start + 1 + self.sim.below(longest)).min(SIZE)
    }

    /// Writes at random. Returns the granules that were written, and those of which that is not known.
    async fn scribble(self, guest: Root, requests: u64, granularity: u64) -> Written {
        let mut written = Written::default();
        for _ in 0..requests {
            self.sim.maybe_yield().await;
            let range = self.range(if self.sim.chance(4) { 3 * CLUSTER } else { 9000 });
            let length = range.end - range.start;
            let done = match self.sim.below(4) {
                0 => guest.write_zeroes(range.clone(), flag::MAY_UNMAP).await,
                1 => guest.discard(range.clone(), 0).await,
                _ => {
                    let byte = self.sim.below(256) as u8;
                    guest.write(range.start, &vec![byte; length as usize], 0).await
                }
            };
            let granules = range.start / granularity..range.end.div_ceil(granularity);
            match done {
                Ok(()) => written.surely.extend(granules),
                Err(_) => written.perhaps.extend(granules),
            }
        }
        written
    }

    /// Lets that many guests write. What they wrote is in `into` when `left` is 0.
    fn guests(
        &self,
        root: &Root,
        guests: usize,
        requests: u64,
        granularity: u64,
    ) -> Arc<Mutex<(usize, Written)>> {
        let all = Arc::new(Mutex::new((guests, Written::default())));
        for _ in 0..guests {
            let (bench, root, all) = (self.clone(), root.clone(), all.clone());
            self.sim.go(async move {
                let written = bench.scribble(root, requests, granularity).await;
                let mut all = all.lock();
                all.0 -= 1;
                all.1.surely.extend(written.surely);
                all.1.perhaps.extend(written.perhaps);
            });
        }
        all
    }

    async fn until_done(&self, guests: &Mutex<(usize, Written)>) {
        while guests.lock().0 > 0 {
            self.sim.sleep(Duration::from_millis(1)).await;
        }
    }

    async fn contents(&self, name: &str) -> Vec<u8> {
        let faults = self.world.faults.swap(0, SeqCst);
        let reader = self.graph.open_root(name, RootOptions::reader("a reader")).await.unwrap();
        let data = reader.read(0..SIZE).await.unwrap().to_vec();
        reader.close().await.unwrap();
        self.world.faults.store(faults, SeqCst);
        data
    }

    fn dirty(&self, granularity: u64) -> BTreeSet<u64> {
        let bitmap = self.graph.bitmap("vda", "daily").unwrap();
        assert!(!bitmap.is_busy() && !bitmap.is_frozen());
        bitmap
            .bits()
            .iter_dirty()
            .flat_map(|run| run.start / granularity..run.end.div_ceil(granularity))
            .collect()
    }
}

#[derive(Default)]
struct Written {
    surely: BTreeSet<u64>,
    perhaps: BTreeSet<u64>,
}

/// Puts a copy-before-write filter and a view of its point in time into the graph.
async fn take_snapshot(bench: &Bench, options: serde_json::Value) {
    let mut filter = object(json!({ "driver": "copy-before-write", "node-name": "cbw", "target": "target" }));
    filter.extend(object(options));
    let mut change = bench.graph.change().await;
    change.insert_filter(filter, "vda").await.unwrap();
    let view = object(json!({ "driver": "snapshot-access", "node-name": "view", "file": "cbw" }));
    change.add_node(bench.graph.parse(view, &["cbw"]).unwrap()).await.unwrap();
    change.commit().await.unwrap();
}

fn fleecing(seed: u64) {
    let faulty_target = seed.is_multiple_of(2);
    let bench = Bench::new(seed, faulty_target, 4096);
    bench.clone().sim.run(async move {
        let guest = bench.guest().await;
        bench.clone().scribble(guest.clone(), 6, 4096).await;
        let before = bench.contents("vda").await;
        let by_bitmap = seed.is_multiple_of(3);
        let breaks_snapshot = seed % 5 < 2;
        let wanted: Vec<bool> = (0..SIZE.div_ceil(CLUSTER))
            .map(|at| {
                let cluster = at * CLUSTER..((at + 1) * CLUSTER).min(SIZE);
                !by_bitmap || bench.graph.bitmap("vda", "daily").unwrap().bits().dirty_bytes_in(cluster) > 0
            })
            .collect();
        let mut options = json!({
            "on-cbw-error": if breaks_snapshot { "break-snapshot" } else { "break-guest-write" },
        });
        if by_bitmap {
            options["bitmap"] = json!({ "node": "vda", "name": "daily" });
        }
        take_snapshot(&bench, options).await;
        if !seed.is_multiple_of(4) {
            bench.world.faults.store(12, SeqCst);
        }
        let guests = bench.guests(&guest, 3, 12, 4096);
        let view = bench.graph.open_root("view", RootOptions::writer("a reader")).await.unwrap();
        let denied = Arc::new(Mutex::new(wanted.iter().map(|wanted| !wanted).collect::<Vec<bool>>()));
        let mut lost = false;
        for _ in 0..40 {
            bench.sim.maybe_yield().await;
            let range = bench.range(2 * CLUSTER);
            let (offset, length) = (range.start, range.end - range.start);
            let clusters = (offset / CLUSTER) as usize..range.end.div_ceil(CLUSTER) as usize;
            match bench.sim.below(8) {
                0 => {
                    view.discard(range.clone(), 0).await.ok();
                    let end = if range.end == SIZE { SIZE.div_ceil(CLUSTER) } else { range.end / CLUSTER };
                    let whole = offset.div_ceil(CLUSTER) as usize..end as usize;
                    denied.lock()[whole.start.min(whole.end)..whole.end].fill(true);
                }
                1 => {
                    let ask = Ask { op: op::CACHE, offset, length, ..Ask::default() };
                    let _ = view.submit(ask, Buffer::default()).await;
                }
                2 => {
                    let Ok(found) = view.block_status(range.clone()).await else { continue };
                    let data = &before[offset as usize..(offset + found.length) as usize];
                    assert!(
                        found.flags & status::ZERO == 0 || data.iter().all(|byte| *byte == 0),
                        "seed {seed}"
                    );
                }
                3 => {
                    let refused = view.write(offset, &[1], 0).await.unwrap_err();
                    assert_eq!(refused.errno_code(), 95);
                }
                _ => match view.read(range.clone()).await {
                    Ok(data) => {
                        assert!(!lost, "seed {seed}: it is lost for good");
                        assert!(
                            !denied.lock()[clusters].iter().any(|denied| *denied),
                            "seed {seed}: {range:?}"
                        );
                        let want = &before[range.start as usize..range.end as usize];
                        assert!(data[..] == *want, "seed {seed}: {range:?} differs");
                    }
                    Err(error) if error.errno_code() == 13 => {
                        let denied = denied.lock()[clusters].iter().any(|denied| *denied);
                        assert!(denied || breaks_snapshot, "seed {seed}: {range:?}");
                        lost |= !denied;
                    }
                    Err(error) => assert!(!seed.is_multiple_of(4), "seed {seed}: {error}"),
                },
            }
        }
        bench.until_done(&guests).await;
        let graph = &bench.graph;
        let mut change = graph.change().await;
        let refused = change.remove_filter("cbw").unwrap_err();
        assert_eq!(refused.kind(), Kind::Busy, "{refused}");
        drop(change);
        view.close().await.unwrap();
        let mut change = graph.change().await;
        change.remove_node("view").unwrap();
        change.remove_filter("cbw").unwrap();
        change.commit().await.unwrap();
    });
}

#[test]
fn a_point_in_time_reads_as_it_was_whatever_is_written_and_fails() {
    (0..100).for_each(fleecing);
}

const SYNCS: [(BackupSync, Option<BitmapMode>); 8] = [
    (BackupSync::Full, None),
    (BackupSync::Full, Some(BitmapMode::OnSuccess)),
    (BackupSync::Full, Some(BitmapMode::Always)),
    (BackupSync::Top, None),
    (BackupSync::Incremental, None),
    (BackupSync::Bitmap, Some(BitmapMode::OnSuccess)),
    (BackupSync::Bitmap, Some(BitmapMode::Always)),
    (BackupSync::Bitmap, Some(BitmapMode::Never)),
];

fn backup(seed: u64) {
    let granularity = [4096, CLUSTER, 4 * CLUSTER][seed as usize % 3];
    let bench = Bench::new(seed, seed.is_multiple_of(2), granularity);
    bench.clone().sim.run(async move {
        let sim = &bench.sim;
        let (sync, bitmap_mode) = SYNCS[sim.below(8) as usize];
        let has_bitmap = bitmap_mode.is_some() || sync == BackupSync::Incremental;
        let guest = bench.guest().await;
        bench.clone().scribble(guest.clone(), 3, granularity).await;
        let (before, held) = (bench.contents("vda").await, bench.dirty(granularity));
        let blank = bench.contents("target").await;
        let faults = [0, 0, 15][sim.below(3) as usize];
        bench.world.faults.store(faults, SeqCst);
        let on_error = [OnError::Report, OnError::Ignore][sim.below(2) as usize];
        let args = BackupArgs {
            job_id: Some("job".into()),
            device: "vda".into(),
            target: "target".into(),
            sync,
            bitmap: has_bitmap.then(|| "daily".into()),
            bitmap_mode,
            on_source_error: on_error,
            on_target_error: on_error,
            speed: if sim.chance(3) { 1 << 20 } else { 0 },
            // With few workers the next piece is looked for while others are in flight: once that was not let go on.
            perf: if sim.chance(2) {
                Perf { workers_max: 2, chunk_bytes_max: CLUSTER as i64, ..Perf::default() }
            } else {
                Perf::default()
            },
            manual_dismiss: true,
            ..BackupArgs::default()
        };
        let completed = Arc::new(AtomicBool::new(false));
        bench.jobs.on_event({
            let completed = completed.clone();
            move |event| {
                if let JobEvent::Completed(job) = event {
                    completed.store(job.error.is_none(), SeqCst);
                }
            }
        });
        bench.jobs.backup(args).await.unwrap();
        let guests = bench.guests(&guest, 2, 8, granularity);
        if sim.chance(3) {
            let (jobs, sim, after) = (bench.jobs.clone(), sim.clone(), sim.below(40));
            bench.sim.go(async move {
                for _ in 0..after {
                    sim.maybe_yield().await;
                }
                let _ = jobs.cancel("job", true);
            });
        }
        let ended = bench.jobs.wait("job").await.unwrap();
        let done = completed.load(SeqCst);
        assert!(!done || ended.current_progress == ended.total_progress, "seed {seed}: {ended:?}");
        bench.until_done(&guests).await;
        bench.jobs.dismiss("job").unwrap();
        let after = bench.contents("target").await;
        let copied = |granule: u64| {
            let bytes = (granule * granularity) as usize..((granule + 1) * granularity).min(SIZE) as usize;
            after[bytes.clone()] == before[bytes]
        };
        let all: BTreeSet<u64> = (0..SIZE.div_ceil(granularity)).collect();
        let wanted = if matches!(sync, BackupSync::Incremental | BackupSync::Bitmap) { &held } else { &all };
        let context = format!("seed {seed}: {sync:?} {bitmap_mode:?} {ended:?}");
        let dirty = bench.dirty(granularity);
        if done && sync != BackupSync::Top {
            assert!(wanted.iter().all(|granule| copied(*granule)), "{context}");
        }
        if done && sync == BackupSync::Top {
            for at in (0..SIZE as usize).step_by(4096) {
                let same = after[at..at + 4096] == before[at..at + 4096];
                let left = after[at..at + 4096] == blank[at..at + 4096];
                assert!(same || left, "{context}");
            }
        }
        let (_, Written { surely, perhaps }) = std::mem::take(&mut *guests.lock());
        let mut least = surely.clone();
        let mut most: BTreeSet<u64> = surely.union(&perhaps).copied().collect();
        let mode = if sync == BackupSync::Incremental { Some(BitmapMode::OnSuccess) } else { bitmap_mode };
        let forgets = match mode {
            None | Some(BitmapMode::Never) => false,
            Some(BitmapMode::OnSuccess | BitmapMode::Always) => done,
        };
        match mode {
            Some(BitmapMode::Always) if !done => {
                least.extend(wanted.iter().filter(|granule| !copied(**granule)));
                most.extend(wanted);
            }
            _ if !forgets => {
                least.extend(&held);
                most.extend(&held);
            }
            _ => {}
        }
        assert!(
            least.is_subset(&dirty),
            "{context}: lost {:?}",
            least.difference(&dirty).collect::<Vec<_>>()
        );
        assert!(
            dirty.is_subset(&most),
            "{context}: too much {:?}",
            dirty.difference(&most).collect::<Vec<_>>()
        );
        let names: Vec<_> = bench.graph.nodes().iter().map(|view| view.node.name().to_owned()).collect();
        assert!(!names.iter().any(|name| name.starts_with('#')), "{context}: {names:?}");
    });
}

#[test]
fn backups_are_exact_in_every_mode_and_so_are_bitmaps_afterwards() {
    (0..200).for_each(backup);
}

#[test]
fn backups_of_a_group_end_together_and_see_a_bitmap_that_their_own_change_adds() {
    let bench = Bench::new(7, true, 4096);
    bench.clone().sim.run(async move {
        let guest = bench.guest().await;
        guest.write(CLUSTER, &[9; 4096], 0).await.unwrap();
        let mut start = bench.jobs.begin().await;
        start.change().add_bitmap("source", NewBitmap::named("since")).unwrap();
        start.change().merge_bitmaps("source", "since", vec![("vda".into(), "daily".into())]).unwrap();
        let args = BackupArgs {
            device: "vda".into(),
            target: "target".into(),
            sync: BackupSync::Incremental,
            bitmap: Some("since".into()),
            ..BackupArgs::default()
        };
        start.backup(args.clone()).await.unwrap();
        start.make(Completion::Grouped).await.unwrap();
        let ended = bench.jobs.wait("vda").await;
        assert!(ended.is_err() || ended.is_ok_and(|job| job.error.is_none()));
        bench.sim.sleep(Duration::from_secs(1)).await;
        assert_eq!(bench.contents("target").await[CLUSTER as usize], 9);
        assert!(bench.graph.bitmap("vda", "since").unwrap().bits().is_clean());
        let refused =
            bench.jobs.backup(BackupArgs { bitmap: Some("nope".into()), ..args }).await.unwrap_err();
        assert_eq!(refused.kind(), Kind::NotFound);
        assert!(bench.jobs.list().is_empty());
        assert!(!bench.graph.bitmap("vda", "daily").unwrap().is_busy());
    });
}
