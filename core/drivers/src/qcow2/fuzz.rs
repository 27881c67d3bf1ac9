//! What fuzzers feed: any bytes as an image.

use super::{CheckReport, CreateOptions, Preallocation, Qcow2Driver, Repair, check_image, create};
use crate::{
    MemoryDriver,
    conformance::{edge_to, open_node},
};
use driveline_bitmap::{Bits, Granularity};
use driveline_graph::{BitmapToStore, Driver, OpenChild, OpenNode};
use driveline_op::{Ask, Buffer, Call, op};
use futures::FutureExt;

/// Images of a few shapes to begin with, by seed.
#[doc(hidden)]
pub fn sample(seed: u64) -> Vec<u8> {
    let extended_l2 = seed.is_multiple_of(7);
    let options = CreateOptions {
        version: if extended_l2 { 3 } else { 2 + (seed / 2 % 2) as u32 },
        cluster_bytes: if extended_l2 { 16384 } else { [512, 4096, 1024][(seed % 3) as usize] },
        extended_l2,
        preallocation: if seed % 5 < 3 { Preallocation::Metadata } else { Preallocation::Off },
        ..CreateOptions::new(256 << 10)
    };
    let made = async {
        let size = serde_json::json!({ "size": "1MiB" });
        let memory = open_node(&MemoryDriver::default(), size, vec![]).await.expect("memory opens");
        create(&memory.edge, &options).await.expect("the image is made");
        if options.version > 2 && seed % 7 < 4 {
            let children = [memory.clone()];
            let none = serde_json::json!({});
            let image = open_node(&Qcow2Driver::new(), none, children.to_vec()).await.expect("it opens");
            store(&*image.node, &children, 256 << 10).await.expect("bitmaps are stored");
            image.node.close(&children).await.expect("it closes");
        }
        let ask = Ask { op: op::READ, ..Ask::default() };
        Call::new(&memory.edge, ask, Buffer::new(400 << 10)).await.buffer.to_vec()
    };
    made.now_or_never().expect("memory is always ready")
}

/// Two bitmaps, one with clusters of bits and one that is all ones.
async fn store(node: &dyn OpenNode, children: &[OpenChild], size_bytes: u64) -> driveline_graph::Result<()> {
    let sparse = Bits::new(Granularity::MIN, size_bytes);
    sparse.mark(10_000..30_000);
    let full = Bits::new(Granularity::MIN, size_bytes);
    full.mark(0..size_bytes);
    let bitmap = |name, bits| BitmapToStore {
        name,
        granularity: Granularity::MIN,
        recording: true,
        in_use: false,
        bits: Some(bits),
    };
    node.store_bitmaps(children, &[bitmap("sparse", &sparse), bitmap("full", &full)]).await
}

/// Opens the bytes as an image, read-only and writable, and uses it. Panics are bugs, and so is waiting for ever.
#[doc(hidden)]
pub fn run(bytes: &[u8]) {
    for read_only in [true, false] {
        use_image(bytes, read_only).now_or_never().expect("memory is always ready, so nothing waits");
    }
    for repair in [Repair::Nothing, Repair::Leaks, Repair::All] {
        check(bytes, repair).now_or_never().expect("memory is always ready, so nothing waits");
    }
}

async fn check(bytes: &[u8], repair: Repair) {
    let memory = memory(bytes).await;
    let Ok(report) = check_image(&memory.edge, repair).await else { return };
    // It may have grown.
    let memory = edge_to(MemoryDriver::default().description(), &*memory.node, &[]);
    let again = check_image(&memory, Repair::Nothing).await.expect("what could be checked still can");
    let left = |report: &CheckReport| (report.corruptions, report.leaks, report.check_errors);
    assert_eq!(left(&report), left(&again), "what is reported after a repair is what is left");
}

/// A file with these bytes, and room behind them.
async fn memory(bytes: &[u8]) -> driveline_graph::OpenChild {
    let size = (bytes.len() as u64).max(512) + (16 << 20);
    let options = serde_json::json!({ "size": size });
    let memory = open_node(&MemoryDriver::default(), options, vec![]).await.expect("memory opens");
    let ask = Ask { op: op::WRITE, ..Ask::default() };
    Call::new(&memory.edge, ask, Buffer::from(bytes)).await.result.expect("memory takes it");
    memory
}

async fn use_image(bytes: &[u8], read_only: bool) {
    let memory = memory(bytes).await;
    let ask = |op, offset, length| Ask { op, offset, length, ..Ask::default() };
    let args = crate::conformance::OpenNodeArgs { read_only, ..Default::default() };
    let Ok(image) = args.open(&Qcow2Driver::new(), serde_json::json!({}), vec![memory.clone()]).await else {
        return;
    };
    let children = [memory];
    let size = image.edge.info().size_bytes;
    // With the bitmaps that it has.
    let _ = image.node.take_snapshot(&children, "early").await;
    let _ = bitmaps(&*image.node, &children, size).await;
    for place in 0..4 {
        let offset = (size / 4).saturating_mul(place);
        let length = (size - offset).min(20_000);
        for op in [op::READ, op::BLOCK_STATUS, op::WRITE, op::READ, op::WRITE_ZEROES, op::DISCARD, op::FLUSH]
        {
            let buffer = if op == op::READ || op == op::WRITE { length as usize } else { 0 };
            if op == op::BLOCK_STATUS && length == 0 {
                continue;
            }
            // Errors are fine.
            let _ = Call::new(&image.edge, ask(op, offset, length), Buffer::new(buffer)).await;
        }
    }
    let cluster = vec![7; image.edge.info().cluster_bytes as usize];
    for offset in [0, 3 * cluster.len() as u64] {
        let _ = image.node.write_compressed(&children, offset, &cluster).await;
    }
    let _ = image.node.take_snapshot(&children, "taken").await;
    for snapshot in image.node.snapshots().iter().take(2) {
        let _ = image.node.apply_snapshot(&children, &snapshot.id).await;
        let _ = image.node.delete_snapshot(&children, &snapshot.id).await;
    }
    let _ = bitmaps(&*image.node, &children, size).await;
    let _ = image.node.resize(&children, size / 512 / 2 * 512).await;
    let _ = image.node.make_empty(&children).await;
    let _ = image.node.close(&children).await;
}

/// Lists and loads the bitmaps, flags them, and stores others.
async fn bitmaps(
    node: &dyn OpenNode,
    children: &[OpenChild],
    size_bytes: u64,
) -> driveline_graph::Result<()> {
    let stored = node.stored_bitmaps(children).await?.bitmaps;
    for bitmap in stored.iter().filter(|bitmap| bitmap.inconsistent.is_none()) {
        node.load_bitmap(children, &bitmap.name).await?;
    }
    for in_use in [false, true] {
        for bitmap in &stored {
            let _ = node.set_bitmaps_in_use(children, &[&bitmap.name], in_use).await;
        }
    }
    // What the image holds stays, if it can.
    let kept: Vec<_> = stored
        .iter()
        .map(|bitmap| BitmapToStore {
            name: &bitmap.name,
            granularity: bitmap.granularity.unwrap_or_default(),
            recording: bitmap.recording,
            in_use: true,
            bits: None,
        })
        .collect();
    let _ = node.store_bitmaps(children, &kept).await;
    if size_bytes < 1 << 30 {
        let _ = store(node, children, size_bytes).await;
    }
    node.store_bitmaps(children, &[]).await
}
