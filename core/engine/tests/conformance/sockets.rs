//! Streams and listeners.

use std::future::Future;
use std::io::{ErrorKind, IoSlice};
use std::net::Shutdown;
use std::time::Duration;

use driveline_engine::net::{Stream, TcpListener, TcpStream, UnixListener, UnixStream};
use driveline_engine::{Backend, sleep, spawn_local};

use crate::engine;

conformance!(
    big_messages_are_echoed_whole,
    tcp_works_too,
    both_halves_work_at_once,
    a_thousand_connections_leak_nothing,
    an_accepted_stream_moves_to_another_thread,
    a_stale_socket_is_replaced_and_a_live_one_is_not,
    a_peer_that_goes_away_is_an_end_or_an_error,
    a_busy_connection_does_not_starve_others,
    a_dropped_read_takes_no_bytes,
);

async fn echo(stream: Stream) {
    let mut buffer = vec![0; 100_000];
    loop {
        match stream.read(&mut buffer).await.unwrap() {
            0 => return stream.shutdown(Shutdown::Write).unwrap(),
            count => stream.write_all(&buffer[..count]).await.unwrap(),
        }
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 + index / 256) as u8).collect()
}

/// Sends `length` bytes in parts of odd sizes while it reads the echo.
async fn expect_echo(stream: Stream, length: usize) {
    let (mut reader, mut writer) = stream.into_split();
    let sender = spawn_local(async move {
        let data = pattern(length);
        let mut parts = vec![IoSlice::new(&[])];
        let mut rest = &data[..];
        let mut size = 1;
        while !rest.is_empty() {
            let (part, after) = rest.split_at(size.min(rest.len()));
            parts.push(IoSlice::new(part));
            parts.push(IoSlice::new(&[]));
            rest = after;
            size = size * 3 % 70_001 + 1;
        }
        writer.write_all_vectored(&parts).await.unwrap();
    });
    let mut came = vec![0; length];
    reader.read_exact(&mut came).await.unwrap();
    assert!(came == pattern(length));
    assert_eq!(reader.read(&mut [0]).await.unwrap(), 0);
    sender.await.unwrap();
}

fn big_messages_are_echoed_whole(backend: Backend) {
    let engine = engine(backend, 2);
    let handle = engine.handle();
    engine.block_on(async {
        for length in [1, 65_536, 5_000_000] {
            let (one, other) = Stream::pair().unwrap();
            let server = handle.spawn_on(1, move || echo(other));
            expect_echo(one, length).await;
            server.await.unwrap();
        }
    });
}

fn tcp_works_too(backend: Backend) {
    let engine = engine(backend, 1);
    engine.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = spawn_local(async move { echo(listener.accept().await.unwrap()).await });
        let client = TcpStream::connect(address).await.unwrap();
        assert!(client.is_tcp());
        assert_eq!(client.peer(), address.to_string());
        client.set_keepalive(true).unwrap();
        expect_echo(client, 1_000_000).await;
        server.await.unwrap();
        // Nobody listens any more.
        assert_eq!(TcpStream::connect(address).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    });
}

fn both_halves_work_at_once(backend: Backend) {
    let engine = engine(backend, 1);
    engine.block_on(async {
        let (one, other) = Stream::pair().unwrap();
        let (mut one_read, mut one_write) = one.into_split();
        let (mut other_read, mut other_write) = other.into_split();
        let data = pattern(2_000_000);
        // All four directions run on one thread, each full of back pressure.
        let send = |data: Vec<u8>| async move { one_write.write_all(&data).await.unwrap() };
        let send_back = |data: Vec<u8>| async move { other_write.write_all(&data).await.unwrap() };
        let first = spawn_local(send(data.clone()));
        let second = spawn_local(send_back(data.clone()));
        let third = spawn_local(async move {
            let mut came = vec![0; 2_000_000];
            one_read.read_exact(&mut came).await.unwrap();
            came
        });
        let mut came = vec![0; 2_000_000];
        other_read.read_exact(&mut came).await.unwrap();
        assert!(came == data);
        assert!(third.await.unwrap() == data);
        first.await.unwrap();
        second.await.unwrap();
    });
}

fn descriptors_of(prefix: &str) -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    links
        .filter(|link| {
            std::fs::read_link(link.path()).is_ok_and(|to| to.to_string_lossy().starts_with(prefix))
        })
        .count()
}

fn a_thousand_connections_leak_nothing(backend: Backend) {
    // Other tests of this process open and close sockets too, but far fewer than a thousand.
    let before = descriptors_of("socket:");
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(backend, 1);
    engine.block_on(async {
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let path = listener.path().to_owned();
        let server = spawn_local(async move {
            for _ in 0..1000 {
                echo(listener.accept().await.unwrap()).await;
            }
        });
        for _ in 0..1000 {
            let client = UnixStream::connect(&path).await.unwrap();
            client.write_all(b"hello").await.unwrap();
            let mut came = [0; 5];
            client.read_exact(&mut came).await.unwrap();
            assert_eq!(&came, b"hello");
        }
        server.await.unwrap();
    });
    drop(engine);
    let after = descriptors_of("socket:");
    assert!(after < before + 100, "{before} sockets before, {after} after");
}

fn an_accepted_stream_moves_to_another_thread(backend: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(backend, 2);
    let handle = engine.handle();
    engine.block_on(async {
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let path = listener.path().to_owned();
        let connecting = spawn_local(async move { UnixStream::connect(&path).await.unwrap() });
        let accepted = listener.accept().await.unwrap();
        assert!(accepted.peer().contains(&std::process::id().to_string()), "{}", accepted.peer());
        let server = handle.spawn_on(1, move || echo(accepted));
        expect_echo(connecting.await.unwrap(), 300_000).await;
        server.await.unwrap();
    });
}

fn a_stale_socket_is_replaced_and_a_live_one_is_not(backend: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let engine = engine(backend, 1);
    engine.block_on(async {
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file");
        let live = UnixListener::bind(&path).unwrap();
        assert_eq!(UnixListener::bind(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        drop(live);
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(UnixListener::bind(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();
        // What somebody else put in its place is not unlinked.
        let moved = UnixListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        drop(moved);
        assert!(path.exists());
    });
}

fn a_peer_that_goes_away_is_an_end_or_an_error(backend: Backend) {
    let engine = engine(backend, 1);
    engine.block_on(async {
        let (one, other) = Stream::pair().unwrap();
        let reading = spawn_local(async move { one.read(&mut [0; 10]).await.map(|count| (count, one)) });
        sleep(Duration::from_millis(1)).await;
        drop(other);
        let (count, one) = reading.await.unwrap().unwrap();
        assert_eq!(count, 0);
        assert_eq!(one.write_all(b"hello").await.unwrap_err().kind(), ErrorKind::BrokenPipe);
        assert_eq!(one.read_exact(&mut [0]).await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        // Full, and then gone: the writer wakes.
        let (one, other) = Stream::pair().unwrap();
        let writing = spawn_local(async move { one.write_all(&vec![0; 10_000_000]).await });
        sleep(Duration::from_millis(1)).await;
        drop(other);
        assert!(writing.await.unwrap().is_err());
    });
}

fn a_busy_connection_does_not_starve_others(backend: Backend) {
    let engine = engine(backend, 1);
    engine.block_on(async {
        let (one, other) = Stream::pair().unwrap();
        // Always ready: each byte written is read at once by the same task.
        let mut busy = spawn_local(async move {
            loop {
                one.write_all(b"x").await.unwrap();
                other.read_exact(&mut [0]).await.unwrap();
            }
        });
        sleep(Duration::from_millis(5)).await;
        busy.abort();
        assert!(busy.await.is_err());
    });
}

fn a_dropped_read_takes_no_bytes(backend: Backend) {
    let engine = engine(backend, 1);
    engine.block_on(async {
        let (one, other) = Stream::pair().unwrap();
        for round in 0..100u8 {
            let mut buffer = [0; 1];
            {
                let mut reading = std::pin::pin!(one.read(&mut buffer));
                std::future::poll_fn(|cx| {
                    assert!(reading.as_mut().poll(cx).is_pending());
                    std::task::Poll::Ready(())
                })
                .await;
            }
            other.write_all(&[round]).await.unwrap();
            one.read_exact(&mut buffer).await.unwrap();
            assert_eq!(buffer, [round]);
        }
    });
}
