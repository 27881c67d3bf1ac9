//! A wired graph: instances, targets and edges, immutable and shared.
//!
//! ```text
//!   Edge ──op──▶ Target ──▶ Instance (a driver's state and its operations)
//!                   └─edges─▶ Edge ──▶ ...
//! ```
//!
//! Nothing here changes after it is built, so requests run through it without locks, and whoever holds an
//! [`Edge`] holds all that is below it. To change a graph is to build other edges.

use crate::shim::{Body, OpTable};
use driveline_abi::{EdgeAbi, Info, OpVt, ResolvedOp, TargetAbi, op};
use std::{any::Any, fmt, ptr, sync::Arc};

/// A driver's state together with its operations.
#[derive(Clone)]
pub struct Instance {
    node: *const u8,
    slots: [Option<&'static OpVt>; op::COUNT],
    /// Keeps `node` alive.
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: `node` points into `_keep`, which is Send + Sync; vtables are static.
unsafe impl Send for Instance {}
// SAFETY: as above.
unsafe impl Sync for Instance {}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instance").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Instance {
    /// A built-in driver.
    pub fn new<D: Send + Sync + 'static>(body: Arc<Body<D>>, table: &OpTable<D>) -> Self {
        Self { node: Arc::as_ptr(&body).cast(), slots: *table.slots(), _keep: body }
    }

    /// A driver of a plugin.
    ///
    /// # Safety
    ///
    /// `node` is what the operations in `slots` expect, and stays valid while `keep` lives.
    pub unsafe fn foreign(
        node: *const u8,
        slots: [Option<&'static OpVt>; op::COUNT],
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self { node, slots, _keep: keep }
    }

    /// Does it have this operation?
    pub fn has(&self, op: u32) -> bool {
        self.slots.get(op as usize).is_some_and(Option::is_some)
    }
}

struct TargetInner {
    abi: TargetAbi,
    instance: Instance,
    edges: Box<[Edge]>,
    _edge_ptrs: Box<[*const EdgeAbi]>,
    /// Bytes of arena that any operation of any child may take.
    arena_bytes: usize,
}

/// An instance wired to its children.
#[derive(Clone)]
pub struct Target(Arc<TargetInner>);

// SAFETY: all pointers are into what it keeps alive and never changes.
unsafe impl Send for TargetInner {}
// SAFETY: as above.
unsafe impl Sync for TargetInner {}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target").field("edges", &self.0.edges).finish_non_exhaustive()
    }
}

impl Target {
    /// Wires an instance to its children, in the order of their numbers.
    pub fn new(instance: Instance, edges: Vec<Edge>) -> Self {
        let edges = edges.into_boxed_slice();
        let ptrs: Box<[*const EdgeAbi]> = edges.iter().map(|edge| &raw const edge.0.abi).collect();
        let arena_bytes = edges.iter().map(|edge| edge.0.arena_bytes).max().unwrap_or(0);
        let abi = TargetAbi {
            node: instance.node,
            edges: ptrs.as_ptr(),
            n_edges: u32::try_from(ptrs.len()).expect("fewer than 2^32 children"),
            reserved: 0,
        };
        Self(Arc::new(TargetInner { abi, instance, edges, _edge_ptrs: ptrs, arena_bytes }))
    }

    /// The instance.
    pub fn instance(&self) -> &Instance {
        &self.0.instance
    }

    /// The children.
    pub fn edges(&self) -> &[Edge] {
        &self.0.edges
    }
}

/// Where an operation on an edge goes.
#[derive(Debug)]
pub enum Route<'a> {
    /// To this node, which has the operation (asserted).
    To(&'a Target),
    /// Where it goes on that edge.
    As(&'a Edge),
    /// Nowhere: `ENOTSUP`.
    Refuse,
}

struct EdgeInner {
    abi: EdgeAbi,
    _ops: Box<[ResolvedOp]>,
    _below: Vec<Target>,
    _same: Vec<Edge>,
    arena_bytes: usize,
}

/// What a parent may call: for each operation, where it goes. Cheap to clone.
#[derive(Clone)]
pub struct Edge(Arc<EdgeInner>);

// SAFETY: all pointers are into what it keeps alive and never changes.
unsafe impl Send for EdgeInner {}
// SAFETY: as above.
unsafe impl Sync for EdgeInner {}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Edge").field("info", &self.0.abi.info).finish_non_exhaustive()
    }
}

impl Edge {
    /// An edge whose operations go where `route` says.
    pub fn new<'r>(info: Info, route: impl Fn(u32) -> Route<'r>) -> Self {
        let (mut below, mut same) = (Vec::new(), Vec::new());
        let mut arena_bytes = 0;
        let ops: Box<[ResolvedOp]> = (0..op::COUNT as u32)
            .map(|op| match route(op) {
                Route::To(target) => {
                    let vt = target.0.instance.slots[op as usize]
                        .expect("routed to a node that has the operation");
                    arena_bytes = arena_bytes.max(vt.size + vt.align + target.0.arena_bytes);
                    if below.last().is_none_or(|last: &Target| !Arc::ptr_eq(&last.0, &target.0)) {
                        below.push(target.clone());
                    }
                    ResolvedOp { target: &raw const target.0.abi, vt }
                }
                Route::As(edge) => {
                    arena_bytes = arena_bytes.max(edge.0.arena_bytes);
                    if same.last().is_none_or(|last: &Edge| !Arc::ptr_eq(&last.0, &edge.0)) {
                        same.push(edge.clone());
                    }
                    edge.resolved(op)
                }
                Route::Refuse => ResolvedOp { target: ptr::null(), vt: ptr::null() },
            })
            .collect();
        let abi = EdgeAbi { n_ops: op::COUNT as u32, reserved: 0, ops: ops.as_ptr(), info };
        Self(Arc::new(EdgeInner { abi, _ops: ops, _below: below, _same: same, arena_bytes }))
    }

    /// An edge straight to a node: operations that it lacks are refused.
    pub fn to(info: Info, target: &Target) -> Self {
        Self::new(info, |op| if target.instance().has(op) { Route::To(target) } else { Route::Refuse })
    }

    /// An edge whose operations go where those of this one go, and that says something else of what is below.
    pub fn with_info(&self, info: Info) -> Self {
        let ops = self.0._ops.clone();
        let abi = EdgeAbi { n_ops: op::COUNT as u32, reserved: 0, ops: ops.as_ptr(), info };
        let (_below, _same, arena_bytes) = (Vec::new(), vec![self.clone()], self.0.arena_bytes);
        Self(Arc::new(EdgeInner { abi, _ops: ops, _below, _same, arena_bytes }))
    }

    /// Size and limits of what is below.
    pub fn info(&self) -> &Info {
        &self.0.abi.info
    }

    /// Is the operation refused?
    pub fn refuses(&self, op: u32) -> bool {
        self.resolved(op).vt.is_null()
    }

    /// Do both edges take an operation to the same place?
    pub fn same_route(&self, other: &Edge, op: u32) -> bool {
        let (a, b) = (self.resolved(op), other.resolved(op));
        ptr::eq(a.target, b.target) && ptr::eq(a.vt, b.vt)
    }

    pub(crate) fn resolved(&self, op: u32) -> ResolvedOp {
        self.0._ops[op as usize]
    }

    /// Bytes of arena that any operation on this edge may take, with all below.
    pub fn arena_bytes(&self) -> usize {
        self.0.arena_bytes
    }
}
