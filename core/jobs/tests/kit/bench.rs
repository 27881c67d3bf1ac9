//! Two drives with jobs, and what is told of them.

use super::{
    drivers::{CLUSTER, World, register},
    sim::Sim,
};
use driveline_graph::{BoxFuture, Graph, GraphOptions, NewBitmap, Options, Result, Root, RootOptions};
use driveline_jobs::{Completion, JobEvent, JobStatus, Jobs, Runtime, Start};
use parking_lot::Mutex;
use std::{sync::Arc, time::Duration};

pub const SIZE: u64 = 16 * CLUSTER;

pub struct Bench {
    pub sim: Sim,
    pub world: World,
    pub graph: Graph,
    pub jobs: Jobs,
    pub events: Arc<Mutex<Vec<String>>>,
}

pub fn object(value: serde_json::Value) -> Options {
    value.as_object().unwrap().clone()
}

impl Bench {
    /// Two drives of three images each: `drive-a` on `a2`, `a1`, `a0`, and the same for `b`. Above each is a filter that fails
    /// when it is told to. Each has a bitmap `daily`.
    pub fn new(seed: u64) -> Self {
        let sim = Sim::new(seed);
        let world = World::new(&sim);
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
                        "size": SIZE, "fill-every": at + 1, "fill-byte": at + 1, "read-only": at != 2 });
                    if at > 0 {
                        node["backing"] = format!("{drive}{}", at - 1).into();
                    }
                    change.add_node(graph.parse(object(node), &[]).unwrap()).await.unwrap();
                }
                change.set_drive(&format!("drive-{drive}"), &format!("{drive}2")).unwrap();
                change.add_bitmap(&format!("drive-{drive}"), NewBitmap::named("daily")).unwrap();
            }
            change.commit().await.unwrap();
        });
        bench
    }

    /// An empty image.
    pub fn image(&self, name: &str) {
        let node = object(serde_json::json!({ "driver": "cow", "node-name": name, "size": SIZE }));
        let graph = self.graph.clone();
        self.sim.run(async move {
            let mut change = graph.change().await;
            change.add_node(graph.parse(node, &[]).unwrap()).await.unwrap();
            change.commit().await.unwrap();
        });
    }

    pub fn fault_above(&self, node: &str) {
        let (graph, node) = (self.graph.clone(), node.to_owned());
        self.sim.run(async move {
            let mut change = graph.change().await;
            let fault = serde_json::json!({ "driver": "fault", "node-name": format!("{node}-fault") });
            change.insert_filter(object(fault), &node).await.unwrap();
            change.commit().await.unwrap();
        });
    }

    pub fn start<T: Send + 'static>(
        &self,
        completion: Completion,
        stage: impl for<'a> FnOnce(&'a mut Start) -> BoxFuture<'a, Result<T>> + Send + 'static,
    ) -> Result<Vec<String>> {
        let jobs = self.jobs.clone();
        self.sim.run(async move {
            let mut start = jobs.begin().await;
            stage(&mut start).await?;
            start.make(completion).await
        })
    }

    pub fn wait(&self, id: &str) -> Option<String> {
        let (jobs, id) = (self.jobs.clone(), id.to_owned());
        self.sim.run(async move { jobs.wait(&id).await.unwrap().error })
    }

    pub fn sleep(&self, milliseconds: u64) {
        let sim = self.sim.clone();
        self.sim.run(async move { sim.sleep(Duration::from_millis(milliseconds)).await });
    }

    pub fn until(&self, id: &str, status: JobStatus) {
        let (sim, jobs, id) = (self.sim.clone(), self.jobs.clone(), id.to_owned());
        self.sim.run(async move {
            while jobs.get(&id).unwrap().status != status {
                sim.sleep(Duration::from_millis(1)).await;
            }
        });
    }

    pub fn status(&self, id: &str) -> JobStatus {
        self.jobs.get(id).unwrap().status
    }

    pub fn chain(&self, drive: &str) -> String {
        let chain = self.graph.chain(drive).unwrap();
        chain.iter().map(|node| node.name()).collect::<Vec<_>>().join(" ")
    }

    pub fn root(&self, name: &str) -> Root {
        let (graph, name) = (self.graph.clone(), name.to_owned());
        self.sim.run(async move { graph.open_root(&name, RootOptions::writer("a guest")).await.unwrap() })
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        let (graph, name) = (self.graph.clone(), name.to_owned());
        self.sim.run(async move {
            let root = graph.open_root(&name, RootOptions::reader("a reader")).await.unwrap();
            let data = root.read(0..SIZE).await.unwrap().to_vec();
            root.close().await.unwrap();
            data
        })
    }

    pub fn write(&self, root: &Root, offset: u64, data: Vec<u8>) {
        let root = root.clone();
        self.sim.run(async move { root.write(offset, &data, 0).await.unwrap() });
    }

    /// Nothing is left of any job but what it did.
    pub fn check_clean(&self) {
        let nodes = self.graph.nodes();
        let left: Vec<_> = nodes.iter().map(|v| v.node.name()).filter(|name| name.starts_with('#')).collect();
        assert!(left.is_empty(), "{left:?}");
        for view in &nodes {
            assert!(view.bitmaps.iter().all(|b| !b.name().as_str().starts_with('#') && !b.is_busy()));
            assert!(!view.parents.iter().any(|parent| parent.starts_with("job")), "{:?}", view.parents);
        }
        for drive in ["drive-a", "drive-b"] {
            self.graph.bitmap(drive, "daily").unwrap();
        }
    }

    pub fn dirty(&self, drive: &str) -> u64 {
        self.graph.bitmap(drive, "daily").unwrap().bits().dirty_bytes()
    }
}
