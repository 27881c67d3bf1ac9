//! What qcow2 adds to a request: the same on memory, and on an image in memory.

#![allow(missing_docs)] // what criterion_group! makes has none

use criterion::{Criterion, criterion_group, criterion_main};
use driveline_drivers::{
    MemoryDriver,
    conformance::open_node,
    qcow2::{CreateOptions, Preallocation, Qcow2Driver, create},
};
use driveline_op::{Ask, Buffer, Call, Edge, op};
use futures::executor::block_on;
use std::hint::black_box;

const SIZE: u64 = 64 << 20;

fn request(edge: &Edge, op: u32, offset: u64, buffer: Buffer) -> Buffer {
    let answer = block_on(Call::new(edge, Ask { op, offset, ..Ask::default() }, buffer));
    answer.result.expect("memory does not fail");
    answer.buffer
}

fn qcow2(c: &mut Criterion) {
    let (memory, image) = block_on(async {
        let new = async || {
            let options = serde_json::json!({ "size": SIZE * 2 });
            open_node(&MemoryDriver::default(), options, vec![]).await.expect("it opens")
        };
        let memory = new().await;
        let options = CreateOptions { preallocation: Preallocation::Metadata, ..CreateOptions::new(SIZE) };
        create(&memory.edge, &options).await.expect("it is made");
        let image = open_node(&Qcow2Driver::new(), serde_json::json!({}), vec![memory]).await;
        (new().await, image.expect("it opens"))
    });
    let mut group = c.benchmark_group("4 KiB, random");
    for (name, edge) in [("memory", &memory.edge), ("qcow2", &image.edge)] {
        for (what, op) in [("read", op::READ), ("write", op::WRITE)] {
            let mut buffer = Buffer::new(4096);
            let mut at = 1u64;
            group.bench_function(format!("{what}, {name}"), |b| {
                b.iter(|| {
                    at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    buffer =
                        request(edge, op, ((at >> 20) % (SIZE - 4096)) & !4095, std::mem::take(&mut buffer));
                    black_box(&buffer);
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, qcow2);
criterion_main!(benches);
