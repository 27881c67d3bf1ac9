//! Commands for people who look for mistakes: the graph with its permissions, and what is in a bitmap, as one number.

use crate::{
    bitmaps::BitmapRef,
    command::Nothing,
    error::{Error, Result},
    monitor::Monitor,
};
use driveline_bitmap::Bits;
use driveline_graph::{EdgeParent, Permissions};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{collections::BTreeMap, ops::Range};

/// QAPI's `BlockDirtyBitmapSha256`.
#[derive(Serialize, Deserialize)]
pub(crate) struct BitmapSha256 {
    sha256: String,
}

pub(crate) async fn bitmap_sha256(monitor: &Monitor, bitmap: BitmapRef) -> Result<BitmapSha256> {
    let BitmapRef { node, name } = bitmap;
    let graph = monitor.graph();
    graph.node_or_drive(&node).map_err(|_| Error::generic(format_args!("Node '{node}' not found")))?;
    let bitmap = graph
        .bitmap(&node, &name)
        .map_err(|_| Error::generic(format_args!("Dirty bitmap '{name}' not found")))?;
    Ok(BitmapSha256 { sha256: sha256(bitmap.bits()) })
}

/// As QEMU does it: of the bits as little-endian words of 64 granules, one word at least.
/// Source: QEMU util/hbitmap.c, `hbitmap_sha256`.
fn sha256(bits: &Bits) -> String {
    const BYTES: u64 = 16 << 10;
    let total = bits.granules().div_ceil(64).max(1) * 8;
    let shift = bits.granularity().shift();
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; BYTES as usize];
    for start in (0..total).step_by(BYTES as usize) {
        let granules = start * 8..((start + BYTES) * 8).min(bits.granules());
        buffer.fill(0);
        let mut from = granules.start << shift;
        let end = (granules.end << shift).min(bits.length());
        while let Some(dirty) = (from < end).then(|| bits.next_dirty(from)).flatten().filter(|at| *at < end) {
            let clean = bits.next_clean(dirty).unwrap_or(end).min(end);
            let of_buffer = |granule: u64| granule - granules.start;
            set(&mut buffer, of_buffer(dirty >> shift)..of_buffer(clean.div_ceil(1 << shift)));
            from = clean;
        }
        hash.update(&buffer[..(total - start).min(BYTES) as usize]);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Sets bits, the lowest of each byte first.
fn set(bytes: &mut [u8], bits: Range<u64>) {
    let (mut at, end) = (bits.start, bits.end);
    while at < end {
        let byte = (at / 8) as usize;
        if at.is_multiple_of(8) && end - at >= 8 {
            bytes[byte] = 0xFF;
            at += 8;
        } else {
            bytes[byte] |= 1 << (at % 8);
            at += 1;
        }
    }
}

/// QAPI's `XDbgBlockGraph`.
#[derive(Serialize, Deserialize)]
pub(crate) struct BlockGraph {
    nodes: Vec<GraphNode>,
    edges: Vec<GraphEdge>,
}

#[derive(Serialize, Deserialize)]
struct GraphNode {
    id: u64,
    r#type: NodeType,
    name: String,
}

/// QAPI's `XDbgBlockGraphNodeType`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(clippy::enum_variant_names, reason = "the words are QEMU's")]
enum NodeType {
    BlockBackend,
    BlockJob,
    BlockDriver,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct GraphEdge {
    parent: u64,
    child: u64,
    name: String,
    perm: Vec<Permission>,
    shared_perm: Vec<Permission>,
}

/// QAPI's `BlockPermission`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Permission {
    ConsistentRead,
    Write,
    WriteUnchanged,
    Resize,
}

fn permissions(of: Permissions) -> Vec<Permission> {
    [
        (Permissions::CONSISTENT_READ, Permission::ConsistentRead),
        (Permissions::WRITE, Permission::Write),
        (Permissions::WRITE_UNCHANGED, Permission::WriteUnchanged),
        (Permissions::RESIZE, Permission::Resize),
    ]
    .into_iter()
    .filter_map(|(bit, name)| of.contains(bit).then_some(name))
    .collect()
}

/// Users from outside are block backends, by who they are; those of jobs are jobs, by their ids.
pub(crate) async fn query_block_graph(monitor: &Monitor, _: Nothing) -> Result<BlockGraph> {
    let graph = monitor.graph();
    let (edges, views) = (graph.edges(), graph.nodes());
    let mut ids: BTreeMap<EdgeParent, u64> = BTreeMap::new();
    let mut nodes = Vec::new();
    let parents = edges.iter().map(|edge| edge.parent.clone());
    for end in parents.chain(views.iter().map(|view| EdgeParent::Node(view.node.name().into()))) {
        if ids.contains_key(&end) {
            continue;
        }
        let id = ids.len() as u64 + 1;
        let (r#type, name) = match &end {
            EdgeParent::Node(name) => (NodeType::BlockDriver, name.to_string()),
            EdgeParent::Root(_, user) => {
                match user.strip_prefix("job '").and_then(|id| id.strip_suffix('\'')) {
                    Some(id) => (NodeType::BlockJob, id.to_owned()),
                    None => (NodeType::BlockBackend, user.clone()),
                }
            }
        };
        ids.insert(end, id);
        nodes.push(GraphNode { id, r#type, name });
    }
    let edge = |edge: driveline_graph::EdgeView| {
        Some(GraphEdge {
            parent: *ids.get(&edge.parent)?,
            // A node that came between the two looks is left out.
            child: *ids.get(&EdgeParent::Node(edge.child))?,
            name: edge.name,
            perm: permissions(edge.needs),
            shared_perm: permissions(edge.shares),
        })
    };
    Ok(BlockGraph { edges: edges.into_iter().filter_map(edge).collect(), nodes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use driveline_bitmap::Granularity;
    use proptest::prelude::*;

    /// The same, bit by bit.
    fn slowly(bits: &Bits) -> String {
        let mut bytes = vec![0; (bits.granules().div_ceil(64).max(1) * 8) as usize];
        for granule in 0..bits.granules() {
            if bits.is_dirty(granule << bits.granularity().shift()) {
                bytes[(granule / 8) as usize] |= 1 << (granule % 8);
            }
        }
        Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    proptest! {
        #[test]
        fn a_bitmap_is_hashed_as_qemu_does(
            length in 0u64..20_000_000,
            dirty in proptest::collection::vec((0u64..20_000_000, 1u64..1_000_000), 0..6),
        ) {
            let bits = Bits::new(Granularity::new(512).unwrap(), length);
            for (start, size) in dirty {
                let range = start.min(length)..(start + size).min(length);
                if !range.is_empty() {
                    bits.mark(range);
                }
            }
            prop_assert_eq!(sha256(&bits), slowly(&bits));
        }
    }
}
