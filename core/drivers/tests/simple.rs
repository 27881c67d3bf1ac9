//! The drivers without I/O: null, memory, raw.

use driveline_drivers::{
    FileDriver, MemoryDriver, NullDriver, RawDriver,
    conformance::{Check, OpenNodeArgs, check, edge_to, open_node, options_of},
};
use driveline_graph::{Driver, Kind, OpenChild};
use driveline_op::{Answer, Ask, Buffer, Call, Edge, op, status};
use futures::executor::block_on;
use serde_json::json;

fn run(edge: &Edge, op: u32, offset: u64, length: u64, data: &[u8]) -> Answer {
    let ask = Ask { op, offset, length, ..Ask::default() };
    block_on(Call::new(edge.clone(), ask, Buffer::from(data)))
}

fn memory(size: &str) -> OpenChild {
    block_on(open_node(&MemoryDriver::default(), json!({ "size": size }), vec![])).unwrap()
}

fn raw(options: serde_json::Value, child: &OpenChild) -> driveline_graph::Result<OpenChild> {
    block_on(open_node(&RawDriver::default(), options, vec![child.clone()]))
}

#[test]
fn options_are_those_of_the_description() {
    options_of(&NullDriver::default(), json!({ "size": 512, "read-zeroes": false, "latency-ns": 1 }));
    options_of(&MemoryDriver::default(), json!({ "size": "1MiB" }));
    options_of(&RawDriver::default(), json!({ "offset": "4KiB", "size": 512 }));
}

#[test]
fn the_option_tables_of_the_docs_are_complete() {
    for (doc, driver) in [
        (include_str!("../src/file/mod.rs"), &FileDriver::default() as &dyn Driver),
        (include_str!("../src/memory/mod.rs"), &MemoryDriver::default()),
        (include_str!("../src/null/mod.rs"), &NullDriver::default()),
        (include_str!("../src/raw/mod.rs"), &RawDriver::default()),
    ] {
        let rows = doc.lines().filter_map(|line| line.strip_prefix("//! | `")?.split('`').next());
        let description = driver.description();
        let children = description.children.iter().map(|child| &*child.name);
        let takes = children.chain(description.options.iter().map(|option| &**option));
        assert!(rows.eq(takes), "the table of '{}' lists its options in their order", description.name);
    }
}

#[test]
fn sizes_that_no_offset_reaches_are_refused() {
    for driver in [&NullDriver::default() as &dyn Driver, &MemoryDriver::default(), &RawDriver::default()] {
        let options = json!({ "size": u64::MAX }).as_object().unwrap().clone();
        let error = driver.check(&options).unwrap_err();
        assert_eq!((error.kind(), error.option()), (Kind::Invalid, Some("size")), "{error}");
    }
}

#[test]
fn null_reads_zeroes_or_leaves_memory_alone() {
    for (zeroes, byte) in [(true, 0), (false, 7)] {
        let options = json!({ "size": "1MiB", "read-zeroes": zeroes });
        let node = block_on(open_node(&NullDriver::default(), options, vec![])).unwrap();
        assert_eq!(node.edge.info().size_bytes, 1 << 20);
        assert_eq!(run(&node.edge, op::READ, 0, 0, &[7; 64]).buffer[..], [byte; 64]);
        assert!(run(&node.edge, op::WRITE, (1 << 20) - 64, 0, &[7; 64]).result.is_ok());
        assert_eq!(run(&node.edge, op::WRITE, (1 << 20) - 63, 0, &[7; 64]).result.unwrap_err().code(), 22);
    }
}

#[test]
fn null_takes_the_time_that_it_is_told_to() {
    let engine = driveline_engine::Engine::start(driveline_engine::Config::default()).unwrap();
    let options = json!({ "latency-ns": 3_000_000 });
    let node = block_on(open_node(&NullDriver::default(), options, vec![])).unwrap();
    let begin = std::time::Instant::now();
    let answer = engine.block_on_local(|| Call::new(node.edge, Ask::default(), Buffer::new(512)));
    assert!(answer.result.is_ok() && begin.elapsed().as_millis() >= 3);
}

#[test]
fn memory_and_its_windows_conform() {
    let memory = memory("1MiB");
    block_on(check(&memory.edge, Check { seed: 1, ..Check::default() }));
    let all = raw(json!({}), &memory).unwrap();
    block_on(check(&all.edge, Check { seed: 2, steps: 100, ..Check::default() }));
    let window = raw(json!({ "offset": 5000, "size": 300_001 }), &memory).unwrap();
    block_on(check(&window.edge, Check { seed: 3, steps: 200, ..Check::default() }));
}

#[test]
fn memory_is_sparse_and_gives_back_what_is_zeroed() {
    let node = memory("1PiB");
    let allocated = || node.node.details()["allocated-bytes"].as_u64().unwrap();
    run(&node.edge, op::WRITE, 1 << 49, 0, &[1; 100]).result.unwrap();
    assert!((1..=65536).contains(&allocated()));
    let answer = run(&node.edge, op::BLOCK_STATUS, 0, 1 << 50, &[]);
    assert_eq!((answer.status.flags, answer.status.length), (status::ZERO, 1 << 49));
    run(&node.edge, op::WRITE_ZEROES, 0, 1 << 50, &[]).result.unwrap();
    assert_eq!(allocated(), 0);
}

#[test]
fn memory_grows_with_writes_and_does_not_remember_what_was_cut_off() {
    let node = memory("4KiB");
    run(&node.edge, op::WRITE, 8000, 0, &[9; 1000]).result.unwrap();
    assert_eq!(node.node.info(&[]).size_bytes, 9000);
    block_on(node.node.resize(&[], 8500)).unwrap();
    block_on(node.node.resize(&[], 9000)).unwrap();
    let found = run(&node.edge, op::READ, 8000, 0, &[1; 1000]).buffer;
    assert_eq!((&found[..500], &found[500..]), (&[9; 500][..], &[0; 500][..]));
}

#[test]
fn read_only_memory_refuses_writes_until_it_is_writable() {
    let args = OpenNodeArgs { read_only: true, ..OpenNodeArgs::default() };
    let node = block_on(args.open(&MemoryDriver::default(), json!({ "size": 512 }), vec![])).unwrap();
    assert_eq!(run(&node.edge, op::WRITE, 0, 0, &[1]).result.unwrap_err().code(), 1);
    block_on(node.node.set_read_only(&[], false)).unwrap();
    assert!(run(&node.edge, op::WRITE, 0, 0, &[1]).result.is_ok());
}

#[test]
fn a_window_keeps_to_itself() {
    let memory = memory("64KiB");
    run(&memory.edge, op::WRITE, 0, 0, &[3; 65536]).result.unwrap();
    let window = raw(json!({ "offset": "4KiB", "size": "8KiB" }), &memory).unwrap();
    assert_eq!(window.edge.info().size_bytes, 8192);
    run(&window.edge, op::WRITE, 0, 0, &[4; 8192]).result.unwrap();
    for (offset, length) in [(8191, 2), (8192, 1), (u64::MAX, 2), (u64::MAX - 4000, 4096)] {
        assert_eq!(run(&window.edge, op::WRITE, offset, 0, &vec![5; length]).result.unwrap_err().code(), 22);
        assert_eq!(
            run(&window.edge, op::WRITE_ZEROES, offset, length as u64, &[]).result.unwrap_err().code(),
            22
        );
    }
    let found = run(&memory.edge, op::READ, 0, 0, &[0; 65536]).buffer;
    let (before, rest) = found.split_at(4096);
    let (inside, after) = rest.split_at(8192);
    assert!(before.iter().chain(after).all(|byte| *byte == 3) && inside.iter().all(|byte| *byte == 4));
    let answer = run(&window.edge, op::BLOCK_STATUS, 100, 8000, &[]);
    assert_eq!((answer.status.map, answer.status.length), (4196, 8000), "the map counts as the child does");
}

#[test]
fn raw_without_a_window_is_not_on_the_path() {
    let memory = memory("64KiB");
    let all = raw(json!({}), &memory).unwrap();
    for number in 0..op::COUNT as u32 {
        assert!(all.edge.same_route(&memory.edge, number), "{}", op::NAMES[number as usize]);
    }
}

#[test]
fn a_window_that_does_not_fit_is_refused_by_name() {
    let memory = memory("64KiB");
    for (options, key) in
        [(json!({ "offset": "65KiB" }), "offset"), (json!({ "offset": "60KiB", "size": "5KiB" }), "size")]
    {
        let error = raw(options, &memory).map(drop).unwrap_err();
        assert_eq!((error.kind(), error.option()), (Kind::OutOfRange, Some(key)), "{error}");
    }
}

#[test]
fn raw_follows_its_child_and_resizes_it() {
    let memory = memory("64KiB");
    let driver = RawDriver::default();
    let tail = raw(json!({ "offset": "4KiB" }), &memory).unwrap();
    let child = [memory.clone()];
    block_on(tail.node.resize(&child, 8192)).unwrap();
    assert_eq!(memory.node.info(&[]).size_bytes, 12288);
    let child =
        [OpenChild { edge: edge_to(MemoryDriver::default().description(), &*memory.node, &[]), ..memory }];
    assert_eq!(edge_to(driver.description(), &*tail.node, &child).info().size_bytes, 8192);
    let fixed = raw(json!({ "size": 512 }), &child[0]).unwrap();
    assert_eq!(block_on(fixed.node.resize(&child, 1024)).unwrap_err().kind(), Kind::NotSupported);
}
