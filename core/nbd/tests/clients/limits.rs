//! Limits, and exports that come and go.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use driveline_nbd::ServerOptions;
use driveline_nbd::wire::*;

use crate::fixture::Fixture;

/// A client of few words: connects and reads the greeting.
fn greet(fixture: &Fixture) -> UnixStream {
    let mut stream = UnixStream::connect(fixture.socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut greeting = [0; Greeting::LENGTH];
    stream.read_exact(&mut greeting).unwrap();
    assert!(Greeting::decode(&greeting).is_ok());
    stream
}

/// The same with the rest of the handshake.
fn go(fixture: &Fixture, export: &str) -> UnixStream {
    let mut stream = greet(fixture);
    let mut out = Vec::new();
    ClientFlags::KNOWN.encode(&mut out);
    OptionRequest::ExportName(export).encode(&mut out);
    stream.write_all(&out).unwrap();
    let mut reply = [0; ExportNameReply::length(true)];
    stream.read_exact(&mut reply).unwrap();
    assert!(ExportNameReply::decode(&reply, true).is_ok());
    stream
}

fn send(stream: &mut UnixStream, command: Command, length: u64) {
    let mut out = Vec::new();
    let flags = CommandFlags::EMPTY;
    Request { flags, command, cookie: Cookie(1), offset: 0, length }.encode(Headers::Compact, &mut out);
    stream.write_all(&out).unwrap();
}

fn ended(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_handshake_that_takes_too_long_is_ended_and_a_session_is_not() {
    let limit = Duration::from_millis(200);
    let fixture = Fixture::new(ServerOptions { handshake_limit: limit, ..ServerOptions::default() });
    fixture.add_disk("disk", 4096);
    let (mut hesitant, mut quick) = (greet(&fixture), go(&fixture, "disk"));
    let start = Instant::now();
    assert!(ended(&mut hesitant));
    assert!(start.elapsed() < Duration::from_secs(10));
    std::thread::sleep(limit * 2);
    send(&mut quick, Command::READ, 512);
    let mut reply = [0; 16 + 512];
    quick.read_exact(&mut reply).unwrap();
    assert_eq!(SimpleReply::decode(&reply[..16]).unwrap().errno, Errno::OK);
}

#[test]
fn more_clients_than_allowed_wait_for_others_to_leave() {
    let fixture = Fixture::new(ServerOptions { connections_max: 2, ..ServerOptions::default() });
    fixture.add_disk("disk", 4096);
    let (one, _two) = (greet(&fixture), greet(&fixture));
    let mut third = UnixStream::connect(fixture.socket()).unwrap();
    third.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert_eq!(third.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(fixture.server.connections(), 2);
    drop(one);
    third.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut greeting = [0; Greeting::LENGTH];
    third.read_exact(&mut greeting).unwrap();
}

/// The story: each socket looked at the limit before it waited, so that a second socket let in one more.
#[test]
fn the_limit_of_connections_is_one_for_all_sockets() {
    let fixture = Fixture::new(ServerOptions { connections_max: 1, ..ServerOptions::default() });
    fixture.add_disk("disk", 4096);
    let other = fixture.path("other.sock");
    fixture.server.listen(&driveline_nbd::Address::Unix(other.clone())).unwrap();
    let one = greet(&fixture);
    let mut second = UnixStream::connect(other).unwrap();
    second.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert_eq!(second.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(fixture.server.connections(), 1);
    drop(one);
    second.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    second.read_exact(&mut [0; Greeting::LENGTH]).unwrap();
}

#[test]
fn sessions_of_an_export_that_names_a_thread_run_there() {
    let fixture = Fixture::disk(4096);
    let threads = fixture.server.connections_by_thread().len();
    for thread in 0..threads {
        let name = format!("on-{thread}");
        let (root, _) = fixture.add_disk(&format!("of-{thread}"), 4096);
        let export = driveline_nbd::Export { thread: Some(thread), ..driveline_nbd::Export::new(root) };
        fixture.server.add_export(&name, export).unwrap();
        let mut clients: Vec<_> = (0..3).map(|_| go(&fixture, &name)).collect();
        for client in &mut clients {
            send(client, Command::READ, 512);
            client.read_exact(&mut [0; 16 + 512]).unwrap();
        }
        assert_eq!(fixture.server.connections_by_thread()[thread], 3);
        assert_eq!(fixture.server.connections(), 3);
        clients.iter_mut().for_each(|client| drop(client.shutdown(std::net::Shutdown::Both)));
        let deadline = Instant::now() + Duration::from_secs(20);
        while fixture.server.connections() > 0 {
            assert!(Instant::now() < deadline, "sessions end with their clients");
            std::thread::yield_now();
        }
    }
}

#[test]
fn connections_are_spread_over_the_threads_of_the_engine() {
    let fixture = Fixture::disk(4096);
    let clients: Vec<_> = (0..10).map(|_| go(&fixture, "disk")).collect();
    assert_eq!(fixture.server.exports().sessions("disk"), Some(10));
    drop(clients);
    let deadline = Instant::now() + Duration::from_secs(20);
    while fixture.server.connections() > 0 {
        assert!(Instant::now() < deadline, "sessions end with their clients");
        std::thread::yield_now();
    }
}

#[test]
fn a_removed_export_disconnects_its_clients_and_no_others() {
    let fixture = Fixture::disk(4096);
    let (root, _) = fixture.add_disk("other", 4096);
    let (mut disk, mut other) = (go(&fixture, "disk"), go(&fixture, "other"));
    send(&mut other, Command::FLUSH, 0);
    assert!(fixture.engine.block_on(fixture.server.remove_export("disk")));
    assert!(ended(&mut disk));
    assert!(!fixture.engine.block_on(fixture.server.remove_export("disk")));
    other.read_exact(&mut [0; 16]).unwrap();
    send(&mut other, Command::FLUSH, 0);
    other.read_exact(&mut [0; 16]).unwrap();
    assert_eq!(root.in_flight(), 0);
    // The name is free again.
    fixture.server.add_export("disk", driveline_nbd::Export::new(root)).unwrap();
    go(&fixture, "disk");
}

#[test]
fn a_client_that_takes_no_answers_does_not_keep_an_export() {
    let farewell = Duration::from_millis(100);
    let fixture = Fixture::new(ServerOptions { farewell, ..ServerOptions::default() });
    fixture.add_disk("disk", 32 << 20);
    let mut deaf = go(&fixture, "disk");
    for _ in 0..4 {
        send(&mut deaf, Command::READ, 32 << 20);
    }
    // The answers are on their way.
    deaf.read_exact(&mut [0; SimpleReply::LENGTH]).unwrap();
    let start = Instant::now();
    assert!(fixture.engine.block_on(fixture.server.remove_export("disk")));
    assert!(start.elapsed() >= farewell, "it had its chance");
    assert_eq!(fixture.server.exports().names(), [""; 0]);
}

#[test]
fn closing_the_server_ends_handshakes_and_sessions() {
    let fixture = Fixture::disk(4096);
    let (mut hesitant, mut session) = (greet(&fixture), go(&fixture, "disk"));
    fixture.engine.block_on(fixture.server.close());
    assert!(ended(&mut hesitant) && ended(&mut session));
    assert_eq!(fixture.server.connections(), 0);
    assert!(UnixStream::connect(fixture.socket()).is_err());
}
