//! A check is worth what it finds: each fault here is a way in which a driver could be wrong.

use super::{Check, check, check_with, open_node};
use crate::MemoryDriver;
use driveline_op::{Answer, Ask, Buffer, Call, op, status};
use futures::executor::block_on;
use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
};

const CHECK: Check =
    Check { seed: 7, steps: 300, size_bytes_max: 1 << 20, length_bytes_max: 64 << 10, concurrency: 4 };

/// What the check says about memory with a fault: changes to what is asked and to what is answered.
fn verdict(before: impl Fn(&mut Ask, &mut Buffer), after: impl Fn(&Ask, &mut Answer)) -> String {
    let options = serde_json::json!({ "size": "1MiB" });
    let node = block_on(open_node(&MemoryDriver::default(), options, vec![])).unwrap();
    let run = async |mut ask: Ask, mut buffer: Buffer| {
        before(&mut ask, &mut buffer);
        let mut answer = Call::new(node.edge.clone(), ask, buffer).await;
        after(&ask, &mut answer);
        answer
    };
    let checked = catch_unwind(AssertUnwindSafe(|| block_on(check_with(*node.edge.info(), CHECK, run))));
    checked.map_or_else(
        |payload| payload.downcast_ref::<String>().cloned().unwrap_or_default(),
        |()| String::new(),
    )
}

fn nothing(_: &mut Ask, _: &mut Buffer) {}
fn honest(_: &Ask, _: &mut Answer) {}

#[test]
fn a_node_without_fault_passes() {
    assert_eq!(verdict(nothing, honest), "");
    let options = serde_json::json!({ "size": 100_001 });
    block_on(async {
        let node = open_node(&MemoryDriver::default(), options, vec![]).await.unwrap();
        check(&node.edge, CHECK).await;
    });
}

#[test]
fn lost_and_misplaced_data_is_found() {
    let count = Cell::new(0);
    let every_40th = || {
        count.set(count.get() + 1);
        count.get() % 40 == 0
    };
    let lost = |ask: &mut Ask, _: &mut Buffer| {
        if ask.op == op::WRITE && every_40th() {
            ask.op = op::CACHE;
        }
    };
    assert!(verdict(lost, honest).contains("reads as"));
    let shifted = |ask: &mut Ask, _: &mut Buffer| {
        if ask.op == op::WRITE && ask.offset > 0 && every_40th() {
            ask.offset -= 1;
        }
    };
    assert!(verdict(shifted, honest).contains("reads as"));
    let scribbled = |ask: &Ask, answer: &mut Answer| {
        if ask.op == op::WRITE && answer.buffer.len() > 1 && every_40th() {
            answer.buffer[0] ^= 1;
        }
    };
    assert!(verdict(nothing, scribbled).contains("changed the memory"));
}

#[test]
fn zeroes_that_are_not_are_found() {
    let short = |ask: &mut Ask, _: &mut Buffer| {
        if ask.op == op::WRITE_ZEROES && ask.length > 512 {
            ask.length -= 1;
        }
    };
    assert!(verdict(short, honest).contains("reads as"));
    let long = |ask: &mut Ask, _: &mut Buffer| {
        if ask.op == op::DISCARD && ask.length > 0 && ask.offset + ask.length < 1 << 20 {
            ask.length += 1;
        }
    };
    assert!(verdict(long, honest).contains("reads as"));
    let refused = |ask: &Ask, answer: &mut Answer| {
        if ask.op == op::WRITE_ZEROES && ask.flags == 0 && ask.length > 0 {
            answer.result = Err(driveline_op::Error::NOT_SUPPORTED);
        }
    };
    assert!(verdict(nothing, refused).contains("write_zeroes failed"));
}

#[test]
fn untrue_extents_are_found() {
    let extent = |change: fn(&Ask, &mut Answer)| {
        verdict(nothing, move |ask, answer| {
            if ask.op == op::BLOCK_STATUS {
                change(ask, answer);
            }
        })
    };
    assert!(extent(|_, answer| answer.status.flags = status::ZERO).contains("claims to be zero"));
    assert!(extent(|_, answer| answer.status.length = 0).contains("does not lie in the range"));
    assert!(
        extent(|ask, answer| answer.status.length = ask.length + 1).contains("does not lie in the range")
    );
    assert!(
        extent(|_, answer| (answer.status.flags, answer.status.depth) = (status::DATA, 0))
            .contains("no layer")
    );
}
