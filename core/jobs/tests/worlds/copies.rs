//! Backups in a world: what was copied is what the drive held when they began, and their bitmaps say what was not copied.

use super::{CLUSTER, Run, SECTOR, object};
use driveline_graph::RootOptions;
use driveline_jobs::{BackupArgs, BackupSync, BitmapMode, Completion, JobEvent, JobStatus, Jobs, Perf};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering::SeqCst},
};

/// Whether jobs that are over did what they were to do, by id.
#[derive(Clone, Default)]
pub(super) struct Outcomes(Arc<Mutex<BTreeMap<String, bool>>>);

impl Outcomes {
    pub(super) fn listen(jobs: &Jobs) -> Self {
        let outcomes = Self::default();
        let told = outcomes.0.clone();
        jobs.on_event(move |event| match event {
            JobEvent::Completed(job) => {
                if let Some(error) = &job.error {
                    eprintln!("{} failed: {error}", job.id);
                }
                told.lock().insert(job.id.clone(), job.error.is_none());
            }
            JobEvent::Cancelled(job) => drop(told.lock().insert(job.id.clone(), false)),
            _ => {}
        });
        outcomes
    }
}

/// A backup that runs.
pub(super) struct Copy {
    pub(super) id: String,
    /// The image, and the node that the job writes to: a filter on it that fails, sometimes.
    nodes: Vec<String>,
    sync: BackupSync,
    /// What the drive held at its moment, by sector, where that is known.
    content: Vec<Option<u8>>,
    bitmap: Option<Frozen>,
}

/// What a bitmap said at the moment of a backup.
struct Frozen {
    name: String,
    mode: BitmapMode,
    granularity: u64,
    held: BTreeSet<u64>,
}

/// A backup that is about to be started.
pub(super) struct Plan {
    nodes: Vec<serde_json::Value>,
    args: BackupArgs,
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let BackupArgs { job_id, device, sync, bitmap, bitmap_mode, .. } = &self.args;
        write!(f, "backup {job_id:?} of {device}: {sync:?} {bitmap:?} {bitmap_mode:?}")
    }
}

impl Run {
    /// Bitmaps that no job has.
    pub(super) fn free_bitmaps(&self) -> Vec<String> {
        let oracle = self.oracle.lock();
        oracle.bitmaps.iter().filter(|(_, bitmap)| !bitmap.frozen).map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn plan_backup(&mut self) -> Plan {
        let free = self.free_bitmaps();
        let (id, image) = (self.name("backup"), self.name("b"));
        let below = |end: u64| self.sim.below(end);
        let bitmap =
            (!free.is_empty() && below(3) > 0).then(|| free[below(free.len() as u64) as usize].clone());
        let modes = [BitmapMode::OnSuccess, BitmapMode::Never, BitmapMode::Always];
        let (sync, bitmap_mode) = match (&bitmap, below(4)) {
            (None, 0) => (BackupSync::Top, None),
            (None, 1) => (BackupSync::None, None),
            (None, _) => (BackupSync::Full, None),
            (Some(_), 0) => (BackupSync::Incremental, None),
            (Some(_), 1) => (BackupSync::Full, Some([modes[0], modes[2]][below(2) as usize])),
            (Some(_), _) => (BackupSync::Bitmap, Some(modes[below(3) as usize])),
        };
        let size = self.guest.info().size_bytes;
        let mut node = serde_json::json!({ "driver": "cow", "node-name": image, "size": size });
        let mut sync = sync;
        if sync == BackupSync::None {
            // Only what is written over goes there, and the moment is seen through it.
            match self.graph.chain(self.drive).unwrap()[0].name() {
                root if root.starts_with('#') => sync = BackupSync::Full,
                root => node["backing"] = root.into(),
            }
        }
        let mut nodes = vec![node];
        let mut target = image.clone();
        if below(2) == 0 {
            target = format!("{image}-fault");
            nodes.push(serde_json::json!({ "driver": "fault", "node-name": target, "child": image }));
        }
        let (on_source_error, on_target_error) = (self.policy(), self.policy());
        let args = BackupArgs {
            job_id: Some(id),
            device: self.drive.into(),
            target,
            sync,
            bitmap,
            bitmap_mode,
            on_source_error,
            on_target_error,
            speed: below(2) * 200_000,
            // Few workers: the next piece is looked for while others are in flight.
            perf: Perf { workers_max: [1, 2, 64][below(3) as usize], ..Perf::default() },
            manual_finalize: below(4) == 0,
            manual_dismiss: true,
            ..BackupArgs::default()
        };
        Plan { nodes, args }
    }

    /// Notes what must come of a backup that has begun, at a moment when no guest writes.
    pub(super) fn began(&mut self, plan: &BackupArgs) {
        let mut oracle = self.oracle.lock();
        let content = oracle.content.clone();
        let bitmap = plan.bitmap.as_ref().map(|name| {
            let expected = oracle.bitmaps.get_mut(name).unwrap();
            expected.frozen = true;
            let held = std::mem::take(&mut expected.dirty);
            let mode = plan.bitmap_mode.unwrap_or(BitmapMode::OnSuccess);
            Frozen { name: name.clone(), mode, granularity: expected.granularity, held }
        });
        let image = plan.target.trim_end_matches("-fault").to_owned();
        let mut nodes = vec![plan.target.clone()];
        if image != plan.target {
            nodes.push(image);
        }
        let id = plan.job_id.clone().unwrap();
        self.copies.push(Copy { id, nodes, sync: plan.sync, content, bitmap });
    }

    /// Backups of several drives as of one moment, while no guest writes.
    pub(super) fn start_backups(runs: &mut [&mut Run], completion: Completion) -> String {
        let plans: Vec<Plan> = runs.iter_mut().map(|run| run.plan_backup()).collect();
        let said = format!("{plans:?} ({completion:?})");
        let args: Vec<BackupArgs> = plans.iter().map(|plan| plan.args.clone()).collect();
        let (jobs, graph) = (runs[0].jobs.clone(), runs[0].graph.clone());
        let result = runs[0].sim.run(async move {
            let mut start = jobs.begin().await;
            for plan in plans {
                for node in plan.nodes {
                    let beside = ["child"].iter().filter_map(|key| node[*key].as_str().map(str::to_owned));
                    let beside: Vec<String> = beside.collect();
                    let beside: Vec<&str> = beside.iter().map(String::as_str).collect();
                    let node = graph.parse(object(node.clone()), &beside)?;
                    start.change().add_node(node).await?;
                }
                start.backup(plan.args).await?;
            }
            start.make(completion).await
        });
        if result.is_ok() {
            runs.iter_mut().zip(&args).for_each(|(run, args)| run.began(args));
        }
        format!("{said}: {result:?}")
    }

    /// Looks at backups that are over, and takes their images away.
    pub(super) fn check_copies(&mut self) {
        for copy in self.copies.iter().filter(|copy| copy.sync == BackupSync::None) {
            let status = self.jobs.get(&copy.id).map(|job| job.status);
            if status.is_ok_and(|status| [JobStatus::Running, JobStatus::Paused].contains(&status)) {
                let read = self.read_node(copy.nodes.last().unwrap());
                for (sector, found) in read.chunks(SECTOR as usize).enumerate() {
                    let is = copy.content[sector].is_none_or(|byte| found.iter().all(|found| *found == byte));
                    assert!(is, "{}: sector {sector}: {:?}, {}", copy.id, copy.content[sector], found[0]);
                }
            }
        }
        let is_over =
            |copy: &Copy| self.jobs.get(&copy.id).map_or(true, |job| job.status == JobStatus::Concluded);
        let (over, left) = std::mem::take(&mut self.copies).into_iter().partition(is_over);
        self.copies = left;
        for copy in over {
            let done = self.outcomes.0.lock()[&copy.id];
            if self.jobs.get(&copy.id).is_ok() {
                self.jobs.dismiss(&copy.id).unwrap();
                self.seen.lock().insert("dismiss".into());
            }
            self.check_copy(&copy, done);
            let (graph, nodes) = (self.graph.clone(), copy.nodes);
            let taken = self.sim.run(async move {
                let mut change = graph.change().await;
                nodes.iter().try_for_each(|node| change.remove_node(node))?;
                change.commit().await
            });
            taken.unwrap();
        }
    }

    fn check_copy(&mut self, copy: &Copy, done: bool) {
        if copy.sync == BackupSync::None {
            // What is written over is not kept any more, and who reads it would read the drive under its guest.
            return;
        }
        let read = self.read_node(copy.nodes.last().unwrap());
        let equal = |sectors: std::ops::Range<u64>| {
            sectors.into_iter().all(|sector| {
                let found = &read[(sector * SECTOR) as usize..][..SECTOR as usize];
                copy.content[sector as usize].is_none_or(|byte| found.iter().all(|found| *found == byte))
            })
        };
        let all = 0..copy.content.len() as u64;
        let by_bitmap = matches!(copy.sync, BackupSync::Incremental | BackupSync::Bitmap);
        if done && copy.sync == BackupSync::Full {
            assert!(equal(all.clone()), "{}: a full copy is what was there", copy.id);
        }
        if done && copy.sync == BackupSync::Top {
            for sector in all.clone() {
                let blank =
                    read[(sector * SECTOR) as usize..][..SECTOR as usize].iter().all(|byte| *byte == 0);
                assert!(blank || equal(sector..sector + 1), "{}: sector {sector}", copy.id);
            }
        }
        let Some(frozen) = &copy.bitmap else { return };
        let per = frozen.granularity / SECTOR;
        let copied = |granule: u64| equal(granule * per..((granule + 1) * per).min(all.end));
        if done && by_bitmap {
            assert!(
                frozen.held.iter().all(|granule| copied(*granule)),
                "{}: what was dirty is there",
                copy.id
            );
        }
        let found = self.dirty(&frozen.name, frozen.granularity);
        let mut oracle = self.oracle.lock();
        let expected = oracle.bitmaps.get_mut(&frozen.name).unwrap();
        expected.frozen = false;
        match (frozen.mode, done) {
            (BitmapMode::OnSuccess | BitmapMode::Always, true) => {}
            (BitmapMode::OnSuccess | BitmapMode::Never, _) => expected.dirty.extend(&frozen.held),
            (BitmapMode::Always, false) => {
                // What was not copied is still dirty, and nothing else that was not meant to be copied.
                let wanted: BTreeSet<u64> =
                    if by_bitmap { frozen.held.clone() } else { (0..all.end.div_ceil(per)).collect() };
                for granule in wanted {
                    assert!(copied(granule) || found.contains(&granule), "{}: lost {granule}", copy.id);
                    if found.contains(&granule) {
                        expected.dirty.insert(granule);
                    }
                }
            }
        }
    }

    fn read_node(&self, name: &str) -> Vec<u8> {
        let faults = self.world.faults.swap(0, SeqCst);
        let (graph, name) = (self.graph.clone(), name.to_owned());
        let data = self.sim.run(async move {
            let root = graph.open_root(&name, RootOptions::reader("a reader")).await.unwrap();
            let data = root.read(0..root.info().size_bytes).await.unwrap().to_vec();
            root.close().await.unwrap();
            data
        });
        self.world.faults.store(faults, SeqCst);
        data
    }

    /// Everybody writes into a new image from now on.
    pub(super) fn take_snapshot(&mut self) -> String {
        if self.graph.chain(self.drive).unwrap().len() > 6 {
            return "enough images".into();
        }
        let (name, size, drive) = (self.name("o"), self.guest.info().size_bytes, self.drive);
        let node = serde_json::json!({ "driver": "cow", "node-name": name, "size": size });
        debug_assert!(size.is_multiple_of(CLUSTER));
        let graph = self.graph.clone();
        let result = self.sim.run(async move {
            let mut change = graph.change().await;
            let overlay = change.add_node(graph.parse(object(node), &[])?).await?.name().to_owned();
            change.snapshot(drive, &overlay)?;
            change.commit().await
        });
        format!("snapshot {name}: {result:?}")
    }
}
