//! Two ends that talk TLS, and what comes of it when one cannot be trusted.

mod kit;

use driveline_engine::{Config, Engine, net::Stream, spawn_local};
use driveline_transport::{ClientTls, Endpoint, Receive, ServerTls, TlsCreds, TlsStream, Transport};
use kit::{Creds, Time};
use std::{
    future::{Future, poll_fn},
    io::{self, IoSlice},
    net::Shutdown,
    pin::pin,
    rc::Rc,
    task::Poll,
    time::Duration,
};

fn engine() -> Engine {
    Engine::start(Config { threads: 1, ..Config::default() }).unwrap()
}

fn server(creds: &Creds) -> ServerTls {
    TlsCreds { sanity_check: false, ..TlsCreds::new(creds.dir(), Endpoint::Server) }.server().unwrap()
}

fn client(creds: &Creds) -> ClientTls {
    TlsCreds { sanity_check: false, ..TlsCreds::new(creds.dir(), Endpoint::Client) }.client().unwrap()
}

/// What both ends say of a handshake, and of a byte each way after it: the server, then the client.
fn meet(server: ServerTls, client: ClientTls, hostname: Option<&'static str>) -> (String, String) {
    async fn byte(stream: &TlsStream<Stream>) -> io::Result<()> {
        stream.write_all(&[IoSlice::new(b"x")]).await?;
        let mut receive = Receive::new();
        let ended = || io::Error::new(io::ErrorKind::UnexpectedEof, "ended");
        receive.take(stream, 1).await?.map(drop).ok_or_else(ended)
    }
    let text = |outcome: io::Result<()>| outcome.map_or_else(|error| error.to_string(), |()| "well".into());
    engine().block_on_local(|| async move {
        let (here, there) = Stream::pair().unwrap();
        let accepting = spawn_local(async move {
            let stream = TlsStream::accept(here, &server).await?;
            byte(&stream).await
        });
        let connected = async {
            let stream = TlsStream::connect(there, &client, hostname).await?;
            byte(&stream).await
        };
        let client_says = text(connected.await);
        (text(accepting.await.unwrap()), client_says)
    })
}

#[test]
fn who_knows_each_other_talks() {
    let creds = Creds::whole();
    for hostname in ["localhost", "127.0.0.1"] {
        let (at_server, at_client) = meet(server(&creds), client(&creds), Some(hostname));
        assert_eq!((&*at_server, &*at_client), ("well", "well"));
    }
}

#[test]
fn strangers_are_refused_and_both_ends_say_why() {
    let (creds, other) = (Creds::whole(), Creds::whole());
    let check = |at: (String, String), server_says: &str, client_says: &str| {
        assert!(at.0.contains(server_says), "the server says {}, not {server_says}", at.0);
        assert!(at.1.contains(client_says), "the client says {}, not {client_says}", at.1);
    };
    // A server of another authority, one with another name, and none named at all.
    let at = meet(server(&other), client(&creds), Some("localhost"));
    check(at, "received fatal alert", "The certificate hasn't got a known issuer");
    let at = meet(server(&creds), client(&creds), Some("example.org"));
    check(at, "received fatal alert", "Certificate does not match the hostname example.org");
    let at = meet(server(&creds), client(&creds), None);
    check(at, "ended", "No hostname for certificate validation");
    // Whoever does not verify takes any; but the server does, and this client is of another authority.
    let careless = TlsCreds { verify_peer: false, ..TlsCreds::new(other.dir(), Endpoint::Client) };
    let at = meet(server(&creds), careless.client().unwrap(), None);
    check(at, "The certificate hasn't got a known issuer", "received fatal alert");
    // Out of time, on either side.
    creds.add("server", "server", &["localhost"], Time::Past);
    let at = meet(server(&creds), client(&creds), Some("localhost"));
    check(at, "received fatal alert", "The certificate has expired");
    creds.add("server", "server", &["localhost"], Time::Now);
    creds.add("client", "client", &[], Time::Past);
    let at = meet(server(&creds), client(&creds), Some("localhost"));
    check(at, "The certificate has expired", "received fatal alert");
    // None at all: refused, unless the server does not care.
    creds.remove("client-cert.pem");
    creds.remove("client-key.pem");
    let at = meet(server(&creds), client(&creds), Some("localhost"));
    check(at, "No certificate was found", "received fatal alert");
    let open = TlsCreds { verify_peer: false, ..TlsCreds::new(creds.dir(), Endpoint::Server) };
    let at = meet(open.server().unwrap(), client(&creds), Some("localhost"));
    check(at, "well", "well");
}

#[test]
fn much_data_goes_both_ways_at_once() {
    const BYTES: usize = 3 << 20;
    let creds = Creds::whole();
    let (server, client) = (server(&creds), client(&creds));
    let data: Vec<u8> = (0..BYTES as u32).map(|i| (i * 31 + i / 1000) as u8).collect();
    engine().block_on_local(|| async move {
        let (here, there) = Stream::pair().unwrap();
        let accepting = spawn_local(async move { TlsStream::accept(here, &server).await.unwrap() });
        let there = TlsStream::connect(there, &client, Some("localhost")).await.unwrap();
        let here = accepting.await.unwrap();
        let (here, there) = (std::rc::Rc::new(here), std::rc::Rc::new(there));
        let tasks: Vec<_> = [(here.clone(), there.clone()), (there.clone(), here.clone())]
            .into_iter()
            .flat_map(|(from, to)| {
                let (sent, wanted) = (data.clone(), data.clone());
                let writer = spawn_local(async move {
                    let (head, rest) = sent.split_at(5);
                    let (middle, tail) = rest.split_at(100_000);
                    from.write_all(&[IoSlice::new(head), IoSlice::new(middle)]).await.unwrap();
                    from.write_all(&[IoSlice::new(tail)]).await.unwrap();
                    from.finish().await.unwrap();
                });
                let reader = spawn_local(async move {
                    let (mut receive, mut at) = (Receive::new(), 0);
                    for length in [3, 70_000, 20, 1 << 20].into_iter().cycle() {
                        let mut into = vec![0; length.min(BYTES - at)];
                        if into.is_empty() {
                            break;
                        }
                        receive.fill(&*to, &mut into).await.unwrap();
                        assert!(into == wanted[at..at + into.len()]);
                        at += into.len();
                    }
                    assert!(receive.take(&*to, 1).await.unwrap().is_none(), "the farewell is the end");
                });
                [writer, reader]
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
}

/// Bytes that are no handshake, or one that is cut off, end in an error: no panic, and nothing waits for ever.
#[test]
fn garbage_in_place_of_a_handshake_is_an_error() {
    let creds = Creds::whole();
    let server = server(&creds);
    let hello = [0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0];
    engine().block_on_local(|| async move {
        for round in 0..200u32 {
            let mut bytes: Vec<u8> = hello.to_vec();
            let mut state = round.wrapping_mul(2_654_435_761) | 1;
            let mut next = move || {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state
            };
            bytes.extend((0..next() % 300).map(|_| next() as u8));
            for _ in 0..round % 4 {
                let at = next() as usize % bytes.len();
                bytes[at] = next() as u8;
            }
            let (here, there) = Stream::pair().unwrap();
            there.write_all(&bytes).await.unwrap();
            there.shutdown(Shutdown::Write).unwrap();
            TlsStream::accept(here, &server).await.unwrap_err();
        }
    });
}

/// A client that had stopped reading sent what is no TLS: its session waited for ever to tell it so.
#[test]
fn who_does_not_listen_is_not_waited_for_with_an_alert() {
    let creds = Creds::whole();
    let (server, client) = (server(&creds), client(&creds));
    engine().block_on_local(|| async move {
        let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
        let below = there.try_clone().unwrap();
        let (here, there) = (Stream::try_from(here).unwrap(), Stream::try_from(there).unwrap());
        let accepting = spawn_local(async move { TlsStream::accept(here, &server).await });
        let peer = TlsStream::connect(there, &client, Some("localhost")).await.unwrap();
        let stream = Rc::new(accepting.await.unwrap().unwrap());
        let to_peer = stream.clone();
        let writing =
            spawn_local(async move { to_peer.write_all(&[IoSlice::new(&vec![0; 16 << 20])]).await });
        // Until nothing more goes into the socket. (Sooner, the alert would find room there, and this would be no test.)
        driveline_engine::sleep(Duration::from_millis(100)).await;
        io::Write::write_all(&mut &below, &[0xff; 64]).unwrap();
        let mut receive = Receive::new();
        let mut read = pin!(receive.take(&*stream, 1));
        let mut late = pin!(driveline_engine::sleep(Duration::from_secs(20)));
        let first = poll_fn(|cx| match read.as_mut().poll(cx) {
            Poll::Ready(read) => Poll::Ready(Some(read)),
            Poll::Pending => late.as_mut().poll(cx).map(|()| None),
        });
        assert!(first.await.expect("nobody takes the alert").is_err());
        drop((peer, below));
        writing.await.unwrap().unwrap_err();
    });
}
