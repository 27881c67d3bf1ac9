//! How sessions end when the server wants them to.

use std::pin::pin;

use driveline_nbd::wire::*;
use driveline_nbd::{Fault, serve};

use crate::client::{Client, Mode};
use crate::memory::Memory;
use crate::pipe::Pipe;
use crate::{block_on, connect, exports_of, next_turn};

#[test]
fn a_removed_export_answers_what_it_has_and_ends() {
    let exports = exports_of(Memory::new(4096).slow(100));
    let (outcome, ()) = connect(&exports, async |pipe| {
        let mut client = Client::go(pipe, Mode::Structured, &[]).await;
        assert_eq!(exports.sessions("disk"), Some(1));
        let cookie = client.request(Command::READ, CommandFlags::EMPTY, 0, 16, &[]).await;
        while client.pipe.unread() > 0 {
            next_turn().await;
        }
        let removed = exports.remove("disk").unwrap();
        assert!(exports.remove("disk").is_none());
        removed.finish();
        let (answered, answer) = client.answer().await.unwrap();
        assert_eq!((answered, answer.data.len()), (cookie, 16));
        assert!(client.answer().await.is_err(), "the session is over");
        removed.ended().await;
    });
    outcome.unwrap();
}

#[test]
fn a_client_that_takes_no_answers_can_be_cut() {
    let exports = exports_of(Memory::new(1 << 20));
    let (outcome, ()) = connect(&exports, async |pipe| {
        let mut client = Client::go(pipe, Mode::Simple, &[]).await;
        for _ in 0..4 {
            client.request(Command::READ, CommandFlags::EMPTY, 0, 100_000, &[]).await;
        }
        while client.pipe.unread() > 0 {
            next_turn().await;
        }
        let removed = exports.remove("disk").unwrap();
        removed.finish();
        assert!(futures::poll!(pin!(removed.ended())).is_pending(), "its answers are not taken");
        removed.cut();
        removed.ended().await;
    });
    outcome.unwrap();
}

#[test]
fn an_export_that_is_removed_cannot_be_chosen() {
    let exports = exports_of(Memory::new(4096));
    connect(&exports, async |pipe| {
        let mut client = Client::greet(pipe).await;
        let request = InfoRequest { export: "disk", infos: vec![] };
        assert_eq!(
            client.option(&OptionRequest::Info(request.clone())).await.last().unwrap().code,
            ReplyCode::ACK
        );
        let removed = exports.remove("disk").unwrap();
        removed.ended().await;
        let replies = client.option(&OptionRequest::Go(request)).await;
        assert_eq!(replies[0].code, ReplyCode::ERR_UNKNOWN);
    })
    .0
    .unwrap();
}

#[test]
fn a_handshake_has_its_limit_and_a_session_has_none() {
    let exports = exports_of(Memory::new(4096));
    let (near, far) = Pipe::pair(1000);
    let outcome = block_on(serve(&far, &exports, std::future::ready(())));
    assert!(matches!(outcome, Err(Fault::HandshakeTimeout)));
    drop(near);
}

#[test]
fn a_client_that_vanishes_leaves_no_request_behind() {
    let memory = Memory::new(4096).slow(50);
    let exports = exports_of(memory.clone());
    let (outcome, ()) = connect(&exports, async |pipe| {
        let mut client = Client::go(pipe, Mode::Simple, &[]).await;
        for _ in 0..20 {
            client.request(Command::WRITE, CommandFlags::EMPTY, 0, 4096, &[7; 4096]).await;
        }
        while client.pipe.unread() > 0 {
            next_turn().await;
        }
    });
    assert!(outcome.is_err(), "the answers had nowhere to go");
    assert_eq!(exports.sessions("disk"), Some(0));
    assert_eq!(memory.inner().data.lock().bytes, [7; 4096], "what began was done to its end");
    assert_eq!(memory.inner().running.load(std::sync::atomic::Ordering::Relaxed), 0);
}
