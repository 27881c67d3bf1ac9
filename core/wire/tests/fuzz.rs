//! The fuzz target without a fuzzer: random and mutated messages for a while, on the stable compiler.
//!
//! `DRIVELINE_FUZZ_SECONDS` (default 1) says for how long, `DRIVELINE_FUZZ_SEED` repeats a run.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use driveline_wire::{fuzz::decode_everything, *};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// One valid message of every kind: mutations of these get further than noise does.
fn corpus() -> Vec<Vec<u8>> {
    let mut corpus = vec![Vec::new()];
    let mut add = |encode: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        encode(&mut out);
        corpus.push(out);
    };
    for headers in [Headers::Compact, Headers::Extended] {
        add(&|out| {
            Request {
                flags: CommandFlags::FUA,
                command: Command::WRITE,
                cookie: Cookie(1),
                offset: 4096,
                length: 512,
            }
            .encode(headers, out);
        });
        add(&|out| {
            ChunkHeader {
                flags: ReplyFlags::DONE,
                kind: ChunkType::OFFSET_DATA,
                cookie: Cookie(1),
                offset: 0,
                length: 9,
            }
            .encode(headers, out);
        });
    }
    add(&|out| Greeting { flags: HandshakeFlags::KNOWN }.encode(out));
    add(&|out| SimpleReply { errno: Errno::EIO, cookie: Cookie(3) }.encode(out));
    add(&|out| StatusPayload::encode(1 << 30, &[ContextId(0), ContextId(2)], out));
    let data = |option: &OptionRequest<'_>| {
        let mut out = Vec::new();
        option.encode(&mut out);
        out.split_off(OptionHeader::LENGTH)
    };
    let go = data(&OptionRequest::Go(InfoRequest { export: "vda", infos: vec![InfoType::BLOCK_SIZE] }));
    let meta = data(&OptionRequest::SetMetaContext(MetaContextRequest {
        export: "vda",
        queries: vec!["base:allocation", "qemu:dirty-bitmap:daily"],
    }));
    add(&|out| out.extend_from_slice(&go));
    add(&|out| out.extend_from_slice(&meta));
    let mut extents = Vec::new();
    for length in 1..4 {
        Extent { length, status: 1 }.encode(ExtentWidth::Wide, &mut extents);
    }
    add(&|out| {
        out.extend_from_slice(&0u32.to_be_bytes());
        out.extend_from_slice(&3u32.to_be_bytes());
        out.extend_from_slice(&extents);
    });
    corpus
}

fn mutate(bytes: &mut Vec<u8>, random: &mut SmallRng) {
    for _ in 0..random.random_range(0..4) {
        let at = random.random_range(0..=bytes.len());
        match random.random_range(0..5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
            1 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.random_range(0..5)],
            2 => bytes.truncate(at),
            3 => bytes.insert(at, random.random()),
            _ => bytes.extend((0..random.random_range(0..40)).map(|_| random.random::<u8>())),
        }
    }
}

#[test]
fn no_message_breaks_the_codec() {
    let seed = setting("DRIVELINE_FUZZ_SEED").unwrap_or_else(|| RandomState::new().build_hasher().finish());
    let duration = Duration::from_secs(setting("DRIVELINE_FUZZ_SECONDS").unwrap_or(1));
    println!("DRIVELINE_FUZZ_SEED={seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let corpus = corpus();
    let start = Instant::now();
    while start.elapsed() < duration {
        for _ in 0..100 {
            let mut bytes = corpus[random.random_range(0..corpus.len())].clone();
            mutate(&mut bytes, &mut random);
            decode_everything(&bytes);
        }
    }
}
