//! Durability that a change of the graph leaves for afterwards.
//!
//! What a snapshot keeps was written by users who may flush at any time, and then all of it must be on stable storage. To
//! wait for the disk while they are drained would hold up their writes for as long as that takes. So the snapshot *owes*
//! it: its users go on at once, and whoever flushes first pays. (A write with `FUA` promises itself only, so it need not.)
//!
//! ```text
//!   drained: overlay in place ─▶ gates open ─▶ pay: flush what is kept ─▶ it becomes read-only
//!                                   └ writes go on; a flush pays, or waits for who is paying
//! ```

use crate::{
    error::{Error, Result},
    node::{Node, NodeId},
};
use driveline_op::{Ask, Buffer, Call, Edge, op};
use futures::future::join_all;
use parking_lot::Mutex;
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

/// Makes durable what was written to these nodes, all of them at once: each waits for the same disk.
pub(crate) async fn flush_all(nodes: Vec<(Arc<Node>, Edge)>) -> Result<()> {
    let flushes = nodes.into_iter().map(|(node, edge)| async move {
        let flush = Ask { op: op::FLUSH, ..Ask::default() };
        let answer = Call::new(edge, flush, Buffer::default()).await;
        answer.result.map_err(|error| Error::from(error).at(node.name()))
    });
    join_all(flushes).await.into_iter().collect()
}

/// Nodes that nobody writes to any more, and that are to be flushed.
pub(crate) struct Owed {
    nodes: Vec<(Arc<Node>, Edge)>,
    paid: async_lock::Mutex<bool>,
}

impl Owed {
    pub(crate) fn new(nodes: Vec<(Arc<Node>, Edge)>) -> Arc<Self> {
        Arc::new(Self { nodes, paid: async_lock::Mutex::new(false) })
    }

    /// Is one of them among these?
    pub(crate) fn is_for(&self, reached: &BTreeSet<NodeId>) -> bool {
        self.nodes.iter().any(|(node, _)| reached.contains(&node.id))
    }

    /// Flushes them, unless that was done; one at a time tries. After an error they are owed still.
    pub(crate) async fn pay(&self) -> Result<()> {
        let mut paid = self.paid.lock().await;
        if !*paid {
            flush_all(self.nodes.clone()).await?;
            *paid = true;
        }
        Ok(())
    }
}

/// What a root has to pay before it may say that all is durable.
#[derive(Default)]
pub(crate) struct Debts {
    any: AtomicBool,
    owed: Mutex<Vec<Arc<Owed>>>,
}

impl Debts {
    /// One more. The root is drained.
    pub(crate) fn add(&self, owed: Arc<Owed>) {
        self.owed.lock().push(owed);
        self.any.store(true, SeqCst);
    }

    /// Forgets what is owed for nodes that the root does not read from any more: what it kept is elsewhere by now. The root
    /// is drained.
    pub(crate) fn keep(&self, reached: &BTreeSet<NodeId>) {
        let mut owed = self.owed.lock();
        owed.retain(|owed| owed.is_for(reached));
        self.any.store(!owed.is_empty(), SeqCst);
    }

    /// That one is paid, by whomever.
    pub(crate) fn paid(&self, one: &Arc<Owed>) {
        let mut owed = self.owed.lock();
        owed.retain(|other| !Arc::ptr_eq(other, one));
        self.any.store(!owed.is_empty(), SeqCst);
    }

    /// Pays all of it.
    ///
    /// Errors: that of a node that cannot be flushed; it is owed still.
    #[inline]
    pub(crate) async fn pay(&self) -> Result<()> {
        if self.any.load(SeqCst) { self.pay_all().await } else { Ok(()) }
    }

    #[cold]
    async fn pay_all(&self) -> Result<()> {
        let owed = self.owed.lock().clone();
        for one in &owed {
            one.pay().await?;
            self.paid(one);
        }
        Ok(())
    }

    /// Is there anything?
    pub(crate) fn any(&self) -> bool {
        self.any.load(SeqCst)
    }
}
