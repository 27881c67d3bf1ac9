//! Bytes that no client should send: an error or a closed connection, never a crash or a hang.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use driveline_nbd::wire::*;
use driveline_nbd::{Fault, Transport};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::client::{Client, MODES, Mode};
use crate::memory::Memory;
use crate::pipe::Pipe;
use crate::{connect, exports_of};

/// Sends `bytes`, then ends, while reading whatever comes until the server ends.
async fn pour(pipe: Pipe, bytes: &[u8]) {
    let sending = async {
        // The server may close before it has read everything.
        let _ = pipe.write_all(&[std::io::IoSlice::new(bytes)]).await;
        pipe.close_writing();
    };
    let receiving = async {
        let mut sink = [0; 4096];
        while pipe.read(&mut [std::io::IoSliceMut::new(&mut sink)]).await.unwrap() > 0 {}
    };
    futures::future::join(sending, receiving).await;
}

fn start_of_handshake() -> Vec<u8> {
    let mut bytes = Vec::new();
    ClientFlags::KNOWN.encode(&mut bytes);
    bytes
}

#[test]
fn noise_in_the_handshake_ends_it() {
    let exports = exports_of(Memory::new(4096));
    let mut random = SmallRng::seed_from_u64(1);
    for _ in 0..200 {
        let length = random.random_range(0..2000);
        let mut bytes = if random.random() { start_of_handshake() } else { Vec::new() };
        bytes.extend((0..length).map(|_| random.random::<u8>()));
        let _ = connect(&exports, async |pipe| pour(pipe, &bytes).await);
    }
}

#[test]
fn options_with_noise_as_data_are_answered() {
    let exports = exports_of(Memory::new(4096));
    let mut random = SmallRng::seed_from_u64(2);
    for _ in 0..200 {
        let mut bytes = start_of_handshake();
        for _ in 0..20 {
            let option = OptionCode(random.random_range(2..13));
            let length = if random.random_ratio(1, 50) { 200_000 } else { random.random_range(0..60) };
            OptionHeader { option, length }.encode(&mut bytes);
            bytes.extend((0..length).map(|_| random.random::<u8>() & random.random::<u8>()));
        }
        let _ = connect(&exports, async |pipe| pour(pipe, &bytes).await);
    }
}

#[test]
fn noise_instead_of_requests_ends_the_session() {
    let exports = exports_of(Memory::new(1 << 16));
    let mut random = SmallRng::seed_from_u64(3);
    for mode in MODES {
        for round in 0..100 {
            let mut bytes = Vec::new();
            for _ in 0..random.random_range(0..30) {
                let headers = if mode == Mode::Extended { Headers::Extended } else { Headers::Compact };
                let request = Request {
                    flags: CommandFlags(random.random::<u16>() & random.random::<u16>() & 0x3f),
                    command: Command(random.random_range(0..9)),
                    cookie: Cookie(random.random()),
                    offset: random.random_range(0..70_000),
                    length: random.random_range(0..70_000),
                };
                request.encode(headers, &mut bytes);
                if random.random_ratio(9, 10) {
                    let payload = request.payload_length(headers);
                    bytes.extend((0..payload).map(|_| random.random::<u8>()));
                }
            }
            if round % 2 == 0 && !bytes.is_empty() {
                let at = random.random_range(0..bytes.len());
                bytes[at] ^= 1 << random.random_range(0..8);
            }
            let _ = connect(&exports, async |pipe| {
                let client =
                    Client::go(pipe, mode, &["base:allocation"][..usize::from(mode != Mode::Simple)]).await;
                pour(client.pipe, &bytes).await;
            });
        }
    }
}

/// `DRIVELINE_FUZZ_SECONDS` (default 1) says for how long, `DRIVELINE_FUZZ_SEED` repeats a run.
#[test]
fn mutated_conversations_end() {
    let setting = |name| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let seed = setting("DRIVELINE_FUZZ_SEED").unwrap_or_else(|| RandomState::new().build_hasher().finish());
    let duration = Duration::from_secs(setting("DRIVELINE_FUZZ_SECONDS").unwrap_or(1));
    println!("DRIVELINE_FUZZ_SEED={seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let exports = exports_of(Memory::new(1 << 16).slow(2));
    let start = Instant::now();
    while start.elapsed() < duration {
        let mut bytes = conversation(&mut random);
        for _ in 0..random.random_range(0..4) {
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..4) {
                0 => bytes[at] ^= 1 << random.random_range(0..8),
                1 => bytes[at] = random.random(),
                2 => drop(bytes.remove(at)),
                _ => bytes.insert(at, random.random()),
            }
        }
        let _ = connect(&exports, async |pipe| pour(pipe, &bytes).await);
        assert_eq!(exports.sessions("disk"), Some(0));
    }
}

/// What a good client might send, handshake and all.
fn conversation(random: &mut SmallRng) -> Vec<u8> {
    let mut bytes = start_of_handshake();
    let mode = MODES[random.random_range(0..3)];
    match mode {
        Mode::Simple => {}
        Mode::Structured => OptionRequest::StructuredReply.encode(&mut bytes),
        Mode::Extended => OptionRequest::ExtendedHeaders.encode(&mut bytes),
    }
    let queries = vec!["base:allocation", "qemu:allocation-depth"];
    OptionRequest::SetMetaContext(MetaContextRequest { export: "disk", queries }).encode(&mut bytes);
    OptionRequest::List.encode(&mut bytes);
    OptionRequest::Go(InfoRequest { export: "disk", infos: vec![InfoType::BLOCK_SIZE] }).encode(&mut bytes);
    let headers = if mode == Mode::Extended { Headers::Extended } else { Headers::Compact };
    for cookie in 0..random.random_range(0..20) {
        let command = Command(random.random_range(0..8));
        let (offset, length) = (random.random_range(0..60_000), random.random_range(0..5_000));
        let flags = CommandFlags::EMPTY.with(CommandFlags::PAYLOAD_LEN, command == Command::WRITE);
        let flags = if headers == Headers::Extended { flags } else { CommandFlags::EMPTY };
        let request = Request { flags, command, cookie: Cookie(cookie), offset, length };
        request.encode(headers, &mut bytes);
        bytes.resize(bytes.len() + request.payload_length(headers) as usize, 7);
    }
    bytes
}

#[test]
fn a_connection_may_end_after_any_byte() {
    let exports = exports_of(Memory::new(4096));
    let mut whole = start_of_handshake();
    OptionRequest::StructuredReply.encode(&mut whole);
    OptionRequest::Go(InfoRequest { export: "disk", infos: vec![] }).encode(&mut whole);
    let request = Request {
        flags: CommandFlags::EMPTY,
        command: Command::WRITE,
        cookie: Cookie(1),
        offset: 0,
        length: 9,
    };
    request.encode(Headers::Compact, &mut whole);
    whole.extend_from_slice(b"nine more");
    for length in 0..=whole.len() {
        let _ = connect(&exports, async |pipe| pour(pipe, &whole[..length]).await);
    }
}

#[test]
fn huge_lengths_are_not_waited_for() {
    let exports = exports_of(Memory::new(4096));
    let (outcome, ()) = connect(&exports, async |pipe| {
        let client = Client::greet(pipe).await;
        let mut out = Vec::new();
        OptionHeader { option: OptionCode::GO, length: u32::MAX }.encode(&mut out);
        client.send(&out).await.unwrap();
        assert!(client.receive(1).await.is_err());
    });
    assert!(matches!(outcome, Err(Fault::TooLong { .. })), "{outcome:?}");
    for (mode, length) in [(Mode::Simple, u64::from(u32::MAX)), (Mode::Extended, u64::MAX)] {
        let (outcome, ()) = connect(&exports, async |pipe| {
            let mut client = Client::go(pipe, mode, &[]).await;
            let flags = CommandFlags::EMPTY.with(CommandFlags::PAYLOAD_LEN, mode == Mode::Extended);
            client.request(Command::WRITE, flags, 0, length, &[]).await;
            assert!(client.answer().await.is_err());
        });
        assert!(matches!(outcome, Err(Fault::TooLong { .. })), "{outcome:?}");
    }
}

#[test]
fn a_wrong_magic_number_ends_the_session() {
    let exports = exports_of(Memory::new(4096));
    let (outcome, ()) = connect(&exports, async |pipe| {
        let client = Client::go(pipe, Mode::Simple, &[]).await;
        client.send(&[0; 28]).await.unwrap();
        assert!(client.receive(1).await.is_err());
    });
    assert!(matches!(outcome, Err(Fault::Malformed(Malformed::Magic { .. }))), "{outcome:?}");
}
