//! Jobs that start inside a change of the graph, and jobs that end together or not at all.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs, dead_code)]

mod kit;

use driveline_graph::{Kind, Root, RootOptions};
use driveline_jobs::{CommitArgs, Completion, JobKind, JobStatus, StreamArgs};
use kit::bench::{Bench, SIZE, object};
use std::sync::atomic::Ordering::SeqCst;

fn stream(drive: &str) -> StreamArgs {
    StreamArgs { device: format!("drive-{drive}"), manual_dismiss: true, ..StreamArgs::default() }
}

#[test]
fn a_start_that_is_dropped_or_fails_never_was() {
    let bench = Bench::new(1);
    let before = format!("{:?}", bench.graph.nodes());
    let error = bench.start(Completion::Grouped, |start| {
        Box::pin(async move {
            start.stream(stream("a")).await?;
            start.stream(stream("b")).await?;
            start.stream(stream("b")).await
        })
    });
    assert_eq!(error.unwrap_err().to_string(), "Job ID 'drive-b' already in use");
    let error = bench.start(Completion::Individual, |start| {
        Box::pin(async move {
            start.stream(stream("a")).await?;
            start.change().remove_bitmap("drive-b", "none")
        })
    });
    assert_eq!(error.unwrap_err().kind(), Kind::NotFound);
    assert_eq!(format!("{:?}", bench.graph.nodes()), before);
    assert!(bench.jobs.list().is_empty() && bench.events.lock().is_empty(), "nobody has heard of it");
    bench.start(Completion::Individual, |start| Box::pin(start.stream(stream("a")))).unwrap();
    assert_eq!(bench.wait("drive-a"), None, "its id and its nodes are free again");
    bench.check_clean();
}

#[test]
fn a_job_sees_the_graph_as_the_actions_before_it_would_have_it() {
    let bench = Bench::new(2);
    bench
        .start(Completion::Individual, |start| {
            Box::pin(async move {
                let graph = start.layout();
                assert!(graph.node("top").is_err());
                let node = serde_json::json!({ "driver": "cow", "node-name": "top", "size": SIZE });
                let node = driveline_graph::Definition {
                    common: Default::default(),
                    name: Some("top".into()),
                    driver: "cow".into(),
                    read_only: None,
                    children: Vec::new(),
                    options: object(node),
                };
                start.change().add_node(node).await?;
                start.change().replace_node("a2", "top")?;
                start.change().set_child("top", "backing", Some("a2"))?;
                start.change().set_drive("drive-a", "top")?;
                start.change().rename_bitmap("drive-a", "daily", "weekly").ok();
                assert_eq!(start.layout().chain("drive-a")?.len(), 4);
                start.stream(stream("a")).await
            })
        })
        .unwrap();
    assert_eq!(bench.wait("drive-a"), None);
    assert_eq!(bench.chain("drive-a"), "top");
}

#[test]
fn jobs_of_a_group_take_effect_together() {
    for seed in 0..20 {
        let bench = Bench::new(seed);
        bench
            .start(Completion::Grouped, |start| {
                Box::pin(async move {
                    start.stream(StreamArgs { speed: 40_000, ..stream("a") }).await?;
                    start.stream(stream("b")).await?;
                    let top_node = Some("b0".to_owned());
                    assert!(
                        start
                            .commit(CommitArgs { device: "drive-b".into(), top_node, ..Default::default() })
                            .await
                            .is_err()
                    );
                    Ok(())
                })
            })
            .unwrap();
        bench.sleep(150);
        if bench.status("drive-a") == JobStatus::Running {
            assert_eq!(bench.status("drive-b"), JobStatus::Waiting, "seed {seed}");
            assert_eq!(bench.chain("drive-b"), "b2 b1 b0");
        }
        assert_eq!((bench.wait("drive-a"), bench.wait("drive-b")), (None, None));
        assert_eq!((bench.chain("drive-a"), bench.chain("drive-b")), ("a2".into(), "b2".into()));
        bench.check_clean();
    }
}

#[test]
fn one_that_fails_or_is_cancelled_cancels_its_group_and_only_that() {
    for seed in 0..20 {
        let bench = Bench::new(seed);
        bench
            .start(Completion::Grouped, |start| {
                Box::pin(async move {
                    start.stream(StreamArgs { speed: 10_000, ..stream("a") }).await?;
                    start.stream(stream("b")).await
                })
            })
            .unwrap();
        bench.until("drive-b", JobStatus::Waiting);
        if seed % 2 == 0 {
            bench.jobs.cancel("drive-b", false).unwrap();
        } else {
            bench.jobs.cancel("drive-a", true).unwrap();
        }
        let events = || bench.events.lock().clone();
        for id in ["drive-a", "drive-b"] {
            // A job that was cancelled said nothing of it when it was over, and looked like one that had done its work.
            assert_eq!(bench.wait(id).as_deref(), Some("Operation canceled"));
            let events = events();
            assert!(events.contains(&format!("{id} CANCELLED")), "{events:?}");
        }
        assert_eq!((bench.chain("drive-a"), bench.chain("drive-b")), ("a2 a1 a0".into(), "b2 b1 b0".into()));
        bench.check_clean();

        let bench = Bench::new(seed);
        bench
            .start(Completion::Individual, |start| {
                Box::pin(async move {
                    start.stream(StreamArgs { speed: 10_000, ..stream("a") }).await?;
                    start.stream(stream("b")).await
                })
            })
            .unwrap();
        bench.jobs.cancel("drive-a", true).unwrap();
        assert_eq!(bench.wait("drive-b"), None);
        assert_eq!((bench.chain("drive-a"), bench.chain("drive-b")), ("a2 a1 a0".into(), "b2".into()));
    }
}

#[test]
fn a_group_is_finalized_by_any_of_its_jobs_that_waits_for_it() {
    let bench = Bench::new(7);
    bench
        .start(Completion::Grouped, |start| {
            Box::pin(async move {
                start.stream(stream("a")).await?;
                start.stream(StreamArgs { manual_finalize: true, ..stream("b") }).await
            })
        })
        .unwrap();
    bench.sleep(5000);
    assert_eq!((bench.status("drive-a"), bench.status("drive-b")), (JobStatus::Pending, JobStatus::Pending));
    assert_eq!(bench.chain("drive-a"), "a2 a1 a0");
    assert_eq!(bench.events.lock().iter().filter(|said| said.ends_with("PENDING")).count(), 1);
    bench.jobs.finalize("drive-b").unwrap();
    assert_eq!((bench.wait("drive-a"), bench.wait("drive-b")), (None, None));
    assert_eq!((bench.chain("drive-a"), bench.chain("drive-b")), ("a2".into(), "b2".into()));
}

#[test]
fn an_error_of_one_job_fails_it_and_cancels_the_others() {
    let bench = Bench::new(3);
    bench.world.faults.store(1, SeqCst);
    bench.fault_above("b1");
    bench
        .start(Completion::Grouped, |start| {
            Box::pin(async move {
                start.stream(stream("a")).await?;
                start.stream(stream("b")).await
            })
        })
        .unwrap();
    assert!(bench.wait("drive-b").is_some());
    assert_eq!(bench.wait("drive-a").as_deref(), Some("Operation canceled"));
    let events = bench.events.lock().clone();
    assert!(events.contains(&"drive-a CANCELLED".to_owned()), "{events:?}");
    assert!(events.contains(&"drive-b COMPLETED true".to_owned()), "{events:?}");
    assert_eq!((bench.chain("drive-a"), bench.chain("drive-b")), ("a2 a1 a0".into(), "b2 b1 b0".into()));
    bench.check_clean();
}

#[test]
fn a_task_finalizes_by_itself_and_is_dismissed_by_its_user() {
    let bench = Bench::new(4);
    let jobs = bench.jobs.clone();
    bench.sim.run(async move {
        jobs.run_task(JobKind::Create, "make", |progress| {
            Box::pin(async move {
                progress.set_total(10);
                progress.add_done(4);
                Ok(())
            })
        })
        .await
        .unwrap();
    });
    assert_eq!(bench.wait("make"), None);
    let info = bench.jobs.get("make").unwrap();
    assert_eq!((info.status, info.current_progress, info.total_progress), (JobStatus::Concluded, 10, 10));
    let said = bench.events.lock().clone();
    assert_eq!(said, ["make created", "make running", "make waiting", "make pending", "make concluded"]);
    bench.jobs.dismiss("make").unwrap();
    bench.sleep(5000);
    assert!(bench.jobs.list().is_empty());
}

#[test]
fn a_header_that_cannot_be_written_leaves_those_that_were_as_they_were() {
    // All overlays of `a1` refer to `a0` afterwards; the header of one of them cannot be written.
    for fails in 0..=3 {
        let bench = Bench::new(fails);
        let graph = bench.graph.clone();
        bench.sim.run(async move {
            let mut change = graph.change().await;
            for name in ["x", "y"] {
                let node = serde_json::json!({ "driver": "cow", "node-name": name, "size": SIZE,
                    "backing": "a1", "read-only": name == "y" });
                change.add_node(graph.parse(object(node), &[]).unwrap()).await.unwrap();
            }
            for name in ["a2", "x", "y"] {
                change.set_backing(name, Some("a1"), Some(("/a1", "cow"))).unwrap();
            }
            change.commit().await.unwrap();
        });
        let before = ["drive-a", "x", "y"].map(|node| (bench.chain(node), bench.read(node)));
        let headers = || {
            ["a2", "x", "y"].map(|node| bench.graph.node(node).unwrap().open_node().backing_file().unwrap().0)
        };
        bench.world.header_fault.store(fails, SeqCst);
        let args = CommitArgs {
            job_id: Some("j".into()),
            device: "drive-a".into(),
            top_node: Some("a1".into()),
            backing_file: Some("/a0".into()),
            manual_dismiss: true,
            ..CommitArgs::default()
        };
        bench.start(Completion::Individual, |start| Box::pin(start.commit(args))).unwrap();
        let error = bench.wait("j");
        if fails == 0 {
            assert_eq!((error, headers()), (None, ["/a0"; 3].map(String::from)));
            assert_eq!((bench.chain("x"), bench.chain("drive-a")), ("x a0".into(), "a2 a0".into()));
        } else {
            assert!(error.is_some_and(|error| error.contains("writing the header")), "{fails}");
            assert_eq!(headers(), ["/a1"; 3].map(String::from), "{fails}");
            assert_eq!(
                ["drive-a", "x", "y"].map(|node| bench.chain(node)),
                before.clone().map(|(chain, _)| chain)
            );
        }
        assert_eq!(["drive-a", "x", "y"].map(|node| bench.read(node)), before.map(|(_, data)| data));
        assert!(
            bench.graph.view_node("y").unwrap().read_only && bench.graph.view_node("a0").unwrap().read_only
        );
        bench.check_clean();
    }
}

/// An export of an image in the middle stayed there when a commit took the image out of the chain, and kept it in use.
#[test]
fn who_looks_at_the_top_of_a_commit_in_the_middle_looks_at_its_base_afterwards() {
    let bench = Bench::new(13);
    let graph = bench.graph.clone();
    let export = bench
        .sim
        .run(async move { graph.open_following_root("a1", RootOptions::reader("an export")).await.unwrap() });
    let read = |export: &Root| {
        let export = export.clone();
        bench.sim.run(async move { export.read(0..SIZE).await.unwrap().to_vec() })
    };
    let before = read(&export);
    let args = CommitArgs {
        device: "drive-a".into(),
        top_node: Some("a1".into()),
        manual_dismiss: true,
        ..CommitArgs::default()
    };
    bench.start(Completion::Individual, move |start| Box::pin(start.commit(args))).unwrap();
    assert_eq!(bench.wait("drive-a"), None);
    let nodes = bench.graph.nodes();
    let users = |name: &str| nodes.iter().find(|view| view.node.name() == name).unwrap().parents.len();
    assert_eq!(
        (users("a1"), users("a0")),
        (0, 3),
        "the overlay, the export and what was taken out are on the base"
    );
    assert!(read(&export) == before);
    bench.check_clean();
}
