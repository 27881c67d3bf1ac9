use super::{Blklogwrites, format::Entry};
use driveline_sdk::{
    flag,
    testing::{self, Leaf, Node, Value, json},
};
use std::{
    future::{Future, poll_fn},
    task::Poll,
    time::Duration,
};

const SIZE: u64 = 256 << 10;

fn open(options: Value, disk: &Leaf, log: &Leaf) -> driveline_sdk::Result<Node> {
    testing::open_with::<Blklogwrites>(options, disk, &[("log", log)])
}

/// What a log says: its entries, each with its data.
fn entries(log: &Leaf) -> Vec<(Entry, Vec<u8>)> {
    let word = |at: u64| u64::from_le_bytes(log.data(at..at + 8).try_into().unwrap());
    assert_eq!((word(0), word(8)), (0x6a_7366_7773_6872, 1), "magic and version");
    let sector = u64::from(u32::from_le_bytes(log.data(24..28).try_into().unwrap()));
    let mut at = sector;
    let mut found = Vec::new();
    for _ in 0..word(16) {
        let entry = Entry::parse(&log.data(at..at + 32).try_into().unwrap());
        at += sector;
        let length = if entry.flags & Entry::DISCARD != 0 { 0 } else { entry.sectors * sector };
        found.push((entry, log.data(at..at + length)));
        at += length;
    }
    found
}

/// Does again what a log says.
fn replay(log: &Leaf, sector: u64, disk: &mut [u8]) {
    for (entry, data) in entries(log) {
        let at = (entry.sector * sector) as usize;
        if entry.flags & Entry::DISCARD != 0 {
            disk[at..at + (entry.sectors * sector) as usize].fill(0); // as the leaf does
        }
        disk[at..at + data.len()].copy_from_slice(&data);
    }
}

#[test]
fn the_readme_is_true() {
    testing::check_readme::<Blklogwrites>(include_str!("../README.md"), |text| toml::from_str(text).unwrap());
}

#[test]
fn each_kind_of_request_has_its_entry() {
    let (disk, log) = (testing::memory(SIZE), testing::growing(0));
    let node = open(json!({}), &disk, &log).unwrap();
    assert_eq!(node.info().request_alignment, 512);
    testing::block_on(async {
        node.write(1024, &[7; 1024]).await.unwrap();
        node.write_with(0, &[8; 512], flag::FUA).await.unwrap();
        node.write_zeroes(2048..4096).await.unwrap();
        node.discard(8192..12288).await.unwrap();
        node.flush().await.unwrap();
    });
    let entry = |sector, sectors, flags| Entry { sector, sectors, flags, data_length: 0 };
    let expected = [
        (entry(2, 2, 0), vec![7; 1024]),
        (entry(0, 1, Entry::FUA), vec![8; 512]),
        (entry(4, 4, 0), vec![0; 2048]),
        (entry(16, 8, Entry::DISCARD), vec![]),
        (entry(0, 0, Entry::FLUSH), vec![]),
    ];
    assert_eq!(entries(&log), expected);
}

#[test]
fn a_log_that_is_replayed_gives_the_disk() {
    for (seed, sector) in [(1_u64, 512_u64), (2, 4096)] {
        println!("seed {seed}");
        let (disk, log) = (testing::memory(SIZE), testing::growing(0));
        let options = json!({ "log-sector-size": sector, "log-super-update-interval": 7 });
        let mut node = open(options, &disk, &log).unwrap();
        let mut random = seed;
        let mut pick = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % below
        };
        for step in 0..200_u32 {
            let sectors = SIZE / sector;
            let start = pick(sectors);
            let range = start * sector..(start + 1 + pick((sectors - start).min(8))) * sector;
            testing::block_on(async {
                match pick(5) {
                    0 => node.write_zeroes(range).await.unwrap(),
                    1 => node.discard(range).await.unwrap(),
                    2 => node.flush().await.unwrap(),
                    _ => node
                        .write(range.start, &vec![step as u8; (range.end - range.start) as usize])
                        .await
                        .unwrap(),
                }
            });
            if step == 100 {
                testing::block_on(node.settle()).unwrap();
                node =
                    open(json!({ "log-append": true, "log-super-update-interval": 5 }), &disk, &log).unwrap();
            }
        }
        testing::block_on(node.settle()).unwrap();
        let mut again = vec![0; SIZE as usize];
        replay(&log, sector, &mut again);
        assert!(again == disk.data(0..SIZE), "sectors of {sector} bytes");
        assert_eq!(entries(&log).len(), 200);
    }
}

#[test]
fn the_super_block_is_written_at_flushes_and_now_and_then() {
    let (disk, log) = (testing::memory(SIZE), testing::growing(0));
    let node = open(json!({ "log-super-update-interval": 3 }), &disk, &log).unwrap();
    testing::block_on(async {
        for _ in 0..4 {
            node.write(0, &[1; 512]).await.unwrap();
        }
        assert_eq!(entries(&log).len(), 3);
        node.flush().await.unwrap();
        assert_eq!(entries(&log).len(), 5);
        node.write(0, &[1; 512]).await.unwrap();
        node.settle().await.unwrap();
        assert_eq!(entries(&log).len(), 6);
    });
}

#[test]
fn a_log_that_cannot_be_gone_on_with_is_refused() {
    let disk = testing::memory(SIZE);
    let log = testing::growing(4096);
    let refusal = |log: &Leaf| {
        let error = open(json!({ "log-append": true }), &disk, log).unwrap_err();
        (error.code(), error.message().unwrap().to_owned())
    };
    let invalid = |text: &str| (22, text.to_owned());
    assert_eq!(refusal(&log), invalid("Invalid log superblock magic"));
    log.set_data(0, &0x6a_7366_7773_6872_u64.to_le_bytes());
    log.set_data(8, &2_u64.to_le_bytes());
    assert_eq!(refusal(&log), invalid("Unsupported log version 2"));
    log.set_data(8, &1_u64.to_le_bytes());
    assert_eq!(refusal(&log), invalid("Invalid log sector size 0"));
    log.set_data(24, &512_u32.to_le_bytes());
    open(json!({ "log-append": true }), &disk, &log).unwrap();
    log.set_data(16, &100_u64.to_le_bytes());
    log.set_data(512 + 8, &u64::MAX.to_le_bytes());
    let (code, text) = refusal(&log);
    assert!(code == 22 && text.ends_with("which is too long"), "{text}");
}

#[test]
fn options_that_cannot_be_are_refused_in_the_words_of_qemu() {
    for (options, text) in [
        (json!({ "log-sector-size": 1000 }), "option 'log-sector-size': Invalid log sector size 1000"),
        (
            json!({ "log-super-update-interval": 0 }),
            "option 'log-super-update-interval': Invalid log superblock update interval 0",
        ),
        (
            json!({ "log-append": true, "log-sector-size": 512 }),
            "option 'log-append': log-append and log-sector-size are mutually exclusive",
        ),
    ] {
        assert_eq!(testing::check::<Blklogwrites>(options).unwrap_err().to_string(), text);
    }
}

#[test]
fn a_log_that_is_full_fails_the_request_and_tells_nothing_after_it() {
    let (disk, log) = (testing::memory(SIZE), testing::growing(0));
    let node = open(json!({}), &disk, &log).unwrap();
    log.fail("write", 0..u64::MAX, 28, 1);
    let write = || testing::block_on(node.write(0, &[1; 512])).map_err(|error| error.code());
    assert_eq!((write(), write()), (Err(28), Err(5)));
    testing::block_on(node.settle()).unwrap();
}

/// The place of the entry stayed a hole in the log: whoever did again what it says took what was there before for an entry.
#[test]
fn an_entry_that_nobody_waits_for_ends_the_log() {
    let (disk, log) = (testing::memory(SIZE), testing::growing(0));
    let node = open(json!({}), &disk, &log).unwrap();
    testing::block_on(async {
        node.write(0, &[1; 512]).await.unwrap();
        log.set_latency(Duration::from_secs(1));
        let mut dropped = Box::pin(node.write(512, &[2; 512]));
        let once = poll_fn(|cx| Poll::Ready(dropped.as_mut().poll(cx).is_pending()));
        assert!(once.await, "its entry takes a second");
        drop(dropped);
        log.set_latency(Duration::ZERO);
        assert_eq!(node.write(1024, &[3; 512]).await.map_err(|error| error.code()), Err(5));
    });
}
