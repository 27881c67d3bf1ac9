//! What a request through an edge costs, down to drivers that complete it at once.

#![allow(missing_docs)] // what criterion_group! makes has none

use criterion::{Criterion, criterion_group, criterion_main};
use driveline_drivers::{
    FileDriver, MemoryDriver, NullDriver, RawDriver,
    conformance::{OpenNodeArgs, open_node},
};
use driveline_graph::OpenChild;
use driveline_op::{Ask, Buffer, Call, Edge, op};
use futures::executor::block_on;
use serde_json::json;
use std::{
    fs::File,
    hint::black_box,
    os::unix::fs::FileExt,
    pin::pin,
    task::{Context, Poll, Waker},
};

const BYTES: usize = 4096;
const FILE_BYTES: u64 = 16 << 20;

/// One request, which nearly always completes at its first poll; the buffer comes back.
fn once(edge: &Edge, op: u32, offset: u64, buffer: Buffer) -> Buffer {
    let call = Call::new(edge, Ask { op, offset, ..Ask::default() }, buffer);
    let mut call = pin!(call);
    let answer = match call.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => answer,
        Poll::Pending => block_on(call), // the disk was slow just now, so the engine waits elsewhere
    };
    answer.result.unwrap();
    answer.buffer
}

fn measure(c: &mut Criterion, name: &str, node: &OpenChild) {
    for (what, op) in [("read", op::READ), ("write", op::WRITE)] {
        let (mut buffer, mut offset) = (Buffer::new(BYTES), 0);
        c.bench_function(&format!("{name} {what} 4 KiB"), |bencher| {
            bencher.iter(|| {
                offset = (offset + 5 * BYTES as u64) % FILE_BYTES;
                buffer = once(&node.edge, op, offset, std::mem::take(&mut buffer));
                black_box(&buffer);
            });
        });
    }
}

fn request(c: &mut Criterion) {
    let size = json!({ "size": FILE_BYTES });
    let bare = json!({ "size": FILE_BYTES, "read-zeroes": false });
    let null = block_on(open_node(&NullDriver::default(), bare, vec![])).unwrap();
    measure(c, "null", &null);
    let memory = block_on(open_node(&MemoryDriver::default(), size, vec![])).unwrap();
    measure(c, "memory", &memory);
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("a.img");
    let plain = File::create_new(&path).unwrap();
    plain.write_all_at(&vec![1; FILE_BYTES as usize], 0).unwrap();
    let args = OpenNodeArgs { directory: folder.path().to_owned(), ..OpenNodeArgs::default() };
    let file = block_on(args.open(&FileDriver::default(), json!({ "path": "a.img" }), vec![])).unwrap();
    measure(c, "file", &file);
    let window = json!({ "size": FILE_BYTES });
    measure(
        c,
        "raw window on file",
        &block_on(open_node(&RawDriver::default(), window, vec![file])).unwrap(),
    );
    let plain = File::open(&path).unwrap();
    let (mut buffer, mut offset) = (Buffer::new(BYTES), 0);
    c.bench_function("pread 4 KiB, for comparison", |bencher| {
        bencher.iter(|| {
            offset = (offset + 5 * BYTES as u64) % FILE_BYTES;
            plain.read_exact_at(&mut buffer, offset).unwrap();
            black_box(&buffer);
        });
    });
}

criterion_group!(benches, request);
criterion_main!(benches);
