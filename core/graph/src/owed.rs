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

/// A node that nobody writes to any more, and that is to be flushed. Of several that one snapshot keeps each is owed for itself: a disk that
/// fails is no matter of those who write to another one.
pub(crate) struct Owed {
    node: Arc<Node>,
    edge: Edge,
    paid: async_lock::Mutex<bool>,
}

impl Owed {
    pub(crate) fn new(node: Arc<Node>, edge: Edge) -> Arc<Self> {
        Arc::new(Self { node, edge, paid: async_lock::Mutex::new(false) })
    }

    /// The node.
    pub(crate) fn node(&self) -> NodeId {
        self.node.id
    }

    /// Is it among these?
    pub(crate) fn is_for(&self, reached: &BTreeSet<NodeId>) -> bool {
        reached.contains(&self.node.id)
    }

    /// Flushes it, unless that was done; one at a time tries. After an error it is owed still.
    pub(crate) async fn pay(&self) -> Result<()> {
        let mut paid = self.paid.lock().await;
        if !*paid {
            flush_all(vec![(self.node.clone(), self.edge.clone())]).await?;
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
        // All at once: each waits for the same disk, or for one of its own.
        let pay = |one: Arc<Owed>| async move {
            one.pay().await?;
            self.paid(&one);
            Ok(())
        };
        join_all(owed.into_iter().map(pay)).await.into_iter().collect()
    }

    /// Is there anything?
    pub(crate) fn any(&self) -> bool {
        self.any.load(SeqCst)
    }
}
