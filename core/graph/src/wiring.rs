//! From a topology to edges: where each operation on each edge goes.

use crate::{
    driver::{Missing, OpenChild, Role},
    fit::Fit,
    guard::{GUARD, Guard},
    io::{HOP, Hop, MARK_ONLY, MarkOnly, Marks, without_limits},
    lower::{LOWER, Lower, STRIP, Strip},
    node::NodeId,
    topology::{Placed, Topology},
};
use driveline_op::{Body, Edge, Info, Instance, Route, Target, flag, op};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// A node as it is wired.
#[derive(Clone)]
pub(crate) struct Wired {
    /// What its parents call.
    pub(crate) edge: Edge,
    /// What a root that locks ranges of it calls.
    pub(crate) edge_of_locker: Edge,
    /// What a filter calls that copies old data to it: its writes hold their ranges alone, and readers share theirs. One who
    /// found a range unallocated and reads it from the backing has read it before the data there changes.
    pub(crate) edge_of_copier: Edge,
    /// What those call who want its point in time.
    pub(crate) edge_of_past: Edge,
    /// Its own limits, which the edge has taken care of.
    pub(crate) info: Info,
    /// Its children, for calls outside the data path.
    pub(crate) children: Vec<OpenChild>,
}

/// Wires all nodes, children first. With `trace` every node gets a hop, so that every request shows in the trace.
pub(crate) fn wire(topology: &Topology, trace: bool) -> BTreeMap<NodeId, Wired> {
    wire_all(topology, topology.top_down(), trace)
}

/// Wires a node, and so what is below it; for one of many this costs less than to wire them all.
pub(crate) fn wire_one(topology: &Topology, id: NodeId, trace: bool) -> Wired {
    let mut wired = wire_all(topology, topology.top_down_from([id]), trace);
    wired.remove(&id).expect("a node is among what it reaches")
}

fn wire_all(topology: &Topology, top_down: Vec<NodeId>, trace: bool) -> BTreeMap<NodeId, Wired> {
    let users = Users::of(topology);
    let mut wired = BTreeMap::new();
    for id in top_down.into_iter().rev() {
        let node = wire_node(topology, topology.at(id), &users, &wired, trace);
        wired.insert(id, node);
    }
    wired
}

/// Nodes whose users ask for more than requests, looked up once for all nodes.
struct Users {
    /// A filter copies old data to them.
    targets: BTreeSet<NodeId>,
    /// A root locks ranges of them.
    locked: BTreeSet<NodeId>,
}

impl Users {
    fn of(topology: &Topology) -> Self {
        let edges = topology.nodes.values().flat_map(|placed| &placed.children);
        let locks = topology.roots.values().filter(|root| root.locks);
        Self {
            targets: edges.filter(|edge| edge.role == Role::Target).map(|edge| edge.node).collect(),
            locked: locks.map(|root| topology.root_node(root)).collect(),
        }
    }
}

fn wire_node(
    topology: &Topology,
    placed: &Placed,
    users: &Users,
    below: &BTreeMap<NodeId, Wired>,
    trace: bool,
) -> Wired {
    let node = &placed.node;
    let children: Vec<OpenChild> = placed
        .children
        .iter()
        .map(|child| OpenChild {
            name: child.name.clone(),
            edge: below[&child.node].edge_for(child.role),
            node: topology.at(child.node).node.open.clone(),
            unfiltered: topology.unfiltered(child.node),
            node_name: topology.name(child.node),
        })
        .collect();
    let infos: Vec<Info> = children.iter().map(|child| *child.edge.info()).collect();
    let info = node.open.info(&infos);
    let edges: Vec<Edge> = children.iter().map(|child| child.edge.clone()).collect();
    let edge_of_past = match node.open.point_in_time() {
        Some(past) => Edge::to(without_limits(info, false), &Target::new(past, edges.clone())),
        None => Edge::new(info, |_| Route::Refuse),
    };
    let edge = resolve(placed, info, Target::new(node.open.instance(), edges));
    let edge = guard(placed, info, edge);
    let interposed = Interposed::new(topology, placed, users, info, edge, trace);
    let [edge_of_locker, edge_of_copier, edge] =
        [User::Locker, User::Copier, User::Other].map(|user| interposed.edge_for(user));
    Wired { edge, edge_of_locker, edge_of_copier, edge_of_past, info, children }
}

impl Wired {
    /// What a parent calls to whom the node is that.
    pub(crate) fn edge_for(&self, role: Role) -> Edge {
        match role {
            Role::Target => self.edge_of_copier.clone(),
            Role::PointInTime => self.edge_of_past.clone(),
            Role::Filtered | Role::Storage | Role::Data | Role::Backing => self.edge.clone(),
        }
    }
}

/// For whom an edge is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum User {
    /// A root that locks ranges: its own requests are not kept waiting by what it holds.
    Locker,
    /// A filter that copies old data to the node.
    Copier,
    /// Everyone else.
    Other,
}

/// Where the operations of a node go: to the node, past it where its author said so, or to their lowering.
fn resolve(placed: &Placed, info: Info, target: Target) -> Edge {
    let description = placed.node.driver.description();
    let has = |op| op < description.operations_known && target.instance().has(op);
    let child = target.edges().first();
    let pass = |op| match child {
        Some(child) if description.missing == Missing::Pass && op < description.operations_known => {
            Route::As(child)
        }
        _ => Route::Refuse,
    };
    // What lowered operations are made of: those that the node has, and those that it let pass.
    let own = Edge::new(info, |op| if has(op) { Route::To(&target) } else { pass(op) });
    let writes = !own.refuses(op::WRITE);
    // The flags that not everybody knows, and the operations that have them.
    let strips = |op| {
        let new = match op {
            op::WRITE => flag::COMPRESSED,
            op::BLOCK_STATUS => flag::PRECISE,
            _ => 0,
        };
        has(op) && new & !description.flags_known != 0
    };
    let strip = (strips(op::WRITE) || strips(op::BLOCK_STATUS)).then(|| {
        let strip = Strip { flags_known: description.flags_known };
        Target::new(Instance::new(Arc::new(Body { cookie: 0, driver: strip }), &STRIP), vec![own.clone()])
    });
    let lowered = Instance::new(Arc::new(Body { cookie: 0, driver: Lower }), &LOWER);
    let lower = Target::new(lowered, vec![own]);
    Edge::new(info, |op| {
        if let Some(strip) = strip.as_ref().filter(|_| strips(op)) {
            return Route::To(strip);
        }
        if has(op) {
            return Route::To(&target);
        }
        let unknown = op >= description.operations_known;
        match child {
            // A flush holds nothing that a filter could mind, so it always reaches what is below.
            Some(child) if op == op::FLUSH && !unknown => Route::As(child),
            Some(child) if description.missing == Missing::Pass && !unknown => Route::As(child),
            _ if lower.instance().has(op) && (op != op::WRITE_ZEROES || writes) => Route::To(&lower),
            _ => Route::Refuse,
        }
    })
}

/// Puts a guard before a node whose options change its requests.
fn guard(placed: &Placed, info: Info, edge: Edge) -> Edge {
    let (node, common) = (&placed.node, placed.common);
    let description = node.driver.description();
    let guard = Guard {
        node: node.clone(),
        detect_zeroes: common.detect_zeroes,
        ignores_discard: common.ignores_discard(description),
        ignores_flush: common.ignores_flush(description),
        // Zeroes that would only be lowered to a write again are written at once.
        zeroes: op::WRITE_ZEROES < description.operations_known
            && (node.open.instance().has(op::WRITE_ZEROES) || description.missing == Missing::Pass),
    };
    let wants: Vec<bool> = (0..op::COUNT as u32).map(|op| !edge.refuses(op) && guard.wants(op)).collect();
    if !wants.contains(&true) {
        return edge;
    }
    let instance = Instance::new(Arc::new(Body { cookie: node.id.0, driver: guard }), &GUARD);
    let guarded = Target::new(instance, vec![edge.clone()]);
    Edge::new(info, |op| if wants[op as usize] { Route::To(&guarded) } else { Route::As(&edge) })
}

/// Puts a hop before a node that has something to observe; for most there is nothing, whoever the user is.
struct Interposed<'a> {
    topology: &'a Topology,
    placed: &'a Placed,
    users: &'a Users,
    info: Info,
    edge: Edge,
    /// The edge as parents see it who have no hop before them.
    plain: Edge,
    trace: bool,
}

impl<'a> Interposed<'a> {
    fn new(
        topology: &'a Topology,
        placed: &'a Placed,
        users: &'a Users,
        info: Info,
        edge: Edge,
        trace: bool,
    ) -> Self {
        let plain = edge.with_info(without_limits(info, placed.takes_no_writes()));
        Self { topology, placed, users, info, edge, plain, trace }
    }

    fn edge_for(&self, user: User) -> Edge {
        let node = &self.placed.node;
        let grows = self.topology.grows(node.id);
        let fit = Fit::of(&self.info, grows);
        let copied_to = self.users.targets.contains(&node.id);
        let bitmaps = node.bitmaps.lock().snapshot();
        // Only bitmaps ask whether a scope is at their node or below.
        let reach =
            if bitmaps.is_empty() { Vec::new() } else { self.topology.reach(node.id).into_iter().collect() };
        let hop = Hop {
            node: node.clone(),
            marks: Marks { bitmaps, reach, grows },
            holds: user != User::Locker
                && (fit.is_some() || copied_to || self.users.locked.contains(&node.id)),
            reads_hold: user != User::Locker && copied_to,
            alone: user == User::Copier,
            fit,
        };
        let traced = |op: usize| self.trace && HOP.slots()[op].is_some();
        // A discard that comes to nothing changes nothing, so there is nothing to mark.
        let ignored = |op: u32| op == op::DISCARD && self.placed.common.discards_nothing();
        let wants: [bool; op::COUNT] = std::array::from_fn(|at| {
            let op = at as u32;
            !self.edge.refuses(op) && (traced(at) || hop.wants(op)) && !ignored(op)
        });
        if !wants.contains(&true) {
            return self.plain.clone();
        }
        let cookie = node.id.0;
        let hop = if hop.only_marks() && !self.trace {
            Instance::new(Arc::new(Body { cookie, driver: MarkOnly(hop.marks) }), &MARK_ONLY)
        } else {
            Instance::new(Arc::new(Body { cookie, driver: hop }), &HOP)
        };
        let hop = Target::new(hop, vec![self.edge.clone()]);
        let route = |op: u32| if wants[op as usize] { Route::To(&hop) } else { Route::As(&self.edge) };
        Edge::new(*self.plain.info(), route)
    }
}
