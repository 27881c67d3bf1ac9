//! What stands in the way of a job's end, and what is left when it stays there.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_bitmap::{Bitmap, Ledger};
use driveline_graph::{Error, Result};
use driveline_jobs::{BackupArgs, Completion, JobRecord, Journal, OnRestart, Page};
use kit::bench::Bench;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::SeqCst},
};

/// A disk that jobs are written down on. So many writes fail.
#[derive(Clone, Debug, Default)]
struct Disk(Arc<AtomicU64>);

impl Disk {
    fn write_now(&self) -> Result<()> {
        let fails = self.0.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
        if fails { Err(Error::io(5, "writing to a disk that fails")) } else { Ok(()) }
    }
}

impl Journal for Disk {
    fn on_restart(&self, _: &str) -> OnRestart {
        OnRestart::Drop
    }
    fn begin(&self, _: &JobRecord) -> Result<Arc<dyn Page>> {
        Ok(Arc::new(self.clone()))
    }
}

impl Page for Disk {
    fn write(&self, _: &JobRecord) -> Result<()> {
        self.write_now()
    }
    fn keep(&self, _: &Bitmap) -> Result<Arc<dyn Ledger>> {
        Err(Error::io(5, "it keeps no bitmaps"))
    }
    fn remove(&self) -> Result<()> {
        self.write_now()
    }
}

/// A backup of `drive-a` that is cancelled while so many writes of what is written down of it fail.
fn cancelled_on_a_disk_with(faults: u64) -> (Bench, Option<String>) {
    let (bench, disk) = (Bench::new(1), Disk::default());
    bench.jobs.set_journal(Arc::new(disk.clone()));
    bench.image("copy");
    let args = BackupArgs {
        job_id: Some("j".into()),
        device: "drive-a".into(),
        target: "copy".into(),
        speed: 1,
        filter_node_name: Some("filter-of-j".into()),
        manual_dismiss: true,
        ..BackupArgs::default()
    };
    bench.start(Completion::Individual, move |start| Box::pin(start.backup(args))).unwrap();
    disk.0.store(faults, SeqCst);
    bench.jobs.cancel("j", true).unwrap();
    let error = bench.wait("j");
    (bench, error)
}

/// A clean-up was tried twice at once, and then never again: the job's filter stayed, and nobody was told.
#[test]
fn a_clean_up_that_fails_is_tried_again_until_what_was_in_its_way_has_passed() {
    // Each try writes, and removes when that has failed; and there are two ways to try.
    let (bench, error) = cancelled_on_a_disk_with(10);
    assert_eq!(error.as_deref(), Some("Operation canceled"));
    assert!(bench.events.lock().iter().any(|event| event == "j CANCELLED"));
    assert!(bench.graph.node("filter-of-j").is_err());
    bench.check_clean();
}

#[test]
fn a_job_whose_clean_up_failed_for_good_says_which_nodes_stay() {
    let (bench, error) = cancelled_on_a_disk_with(u64::MAX);
    let error = error.expect("it did not end well");
    for part in ["cleaning up after it failed", "a disk that fails", "its nodes stay: 'filter-of-j'"] {
        assert!(error.contains(part), "{error}");
    }
    bench.graph.node("filter-of-j").expect("it says what is so");
    let events = bench.events.lock().clone();
    assert!(events.iter().any(|event| event == "j COMPLETED true"), "{events:?}");
    assert!(!events.iter().any(|event| event == "j CANCELLED"), "it is not as if it never was: {events:?}");
    // What else there is goes on.
    let guest = bench.root("drive-a");
    bench.write(&guest, 0, vec![9; 4096]);
}
