//! Every state of a job, and every verb in it.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_jobs::{Completion, CopyMode, JobStatus, MirrorArgs, StreamArgs};
use kit::bench::Bench;

const VERBS: [&str; 8] =
    ["cancel", "pause", "resume", "set-speed", "change", "complete", "finalize", "dismiss"];

/// What QEMU allows. Source: `job.c`, `JobVerbTable`; `change` as `set-speed`.
fn allows(status: JobStatus) -> &'static [&'static str] {
    use JobStatus::*;
    match status {
        Running | Paused => &["cancel", "pause", "resume", "set-speed", "change"],
        Ready | Standby => &["cancel", "pause", "resume", "set-speed", "change", "complete"],
        Waiting => &["cancel"],
        Pending => &["cancel", "finalize"],
        Concluded => &["dismiss"],
        Undefined | Created | Aborting | Null => &[],
    }
}

/// A mirror `j` in that state, in a group with a stream that is slow.
fn job_in(status: JobStatus) -> Bench {
    let bench = Bench::new(1);
    bench.image("copy");
    let alone = !matches!(status, JobStatus::Waiting);
    let args = MirrorArgs {
        job_id: Some("j".into()),
        device: "drive-a".into(),
        target: "copy".into(),
        speed: if matches!(status, JobStatus::Running | JobStatus::Paused) { 1 } else { 0 },
        manual_finalize: status == JobStatus::Pending,
        manual_dismiss: true,
        ..MirrorArgs::default()
    };
    bench
        .start(Completion::Grouped, move |start| {
            Box::pin(async move {
                if !alone {
                    let slow = StreamArgs { device: "drive-b".into(), speed: 1, ..StreamArgs::default() };
                    start.stream(slow).await?;
                }
                start.mirror(args).await
            })
        })
        .unwrap();
    match status {
        JobStatus::Running => {}
        JobStatus::Paused => bench.jobs.pause("j").unwrap(),
        JobStatus::Ready => {}
        JobStatus::Standby => {
            bench.until("j", JobStatus::Ready);
            bench.jobs.pause("j").unwrap();
        }
        _ => {
            bench.until("j", JobStatus::Ready);
            bench.jobs.complete("j").unwrap();
        }
    }
    bench.until("j", status);
    bench
}

#[test]
fn each_verb_is_taken_where_qemu_takes_it_and_the_job_ends_all_the_same() {
    use JobStatus::*;
    for status in [Running, Paused, Ready, Standby, Waiting, Pending, Concluded] {
        for verb in VERBS {
            let bench = job_in(status);
            let done = match verb {
                "cancel" => bench.jobs.cancel("j", true),
                "pause" => bench.jobs.pause("j"),
                "resume" => bench.jobs.resume("j"),
                "set-speed" => bench.jobs.set_speed("j", 0),
                "change" => {
                    let jobs = bench.jobs.clone();
                    bench.sim.run(async move { jobs.set_copy_mode("j", CopyMode::WriteBlocking).await })
                }
                "complete" => bench.jobs.complete("j"),
                "finalize" => bench.jobs.finalize("j"),
                _ => bench.jobs.dismiss("j"),
            };
            let said = done.as_ref().err().map(ToString::to_string);
            if !allows(status).contains(&verb) {
                let expected = format!("Job 'j' in state '{status}' cannot accept command verb '{verb}'");
                assert_eq!(said, Some(expected));
            } else if verb == "pause" && matches!(status, Paused | Standby) {
                assert_eq!(said.as_deref(), Some("Job is already paused"));
            } else if verb == "resume" && !matches!(status, Paused | Standby) {
                assert!(said.is_some_and(|said| said.contains("not paused")), "{status} {verb}");
            } else {
                assert_eq!(said, None, "{status} {verb}");
            }
            let jobs = bench.jobs.clone();
            bench.sim.run(async move { jobs.shutdown().await });
            bench.check_clean();
            assert_eq!(bench.dirty("drive-a") + bench.dirty("drive-b"), 0);
        }
    }
}

#[test]
fn the_states_of_a_whole_life_are_told_in_order() {
    let bench = job_in(JobStatus::Standby);
    bench.jobs.complete("j").unwrap();
    bench.jobs.resume("j").unwrap();
    bench.until("j", JobStatus::Concluded);
    bench.jobs.dismiss("j").unwrap();
    bench.sleep(10);
    let said = ["created", "running", "ready", "standby", "ready", "waiting", "pending"]
        .map(|status| format!("j {status}"))
        .into_iter()
        .chain(["j COMPLETED false".into(), "j concluded".into(), "j null".into()])
        .collect::<Vec<_>>();
    assert_eq!(*bench.events.lock(), said);
}

/// A mirror that was paused took a soft cancel, and then waited for its resume.
#[test]
fn a_job_that_is_paused_is_cancelled_by_force_alone() {
    for status in [JobStatus::Paused, JobStatus::Standby] {
        let bench = job_in(status);
        let refused = bench.jobs.cancel("j", false).unwrap_err();
        assert_eq!(refused.to_string(), "The block job for device 'j' is currently paused");
        assert_eq!(bench.status("j"), status);
        bench.jobs.cancel("j", true).unwrap();
        assert_eq!(bench.wait("j").as_deref(), Some("Operation canceled"));
        bench.check_clean();
    }
}
