//! A node: a driver's open instance, with what the core keeps about it.

use crate::{
    driver::{Driver, OpenNode, Options},
    guard::Threshold,
    ranges::Ranges,
};
use driveline_bitmap::BitmapSet;
use driveline_op::Info;
use parking_lot::{Mutex, RwLock};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// Names a node for its life; never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeId(pub u64);

impl NodeId {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Relaxed))
    }
}

/// A node of the graph. Its place (children, parents) is the topology's business.
pub struct Node {
    pub(crate) id: NodeId,
    pub(crate) name: Arc<str>,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) open: Arc<dyn OpenNode>,
    pub(crate) options: Options,
    pub(crate) bitmaps: Arc<Mutex<BitmapSet>>,
    pub(crate) ranges: Arc<Ranges>,
    pub(crate) info: RwLock<Info>,
    pub(crate) failed: Mutex<Option<String>>,
    pub(crate) threshold: Arc<Threshold>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name)
            .field("driver", &self.driver_name())
            .finish_non_exhaustive()
    }
}

impl Node {
    /// Its id.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its driver.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Its driver's name.
    pub fn driver_name(&self) -> &str {
        &self.driver.description().name
    }

    /// The options that it was opened with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The node outside the data path.
    pub fn open_node(&self) -> &Arc<dyn OpenNode> {
        &self.open
    }

    /// Size and limits, as the driver states them.
    pub fn info(&self) -> Info {
        *self.info.read()
    }

    /// The offset that a write has to end behind to be told of ([`Event::WriteThreshold`](crate::Event)); 0: none.
    pub fn write_threshold(&self) -> u64 {
        self.threshold.get()
    }

    /// What made it fail, if a panic did.
    pub fn failure(&self) -> Option<String> {
        self.failed.lock().clone()
    }
}
