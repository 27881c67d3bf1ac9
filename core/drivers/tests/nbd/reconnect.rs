//! Servers that go away, and come back or not.

use crate::kit::{Folder, Server, ask, engine, errno, have, open, seed, text, write};
use driveline_engine::{sleep, spawn_local, yield_now};
use driveline_graph::OpenChild;
use driveline_op::{flag, op};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::json;
use std::{fs, path::Path, time::Duration};

const MIB: u64 = 1 << 20;

fn file_server(socket: &Path, image: &Path) -> Server {
    Server::nbdkit(socket, &["file", text(image)])
}

async fn close(node: &OpenChild) {
    node.node.close(&[]).await.unwrap();
}

/// Writers on both threads, a server that is killed again and again. Each write is acknowledged once, none is lost, and
/// the image is at the end what was written.
#[test]
fn writes_survive_a_server_that_is_killed_again_and_again() {
    if !have("nbdkit") {
        return;
    }
    let (engine, folder, seed) = (engine(), Folder::new(), seed());
    let (image, socket) = (folder.path("disk"), folder.socket());
    fs::File::create(&image).unwrap().set_len(4 * MIB).unwrap();
    let mut server = file_server(&socket, &image);
    let node = engine.block_on_local(|| open(folder.options(json!({ "reconnect-delay": 120 })))).unwrap();
    let writers: Vec<_> = (0..8u64)
        .map(|number| {
            let node = node.clone();
            engine.handle().spawn_on(number as usize % 2, move || async move {
                // Each has 512 KiB for itself, and knows what is in there.
                let (start, mut random) = (number * (MIB / 2), StdRng::seed_from_u64(seed ^ number));
                let mut model = vec![0u8; (MIB / 2) as usize];
                for step in 0..150 {
                    let length = random.random_range(1..32 << 10);
                    let at = random.random_range(0..model.len() - length);
                    let range = at..at + length;
                    match random.random_range(0..4) {
                        0 => {
                            let answer = ask(&node, op::READ, start + at as u64, length as u64, 0).await;
                            assert_eq!(errno(&answer), 0);
                            assert!(
                                answer.buffer[..] == model[range],
                                "seed {seed}, writer {number}, step {step}"
                            );
                        }
                        1 => {
                            let zero =
                                ask(&node, op::WRITE_ZEROES, start + at as u64, length as u64, 0).await;
                            assert_eq!(errno(&zero), 0);
                            model[range].fill(0);
                        }
                        _ => {
                            let data = vec![random.random(); length];
                            let answer = write(&node, start + at as u64, &data, flag::FUA).await;
                            assert_eq!(errno(&answer), 0);
                            model[range].copy_from_slice(&data);
                        }
                    }
                }
                model
            })
        })
        .collect();
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..6 {
        // Some progress, then the axe: how far it comes depends on the machine, and nothing else does.
        let requests = random.random_range(1..40);
        let node = node.clone();
        engine.block_on_local(|| async move {
            for _ in 0..requests {
                assert_eq!(errno(&ask(&node, op::READ, 0, 4096, 0).await), 0);
            }
        });
        server.kill(&socket);
        server = file_server(&socket, &image);
    }
    let models: Vec<u8> = writers.into_iter().flat_map(|writer| engine.block_on(writer).unwrap()).collect();
    engine.block_on_local(|| async move { close(&node).await });
    drop(server);
    assert!(fs::read(&image).unwrap() == models, "seed {seed}");
}

#[test]
fn without_a_delay_requests_fail_until_the_server_is_back() {
    if !have("nbdkit") {
        return;
    }
    let (engine, folder) = (engine(), Folder::new());
    let (image, socket) = (folder.path("disk"), folder.socket());
    fs::write(&image, vec![7; MIB as usize]).unwrap();
    let server = file_server(&socket, &image);
    let node = engine.block_on_local(|| open(folder.options(json!({})))).unwrap();
    server.kill(&socket);
    let again = node.clone();
    engine.block_on_local(|| async move {
        // It may take a request to notice.
        while errno(&ask(&again, op::READ, 0, 512, 0).await) == 0 {}
        assert_eq!(errno(&ask(&again, op::READ, 0, 512, 0).await), libc::EIO);
        assert_eq!(again.node.details()["state"], "reconnecting: requests fail");
    });
    let _server = file_server(&socket, &image);
    engine.block_on_local(|| async move {
        while node.node.details()["state"] != "connected" {
            driveline_engine::yield_now().await;
        }
        let answer = ask(&node, op::READ, 0, 512, 0).await;
        assert!(answer.result.is_ok() && answer.buffer[..] == [7; 512]);
        close(&node).await;
    });
}

#[test]
fn a_request_waits_for_the_delay_and_no_longer() {
    if !have("nbdkit") {
        return;
    }
    let (engine, folder) = (engine(), Folder::new());
    let server = Server::nbdkit(&folder.socket(), &["memory", "1M"]);
    let node = engine.block_on_local(|| open(folder.options(json!({ "reconnect-delay": 1 })))).unwrap();
    server.kill(&folder.socket());
    engine.block_on_local(|| async move {
        // Answered from the socket's buffer perhaps, then not any more; and whoever comes later does not wait again.
        while errno(&write(&node, 0, &[1; 512], 0).await) == 0 {}
        assert_eq!(errno(&write(&node, 0, &[1; 512], 0).await), libc::EIO);
        close(&node).await;
    });
}

#[test]
fn closing_does_not_wait_for_a_server_that_is_gone() {
    if !have("nbdkit") {
        return;
    }
    let (engine, folder) = (engine(), Folder::new());
    let server = Server::nbdkit(&folder.socket(), &["memory", "1M"]);
    let node = engine.block_on_local(|| open(folder.options(json!({ "reconnect-delay": 3600 })))).unwrap();
    server.kill(&folder.socket());
    let waiting = node.clone();
    let waiting =
        engine.handle().spawn_on(1, move || async move { errno(&ask(&waiting, op::READ, 0, 512, 0).await) });
    engine.block_on_local(|| async move {
        while node.node.details()["state"] != "reconnecting: requests wait" {
            driveline_engine::yield_now().await;
        }
        close(&node).await;
    });
    assert_eq!(engine.block_on(waiting).unwrap(), libc::EIO);
}

#[test]
fn a_server_with_another_size_is_refused_and_the_right_one_taken() {
    if !have("nbdkit") {
        return;
    }
    let (engine, folder) = (engine(), Folder::new());
    let socket = folder.socket();
    let server = Server::nbdkit(&socket, &["memory", "1M"]);
    let node = engine.block_on_local(|| open(folder.options(json!({ "reconnect-delay": 120 })))).unwrap();
    server.kill(&socket);
    let (again, count) = (node.clone(), folder.path("connections"));
    let read =
        engine.handle().spawn_on(1, move || async move { errno(&ask(&again, op::READ, 0, 512, 0).await) });
    // The wrong one notes who connects, so that we know when it was refused.
    let wrong =
        Server::nbdkit(&socket, &["--filter=log", "memory", "2M", &format!("logfile={}", text(&count))]);
    engine.block_on_local(|| async move {
        while fs::read_to_string(&count).unwrap_or_default().matches("Connect").count() < 2 {
            driveline_engine::yield_now().await;
        }
    });
    wrong.kill(&socket);
    let _server = Server::nbdkit(&socket, &["memory", "1M"]);
    assert_eq!(engine.block_on(read).unwrap(), 0);
    engine.block_on_local(|| async move { close(&node).await });
}

#[test]
fn the_first_connection_is_tried_until_the_server_is_there() {
    if !have("nbdkit") {
        return;
    }
    let (engine, folder) = (engine(), Folder::new());
    let options = folder.options(json!({}));
    let opening = engine.handle().spawn_on(0, move || async move { open(options).await.map(|_| ()) });
    // Whichever is first: the node tries again, or the server was quick.
    let _server = Server::nbdkit(&folder.socket(), &["memory", "1M"]);
    engine.block_on(opening).unwrap().unwrap();
}

/// A server that was stopped, not killed, answers nothing, and its connection stays. Nothing ended the wait for it: neither a
/// cancel of the job nor the end of the program.
#[test]
fn a_cut_connection_fails_what_was_asked_and_is_made_again() {
    if !have("nbdkit") {
        return;
    }
    for delay in [0, 600] {
        let (engine, folder) = (engine(), Folder::new());
        let (image, socket) = (folder.path("disk"), folder.socket());
        fs::write(&image, vec![7; MIB as usize]).unwrap();
        let server = file_server(&socket, &image);
        let node =
            engine.block_on_local(|| open(folder.options(json!({ "reconnect-delay": delay })))).unwrap();
        server.signal("STOP");
        engine.block_on_local(|| async move {
            let asked = node.clone();
            let read = spawn_local(async move { ask(&asked, op::READ, 0, 4096, 0).await });
            while node.node.awaited().is_none() {
                yield_now().await;
            }
            node.node.yank().unwrap();
            assert_eq!(errno(&read.await.unwrap()), 5, "what was asked is not asked again");
            assert_eq!(node.node.awaited(), None);
            server.signal("CONT");
            // Without a delay requests fail until it is back.
            let answer = loop {
                let answer = ask(&node, op::READ, 0, 4096, 0).await;
                if delay > 0 || errno(&answer) == 0 {
                    break answer;
                }
                sleep(Duration::from_millis(20)).await;
            };
            assert_eq!((errno(&answer), &answer.buffer[..2]), (0, &[7, 7][..]));
            close(&node).await;
        });
    }
}
