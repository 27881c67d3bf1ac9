//! Jobs that start inside a change of the graph, and jobs that end together or not at all.

#![allow(unreachable_pub, missing_debug_implementations, missing_docs)]

mod kit;

use driveline_graph::{Graph, GraphOptions, Kind, NewBitmap, Options, Result};
use driveline_jobs::{
    CommitArgs, Completion, JobEvent, JobKind, JobStatus, Jobs, OnError, Start, StreamArgs,
};
use kit::{
    drivers::{CLUSTER, World, register},
    sim::Sim,
};
use parking_lot::Mutex;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::SeqCst},
};

struct Bench {
    sim: Sim,
    world: World,
    graph: Graph,
    jobs: Jobs,
    events: Arc<Mutex<Vec<String>>>,
}

fn object(value: serde_json::Value) -> Options {
    value.as_object().unwrap().clone()
}

impl Bench {
    /// Two drives of three images each: `a` on `a2`, `a1`, `a0`, and the same for `b`. `a1` and `b1` are behind filters
    /// that fail when they are told to.
    fn new(seed: u64) -> Self {
        let sim = Sim::new(seed);
        let world = World { sim: sim.clone(), faults: Arc::new(AtomicU64::new(0)) };
        let graph = Graph::new(GraphOptions::default());
        register(&graph, &world);
        let jobs = Jobs::new(graph.clone(), Arc::new(sim.clone()));
        let events = Arc::new(Mutex::new(Vec::new()));
        jobs.on_event({
            let events = events.clone();
            move |event| {
                let said = match event {
                    JobEvent::StatusChange { id, status } => format!("{id} {status}"),
                    JobEvent::Completed(job) => format!("{} COMPLETED {:?}", job.id, job.error.is_some()),
                    JobEvent::Cancelled(job) => format!("{} CANCELLED", job.id),
                    JobEvent::Pending(job) => format!("{} PENDING", job.id),
                    _ => return,
                };
                events.lock().push(said);
            }
        });
        let bench = Self { sim, world, graph: graph.clone(), jobs, events };
        bench.sim.run(async move {
            let mut change = graph.change().await;
            for drive in ["a", "b"] {
                for at in 0..3 {
                    let mut node = serde_json::json!({ "driver": "cow", "node-name": format!("{drive}{at}"),
                        "size": 16 * CLUSTER, "fill-every": at + 1, "fill-byte": at + 1, "read-only": at != 2 });
                    if at > 0 {
                        node["backing"] = format!("{drive}{}", at - 1).into();
                    }
                    change.add_node(graph.parse(object(node), &[]).unwrap()).await.unwrap();
                }
                change.set_drive(&format!("drive-{drive}"), &format!("{drive}2")).unwrap();
                change.add_bitmap(&format!("drive-{drive}"), NewBitmap::named("daily")).unwrap();
            }
            change.commit().await.unwrap();
            for drive in ["a", "b"] {
                let mut change = graph.change().await;
                let fault = object(serde_json::json!({ "driver": "fault", "node-name": format!("{drive}-fault") }));
                change.insert_filter(fault, &format!("{drive}2")).await.unwrap();
                change.commit().await.unwrap();
            }
        });
        bench
    }

    fn start<T: Send + 'static>(
        &self,
        completion: Completion,
        stage: impl for<'a> FnOnce(&'a mut Start) -> driveline_graph::BoxFuture<'a, Result<T>> + Send + 'static,
    ) -> Result<Vec<String>> {
        let jobs = self.jobs.clone();
        self.sim.run(async move {
            let mut start = jobs.begin().await;
            stage(&mut start).await?;
            start.make(completion).await
        })
    }

    fn wait(&self, id: &str) -> Option<String> {
        let (jobs, id) = (self.jobs.clone(), id.to_owned());
        self.sim.run(async move { jobs.wait(&id).await.unwrap().error })
    }

    fn settle(&self) {
        let sim = self.sim.clone();
        self.sim.run(async move {
            driveline_jobs::Runtime::sleep(&sim, std::time::Duration::from_secs(5)).await;
        });
    }

    fn chain(&self, drive: &str) -> String {
        let chain = self.graph.chain(drive).unwrap();
        chain.iter().map(|node| node.name()).collect::<Vec<_>>().join(" ")
    }

    fn status(&self, id: &str) -> JobStatus {
        self.jobs.get(id).unwrap().status
    }

    /// Nothing is left of any job but what it did.
    fn check_clean(&self) {
        let names = self.graph.nodes();
        let left: Vec<_> = names.iter().map(|v| v.node.name()).filter(|name| name.starts_with('#')).collect();
        assert!(left.is_empty(), "{left:?}");
        for drive in ["a", "b"] {
            let bitmap = self.graph.bitmap(&format!("drive-{drive}"), "daily").unwrap();
            assert!(bitmap.bits().is_clean() && !bitmap.is_busy(), "a job's work marks no drive");
        }
        assert!(self.graph.nodes().iter().all(|v| !v.parents.iter().any(|parent| parent.starts_with("job"))));
    }
}

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
                let node = serde_json::json!({ "driver": "cow", "node-name": "top", "size": 16 * CLUSTER });
                let node = driveline_graph::Definition {
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
        let sim = bench.sim.clone();
        bench.sim.run(async move {
            driveline_jobs::Runtime::sleep(&sim, std::time::Duration::from_millis(150)).await;
        });
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
        bench.settle_waiting("drive-b");
        if seed % 2 == 0 {
            bench.jobs.cancel("drive-b", false).unwrap();
        } else {
            bench.jobs.cancel("drive-a", true).unwrap();
        }
        bench.wait("drive-a");
        bench.wait("drive-b");
        let events = bench.events.lock().clone();
        for id in ["drive-a", "drive-b"] {
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

impl Bench {
    fn settle_waiting(&self, id: &str) {
        let (sim, jobs, id) = (self.sim.clone(), self.jobs.clone(), id.to_owned());
        self.sim.run(async move {
            while jobs.get(&id).unwrap().status != JobStatus::Waiting {
                driveline_jobs::Runtime::sleep(&sim, std::time::Duration::from_millis(1)).await;
            }
        });
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
    bench.settle();
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
    // Two streams into images that can be written, below filters that fail: only the reads of `b1` do.
    bench.world.faults.store(1, SeqCst);
    let graph = bench.graph.clone();
    bench.sim.run(async move {
        let mut change = graph.change().await;
        let fault = object(serde_json::json!({ "driver": "fault", "node-name": "b1-fault" }));
        change.insert_filter(fault, "b1").await.unwrap();
        change.commit().await.unwrap();
    });
    bench
        .start(Completion::Grouped, |start| {
            Box::pin(async move {
                start.stream(StreamArgs { on_error: OnError::Report, ..stream("a") }).await?;
                start.stream(stream("b")).await
            })
        })
        .unwrap();
    assert!(bench.wait("drive-b").is_some());
    assert!(bench.wait("drive-a").is_none());
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
    bench.settle();
    assert!(bench.jobs.list().is_empty());
}
