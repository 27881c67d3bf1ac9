//! Requests and their answers, in every form that can be agreed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, atomic::Ordering};

use driveline_bitmap::{Bitmap, BitmapName};
use driveline_nbd::wire::*;
use driveline_nbd::{Export, Exports, PAYLOAD_BYTES_MAX, REQUESTS_MAX, Transport};
use driveline_op::{Info, flag, op};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::client::{Client, MODES, Mode};
use crate::memory::Memory;
use crate::{connect, exports_of, next_turn};

const NONE: CommandFlags = CommandFlags::EMPTY;

#[test]
fn random_requests_leave_what_an_oracle_expects() {
    const SIZE: u64 = 1 << 20;
    for (seed, mode) in (1..).zip(MODES) {
        for delays in [0, 3] {
            let memory = Memory::new(SIZE as usize).slow(delays);
            let exports = exports_of(memory.clone());
            let ((), oracle) = {
                let (outcome, oracle) = connect(&exports, async |pipe| {
                    let mut client = Client::go(pipe, mode, &[]).await;
                    let mut random = SmallRng::seed_from_u64(seed);
                    let mut oracle = vec![0; SIZE as usize];
                    for _ in 0..40 {
                        // A group of requests on the wire at once, each in its own part of the disk: their order is free.
                        let mut expected = HashMap::new();
                        let group = random.random_range(1..30);
                        for part in 0..group {
                            let part_bytes = SIZE / group;
                            let offset = part * part_bytes + random.random_range(0..part_bytes / 2);
                            let length = random.random_range(0..part_bytes / 2);
                            let range = offset as usize..(offset + length) as usize;
                            let cookie = match random.random_range(0..5) {
                                0 | 1 => {
                                    let data: Vec<u8> = range.clone().map(|_| random.random()).collect();
                                    oracle[range].copy_from_slice(&data);
                                    client.request(Command::WRITE, NONE, offset, length, &data).await
                                }
                                2 => {
                                    oracle[range].fill(0);
                                    client.request(Command::WRITE_ZEROES, NONE, offset, length, &[]).await
                                }
                                3 => client.request(Command::FLUSH, NONE, 0, 0, &[]).await,
                                _ => {
                                    let cookie =
                                        client.request(Command::READ, NONE, offset, length, &[]).await;
                                    expected.insert(cookie, oracle[range].to_vec());
                                    cookie
                                }
                            };
                            expected.entry(cookie).or_default();
                        }
                        while !expected.is_empty() {
                            let (cookie, answer) = client.answer().await.unwrap();
                            assert_eq!(answer.errno, Errno::OK, "{}", answer.message);
                            assert!(expected.remove(&cookie).unwrap() == answer.data);
                        }
                    }
                    client.leave().await;
                    oracle
                });
                (outcome.unwrap(), oracle)
            };
            assert!(memory.inner().data.lock().bytes == oracle);
        }
    }
}

#[test]
fn errors_reach_the_client_in_every_form_and_the_next_request_works() {
    for mode in MODES {
        let memory = Memory::new(1 << 20);
        let exports = exports_of(memory.clone());
        connect(&exports, async |pipe| {
            let mut client = Client::go(pipe, mode, &[]).await;
            let end = 1 << 20;
            for (command, flags, offset, length, errno) in [
                (Command::READ, NONE, end - 1, 2, Errno::EINVAL),
                (Command::READ, NONE, u64::MAX, 1, Errno::EINVAL),
                (Command::READ, CommandFlags::NO_HOLE, 0, 1, Errno::EINVAL),
                (Command::TRIM, NONE, end, 1, Errno::EINVAL),
                (Command::WRITE_ZEROES, NONE, end, 1, Errno::ENOSPC),
                (Command::BLOCK_STATUS, NONE, 0, 1, Errno::EINVAL),
                (Command::RESIZE, NONE, 0, 1, Errno::EINVAL),
                (Command(77), NONE, 0, 1, Errno::EINVAL),
                (Command::FLUSH, CommandFlags(1 << 15), 0, 0, Errno::EINVAL),
            ] {
                let answer = client.call(command, flags, offset, length, &[]).await;
                assert_eq!(answer.errno, errno, "{command} in {mode:?}");
                assert_eq!(mode == Mode::Simple, answer.message.is_empty());
            }
            assert_eq!(client.write(end - 1, &[1, 2]).await.errno, Errno::ENOSPC);
            for (system, errno) in
                [(libc::EIO, Errno::EIO), (libc::EDQUOT, Errno::ENOSPC), (libc::ENOTSUP, Errno::EINVAL)]
            {
                *memory.inner().errno.lock() = Some(system);
                assert_eq!(client.read(0, 10).await.errno, errno);
                assert_eq!(client.write(0, &[0; 10]).await.errno, errno);
            }
            let zeroes = |flags| (Command::WRITE_ZEROES, flags, 0, 10);
            for ((command, flags, offset, length), errno) in [
                (zeroes(CommandFlags::FAST_ZERO), Errno::ENOTSUP),
                (zeroes(NONE), Errno::EINVAL),
                ((Command::TRIM, NONE, 0, 10), Errno::OK),
                ((Command::CACHE, NONE, 0, 10), Errno::OK),
            ] {
                assert_eq!(client.call(command, flags, offset, length, &[]).await.errno, errno);
            }
            *memory.inner().errno.lock() = None;
            assert_eq!(client.read(0, 10).await.errno, Errno::OK);
            client.leave().await;
        })
        .0
        .unwrap();
    }
}

#[test]
fn flags_and_ranges_reach_storage_in_its_own_words() {
    let memory = Memory::new(1 << 20);
    let exports = exports_of(memory.clone());
    connect(&exports, async |pipe| {
        let mut client = Client::go(pipe, Mode::Extended, &[]).await;
        let fua = CommandFlags::FUA;
        client.call(Command::WRITE, fua, 512, 4, b"data").await;
        client.call(Command::TRIM, fua, 0, 1 << 20, &[]).await;
        client.call(Command::READ, fua, 512, 4, &[]).await;
        client.call(Command::FLUSH, NONE, 0, 0, &[]).await;
        client.call(Command::CACHE, NONE, 4096, 8192, &[]).await;
        client.call(Command::WRITE_ZEROES, NONE, 0, 512, &[]).await;
        let all = fua | CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO;
        client.call(Command::WRITE_ZEROES, all, 0, 512, &[]).await;
        client.leave().await;
    })
    .0
    .unwrap();
    let asks = memory.inner().asks.lock();
    let asks: Vec<_> = asks.iter().map(|ask| (ask.op, ask.flags, ask.offset, ask.length)).collect();
    assert_eq!(
        asks,
        [
            (op::WRITE, flag::FUA, 512, 4),
            (op::DISCARD, flag::FUA, 0, 1 << 20),
            (op::READ, 0, 512, 4),
            (op::FLUSH, 0, 0, 0),
            (op::CACHE, 0, 4096, 8192),
            (op::WRITE_ZEROES, flag::MAY_UNMAP, 0, 512),
            (op::WRITE_ZEROES, flag::FUA | flag::NO_FALLBACK, 0, 512),
        ]
    );
}

#[test]
fn the_largest_payload_passes_and_a_larger_one_is_read_over() {
    let length = u64::from(PAYLOAD_LENGTH_MAX);
    for mode in MODES {
        let exports = exports_of(Memory::new(40 << 20));
        connect(&exports, async |pipe| {
            let mut client = Client::go(pipe, mode, &[]).await;
            let data: Vec<u8> = (0..=length).map(|i| (i / 1000) as u8).collect();
            // The pipe holds less than the payload, so writing and answering go on at once.
            assert_eq!(client.write(7, &data[..length as usize]).await.errno, Errno::OK);
            assert!(client.read(7, length).await.data == data[..length as usize]);
            assert_eq!(client.read(0, length + 1).await.errno, Errno::EOVERFLOW);
            assert_eq!(client.write(0, &data).await.errno, Errno::EOVERFLOW);
            assert_eq!(client.read(7, 2).await.data, data[..2]);
            client.leave().await;
        })
        .0
        .unwrap();
    }
}

#[test]
fn a_client_that_takes_no_answers_is_not_read_from_for_ever() {
    let memory = Memory::new(1 << 20).slow(300);
    let exports = exports_of(memory.clone());
    let _ = connect(&exports, async |pipe| {
        let client = Client::go(pipe, Mode::Structured, &[]).await;
        let mut out = Vec::new();
        for cookie in 0..10_000 {
            Request {
                flags: NONE,
                command: Command::READ,
                cookie: Cookie(cookie),
                offset: 0,
                length: 64 << 10,
            }
            .encode(Headers::Compact, &mut out);
        }
        let sending = async {
            client.pipe.write_all(&[std::io::IoSlice::new(&out)]).await.unwrap();
        };
        let mut sending = std::pin::pin!(sending);
        // Give the server every chance to take more than it should.
        for _ in 0..1000 {
            assert!(futures::poll!(&mut sending).is_pending(), "the server keeps reading");
            next_turn().await;
        }
    });
    let begun = memory.inner().asks.lock().len();
    assert!((1..=REQUESTS_MAX).contains(&begun), "{begun} requests");
    assert!(begun * (64 << 10) <= PAYLOAD_BYTES_MAX);
    assert!(memory.inner().running_max.load(Ordering::Relaxed) >= 64, "at least 64 at once");
}

fn bitmap(name: &str, size: u64) -> Arc<Bitmap> {
    Arc::new(Bitmap::new(BitmapName::new(name).unwrap(), "64KiB".parse().unwrap(), size))
}

const CONTEXTS: [&str; 3] = ["qemu:dirty-bitmap:daily", "base:allocation", "qemu:allocation-depth"];

#[test]
fn block_status_tells_holes_layers_and_dirty_areas() {
    for mode in [Mode::Structured, Mode::Extended] {
        let daily = bitmap("daily", 1 << 20);
        let exports = Exports::default();
        let memory = Memory::new(1 << 20);
        let export = Export::new(memory).writable(true).bitmap(Arc::clone(&daily));
        exports.add("disk", export).unwrap();
        connect(&exports, async |pipe| {
            let mut client = Client::go(pipe, mode, &CONTEXTS).await;
            client.write(8192, &[1; 8192]).await;
            daily.mark(70_000..70_001);
            let ask = async |client: &mut Client, flags, offset, length| {
                client.call(Command::BLOCK_STATUS, flags, offset, length, &[]).await.extents
            };
            let extents = ask(&mut client, NONE, 0, 1 << 20).await;
            let rest = (1 << 20) - 16384;
            assert_eq!(extents[&0], [(8192, 3), (8192, 0), (rest, 3)]);
            assert_eq!(extents[&1], [(8192, 0), (8192, 1), (rest, 0)]);
            assert_eq!(extents[&2], [(65536, 0), (65536, 1), ((1 << 20) - 131_072, 0)]);
            let one = ask(&mut client, CommandFlags::REQ_ONE, 4096, 6000).await;
            assert_eq!(
                (&one[&0], &one[&1], &one[&2]),
                (&vec![(4096, 3)], &vec![(4096, 0)], &vec![(6000, 0)])
            );
            // A bitmap in use by a client is not busy.
            daily.clear().unwrap();
            assert_eq!(ask(&mut client, NONE, 0, 1 << 20).await[&2], [(1 << 20, 0)]);
            client.leave().await;
        })
        .0
        .unwrap();
    }
}

#[test]
fn a_status_payload_limits_the_contexts() {
    let exports = Exports::default();
    let export = Export::new(Memory::new(1 << 20)).bitmap(bitmap("daily", 1 << 20));
    exports.add("disk", export).unwrap();
    connect(&exports, async |pipe| {
        let mut client = Client::go(pipe, Mode::Extended, &CONTEXTS).await;
        assert!(client.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
        let ask = async |client: &mut Client, length: u64, ids: &[u32]| {
            let mut payload = Vec::new();
            let ids: Vec<_> = ids.iter().copied().map(ContextId).collect();
            StatusPayload::encode(length, &ids, &mut payload);
            let length = payload.len() as u64;
            client.call(Command::BLOCK_STATUS, NONE, 4096, length, &payload).await
        };
        let answer = ask(&mut client, 4096, &[2, 0]).await;
        assert_eq!(answer.extents, HashMap::from([(2, vec![(4096, 0)]), (0, vec![(4096, 3)])]));
        assert!(ask(&mut client, 4096, &[]).await.extents.is_empty());
        for (length, ids) in [
            (4096, &[0, 0][..]),
            (4096, &[7]),
            (1 << 20, &[0]),
            (u64::MAX, &[0]),
            (0, &[0]),
            (4096, &[0, 1, 2, 3]),
        ] {
            assert_eq!(ask(&mut client, length, ids).await.errno, Errno::EINVAL, "{length} {ids:?}");
        }
        for payload in [&[0; 7][..], &[0; 9], &[0; 100_000]] {
            let length = payload.len() as u64;
            assert_eq!(
                client.call(Command::BLOCK_STATUS, NONE, 0, length, payload).await.errno,
                Errno::EINVAL
            );
            assert_eq!(client.call(Command::TRIM, NONE, 0, length, payload).await.errno, Errno::EINVAL);
            assert_eq!(client.call(Command(99), NONE, 0, length, payload).await.errno, Errno::EINVAL);
        }
        assert_eq!(ask(&mut client, 4096, &[1]).await.extents[&1], [(4096, 0)]);
        client.leave().await;
    })
    .0
    .unwrap();
}

#[test]
fn a_reply_holds_no_more_extents_than_fit_and_the_client_asks_on() {
    let size = 1u64 << 38;
    let daily = Arc::new(Bitmap::new(BitmapName::new("daily").unwrap(), "64KiB".parse().unwrap(), size));
    for granule in 0..200_000 {
        daily.mark(granule * 131_072..granule * 131_072 + 1);
    }
    let exports = Exports::default();
    let memory = Memory::huge(size);
    exports.add("disk", Export::new(memory).bitmap(Arc::clone(&daily))).unwrap();
    for (mode, limit) in [(Mode::Structured, 131_072), (Mode::Extended, 65_536)] {
        connect(&exports, async |pipe| {
            let mut client = Client::go(pipe, mode, &CONTEXTS[..1]).await;
            let (mut offset, mut dirty) = (0, 0);
            let mut most = 0;
            while offset < size {
                let length = (size - offset).min(0xffff_0000);
                let answer = client.call(Command::BLOCK_STATUS, NONE, offset, length, &[]).await;
                let extents = &answer.extents[&2];
                most = most.max(extents.len());
                offset += extents.iter().map(|extent| extent.0).sum::<u64>();
                dirty += extents.iter().filter(|extent| extent.1 == 1).map(|extent| extent.0).sum::<u64>();
            }
            assert_eq!((offset, dirty), (size, daily.bits().dirty_bytes()));
            assert!(most <= limit, "{most} extents");
            client.leave().await;
        })
        .0
        .unwrap();
    }
}

#[test]
fn the_path_of_a_request_is_parse_submit_reply() {
    #[derive(Clone, Default)]
    struct Stages(Arc<Mutex<Vec<String>>>);
    impl tracing::Subscriber for Stages {
        fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
            metadata.target() == "driveline::io"
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, event: &tracing::Event<'_>) {
            struct Stage(Option<String>);
            impl tracing::field::Visit for Stage {
                fn record_debug(&mut self, _: &tracing::field::Field, _: &dyn std::fmt::Debug) {}
                fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
                    if field.name() == "stage" {
                        self.0 = Some(value.to_owned());
                    }
                }
            }
            let mut stage = Stage(None);
            event.record(&mut stage);
            self.0.lock().unwrap().extend(stage.0);
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }
    let stages = Stages::default();
    // Tests beside this one have no subscriber. With a second one about, `tracing` asks all of them what they want to
    // hear, and not only the thread that gets to a place in the code first.
    let _second = tracing::Dispatch::new(tracing::subscriber::NoSubscriber::default());
    tracing::subscriber::with_default(stages.clone(), || {
        let exports = exports_of(Memory::with_info(Info { size_bytes: 4096, ..Info::default() }));
        let (outcome, ()) = connect(&exports, async |pipe| {
            let mut client = Client::go(pipe, Mode::Simple, &[]).await;
            client.write(0, b"1").await;
        });
        outcome.unwrap();
    });
    assert_eq!(*stages.0.lock().unwrap(), ["parse", "submit", "reply"]);
}
