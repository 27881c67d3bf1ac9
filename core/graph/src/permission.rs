//! Permissions: what each edge needs and lets others do, from the users down to the leaves.
//!
//! The rules are QEMU's (docs of its block layer, "permissions and roles"): a node needs what its parents need
//! together, tolerates what all of them tolerate, and its driver's kind and each child's role turn that into what
//! it needs of its children. Two parents conflict when one needs what the other does not share; then the error
//! names both users and the permission.

use crate::{
    common::NodeOptions,
    driver::Role,
    error::{Error, Kind, Result},
    node::NodeId,
    topology::{Attachment, Parent, Placed, Topology},
};
use driveline_op::Info;
use std::{collections::BTreeMap, fmt};

use self::Permissions as P;

/// Bits of what users of a node may do: what an edge needs, or what it lets others do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Permissions(pub u8);

impl Permissions {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Read data that makes sense.
    pub const CONSISTENT_READ: Self = Self(1);
    /// Write.
    pub const WRITE: Self = Self(2);
    /// Write what does not change the data seen.
    pub const WRITE_UNCHANGED: Self = Self(4);
    /// Change the size.
    pub const RESIZE: Self = Self(8);
    /// Everything.
    pub const ALL: Self = Self(15);

    const NAMES: [(Self, &'static str); 4] = [
        (Self::CONSISTENT_READ, "consistent read"),
        (Self::WRITE, "write"),
        (Self::WRITE_UNCHANGED, "write unchanged"),
        (Self::RESIZE, "resize"),
    ];

    /// Are all of `other` in it?
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Is any of `other` in it?
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Those of both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Those of either.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those that `other` lacks.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> =
            Self::NAMES.iter().filter(|(bit, _)| self.contains(*bit)).map(|(_, n)| *n).collect();
        f.write_str(if names.is_empty() { "nothing" } else { "" })?;
        f.write_str(&names.join(", "))
    }
}

impl fmt::Debug for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Permissions({self})")
    }
}

/// What a parent needs of a node and lets others do with it.
#[derive(Clone, Debug)]
struct Claim {
    parent: Parent,
    needs: P,
    shares: P,
}

/// What the users of a node need together, and tolerate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Granted {
    pub(crate) needs: P,
    pub(crate) shares: P,
}

impl Granted {
    /// Nobody needs anything of the node, or minds anything.
    pub(crate) fn is_unused(&self) -> bool {
        self.needs == P::NONE && self.shares == P::ALL
    }
}

/// Works out the permissions of a graph, or names the first conflict.
pub(crate) fn compute(topology: &Topology) -> Result<BTreeMap<NodeId, Granted>> {
    let mut claims: BTreeMap<NodeId, Vec<Claim>> = BTreeMap::new();
    for (id, attached) in &topology.roots {
        let node = topology.root_node(attached);
        let waits = attached.may_be_inactive && !topology.at(node).common.active;
        // Whoever serves a node by its place tells nobody that it grows. A resize is told of, and asked for apart from this.
        let shares = match attached.to {
            Attachment::Drive(_) | Attachment::Place(_) => attached.shares.without(P::RESIZE),
            Attachment::Node(_) => attached.shares,
        };
        let (needs, shares) = if waits { (P::NONE, P::ALL) } else { (attached.needs, shares) };
        claims.entry(node).or_default().push(Claim { parent: Parent::Root(*id), needs, shares });
    }
    let mut granted = BTreeMap::new();
    for id in topology.top_down() {
        let of_node = claims.remove(&id).unwrap_or_default();
        check(topology, id, &of_node)?;
        let needs = of_node.iter().fold(P::NONE, |all, claim| all.or(claim.needs));
        let shares = of_node.iter().fold(P::ALL, |all, claim| all.and(claim.shares));
        let placed = topology.at(id);
        // Who is inactive neither writes nor keeps others from it, and who shares by force shares writing.
        let shares = match placed.common {
            NodeOptions { active: false, .. } => P::ALL,
            NodeOptions { force_share: true, .. } => shares.or(P::WRITE).or(P::RESIZE),
            _ => shares,
        };
        let needs = if placed.common.active { needs } else { P::NONE };
        granted.insert(id, Granted { needs, shares });
        for (number, child) in placed.children.iter().enumerate() {
            let (needs, shares) = on_child_of(topology, placed, number, Granted { needs, shares });
            let parent = Parent::Node(id, child.name.clone());
            claims.entry(child.node).or_default().push(Claim { parent, needs, shares });
        }
    }
    Ok(granted)
}

/// A write at the end of a node whose size is no multiple of its alignment would have to make it longer. Who may do that is
/// welcome to; others are refused, in QEMU's words (block.c, `bdrv_node_check_perm`). As there, a size counts as whole sectors.
pub(crate) fn check_ends(
    topology: &Topology,
    granted: &BTreeMap<NodeId, Granted>,
    info: impl Fn(NodeId) -> Info,
) -> Result<()> {
    const SECTOR_BYTES: u64 = 512;
    for (id, granted) in granted {
        let info = info(*id);
        let sectors = info.size_bytes.div_ceil(SECTOR_BYTES).saturating_mul(SECTOR_BYTES);
        let fits = sectors.is_multiple_of(u64::from(info.request_alignment.max(1)));
        if !fits && granted.needs.contains(P::WRITE) && !granted.needs.contains(P::RESIZE) {
            let text = "Cannot get 'write' permission without 'resize': Image size is not a multiple of request \
                        alignment";
            return Err(Error::new(Kind::NotPermitted, text).at(&topology.name(*id)));
        }
    }
    Ok(())
}

/// What a node puts on one of its children, its `number`th, when it is granted this itself.
pub(crate) fn on_child_of(topology: &Topology, placed: &Placed, number: usize, granted: Granted) -> (P, P) {
    let (id, child) = (placed.node.id, &placed.children[number]);
    let (mut needs, mut shares) = on_child(child.role, granted.needs, granted.shares, placed.read_only);
    // What is about to be overwritten is read first, and nobody may write past the filter that does so.
    if child.role == Role::Filtered && topology.copies(id) {
        needs = needs.or(P::CONSISTENT_READ);
        if !topology.parents(id).is_empty() {
            shares = shares.without(P::WRITE.or(P::RESIZE));
        }
    }
    // What backs a target is what the filter above it protects, so it may change.
    if child.role == Role::Backing && (placed.was_target || topology.is_target(id)) {
        shares = shares.or(P::WRITE);
    }
    let own_writes = placed.node.driver.description().effects & driveline_op::effect::OWN_WRITES != 0;
    if own_writes && child.role == Role::Filtered && needs != P::NONE {
        needs = needs.or(P::WRITE_UNCHANGED);
    }
    if !placed.common.active {
        return (P::NONE, P::ALL);
    }
    let (takes, denies) = placed.node.open.claim(number, placed.read_only);
    let shares = shares.without(denies);
    let by_force = if placed.common.force_share { P::WRITE.or(P::RESIZE) } else { P::NONE };
    (needs.or(takes), shares.or(by_force))
}

/// What a node puts on a child, from what its own users need and share.
fn on_child(role: Role, needs: P, shares: P, read_only: bool) -> (P, P) {
    match role {
        // A filter stands for its child: it asks for what is asked of it.
        Role::Filtered => (needs, shares),
        // The format reads its metadata, and writes it whenever it may: nobody else may write below it.
        Role::Storage => {
            let writes = if read_only { P::NONE } else { P::WRITE.or(P::RESIZE) };
            (P::CONSISTENT_READ.or(writes), P::CONSISTENT_READ.or(P::WRITE_UNCHANGED))
        }
        Role::Data => {
            let writes = if needs.intersects(P::WRITE.or(P::WRITE_UNCHANGED)) { P::WRITE } else { P::NONE };
            let resize = needs.and(P::RESIZE);
            let needs = needs.and(P::CONSISTENT_READ).or(writes).or(resize);
            (needs, P::CONSISTENT_READ.or(P::WRITE_UNCHANGED).or(shares.and(P::WRITE)))
        }
        // Who takes no writes has nothing to put there.
        Role::Target if read_only => (P::CONSISTENT_READ, P::ALL.without(P::RESIZE)),
        // Only the size is fixed: it was compared once.
        Role::Target => (P::CONSISTENT_READ.or(P::WRITE), P::ALL.without(P::RESIZE)),
        // The filter below reads and copies for its own sake; who looks at the past needs nothing of the present.
        Role::PointInTime => (needs.and(P::CONSISTENT_READ), P::ALL),
        // An overlay that nobody uses minds nothing (what is left after a commit into its backing, say).
        Role::Backing if needs == P::NONE && shares == P::ALL => (P::NONE, P::ALL),
        // What is read through an overlay must not change under it.
        Role::Backing => (P::CONSISTENT_READ, P::CONSISTENT_READ.or(P::WRITE_UNCHANGED)),
    }
}

fn check(topology: &Topology, id: NodeId, claims: &[Claim]) -> Result<()> {
    let name = topology.name(id);
    let writes = P::WRITE.or(P::WRITE_UNCHANGED).or(P::RESIZE);
    let placed = topology.at(id);
    if placed.takes_no_writes()
        && let Some(claim) = claims.iter().find(|claim| claim.needs.intersects(writes))
    {
        let (user, needs) = (topology.describe(&claim.parent), claim.needs.and(writes));
        let what = if placed.common.active { "read-only" } else { "inactive" };
        let message = format_args!("it is {what}, and {user} needs {needs}");
        return Err(Error::new(Kind::NotPermitted, message).at(&name));
    }
    for a in claims {
        for b in claims {
            let missing = a.needs.without(b.shares);
            if missing == P::NONE || a.parent == b.parent || overrules(topology, &a.parent, &b.parent) {
                continue;
            }
            let (user, other) = (topology.describe(&a.parent), topology.describe(&b.parent));
            let message = format_args!("{user} needs '{missing}', which {other} does not share");
            return Err(Error::new(Kind::NotPermitted, message).at(&name));
        }
    }
    Ok(())
}

fn overrules(topology: &Topology, a: &Parent, b: &Parent) -> bool {
    match (a, b) {
        (Parent::Root(root), Parent::Node(node, _)) | (Parent::Node(node, _), Parent::Root(root)) => {
            topology.roots[root].overrules.contains(node)
        }
        _ => false,
    }
}
