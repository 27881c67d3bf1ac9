//! What only shows with files that the public API refuses: a read that never ends by itself.

use std::future::poll_fn;
use std::io::{Read, Write};
use std::task::Poll;

use super::*;
use crate::{Backend, Config, Engine, spawn_local, yield_now};

fn ring_engine() -> Engine {
    Engine::start(Config { threads: 1, backend: Backend::IoUring, ..Config::default() }).unwrap()
}

fn part_of(buffer: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }
}

#[test]
fn a_dropped_read_of_a_silent_pipe_returns_and_leaves_the_bytes() {
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    let file = File::unchecked(reader.try_clone().unwrap().into(), false, true);
    ring_engine().block_on_local(|| async move {
        for round in 0..100u8 {
            let mut buffer = vec![0x55; 64];
            let part = part_of(&mut buffer);
            // SAFETY: `buffer` outlives the read, which is dropped first.
            let mut reading = Box::pin(unsafe { file.read_at(&raw const part, 1, 0) });
            let polled = poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx))).await;
            assert!(polled.is_pending());
            if round % 2 == 0 {
                // Also when the kernel has had it for a while.
                yield_now().await;
                crate::sleep(std::time::Duration::from_micros(100)).await;
            }
            drop(reading);
            writer.write_all(&[round]).unwrap();
            yield_now().await;
            assert_eq!(buffer, [0x55; 64]);
            let mut byte = [0];
            reader.read_exact(&mut byte).unwrap();
            assert_eq!(byte, [round]);
        }
    });
}

#[test]
fn shutdown_cancels_reads_in_flight() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let file = std::sync::Arc::new(File::unchecked(reader.into(), false, true));
    let engine = ring_engine();
    engine.block_on_local(|| async move {
        // More than the submission queue holds.
        for _ in 0..1000 {
            let file = std::sync::Arc::clone(&file);
            spawn_local(async move {
                let mut buffer = vec![0; 64];
                let part = part_of(&mut buffer);
                // SAFETY: `buffer` outlives the await.
                let _ = unsafe { file.read_at(&raw const part, 1, 0) }.await;
                unreachable!("nobody writes");
            })
            .detach();
        }
        yield_now().await;
    });
    engine.shutdown();
}

#[test]
fn a_read_that_began_elsewhere_says_so() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let file: &'static File = Box::leak(Box::new(File::unchecked(reader.into(), false, true)));
    let buffer: &'static mut [u8] = Box::leak(Box::new([0; 8]));
    let part: &'static libc::iovec = Box::leak(Box::new(part_of(buffer)));
    // SAFETY: all is leaked.
    let mut reading = Box::pin(unsafe { file.read_at(part, 1, 0) });
    ring_engine().block_on_local(|| async {
        let polled = poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx))).await;
        assert!(polled.is_pending());
        let there = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
                    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        reading.as_mut().poll(&mut cx).is_ready()
                    }))
                })
                .join()
                .unwrap()
        });
        let payload = there.unwrap_err();
        assert!(payload.downcast_ref::<&str>().unwrap().contains("another thread"));
        // On its own thread it goes on as if nothing had happened.
        writer.write_all(b"12345678").unwrap();
        assert_eq!(reading.as_mut().await.unwrap(), 8);
    });
}
