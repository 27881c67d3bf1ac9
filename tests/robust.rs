//! What the world does to a program: clients that talk nonsense, hang or die, a second program on the same images, a
//! disk that is full, a kill.

use crate::harness::{Daemon, Guest, dirty, extents, have, output, run};
use rand::{Rng, RngCore, SeedableRng, rngs::SmallRng};
use serde_json::json;
use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;

const MEMORY: &str = r#"
[node.pages]
driver = "memory"
size = "64MiB"

[drive.vda]
root = "pages"
bitmaps = [{ name = "daily" }]

[export.vda]
type = "nbd"
drive = "vda"
socket = "vda.sock"
writable = true
bitmaps = ["daily"]

[monitor]
qmp = "qmp.sock"
"#;

const IMAGE: &str = r#"
[node.image]
driver = "qcow2"
file = "image.qcow2"

[drive.vda]
root = "image"
bitmaps = [{ name = "daily", granularity = "64KiB" }]

[export.vda]
type = "nbd"
drive = "vda"
socket = "vda.sock"
writable = true
bitmaps = ["daily"]

[monitor]
qmp = "qmp.sock"
"#;

/// A new client can do everything, at once.
fn serves(daemon: &mut Daemon, directory: &Path) {
    assert!(daemon.is_alive());
    let mut guest = Guest::connect(&directory.join("vda.sock"), "vda");
    guest.write(4096, &[0x77; 4096]).unwrap();
    assert_eq!(guest.read(4096, 4096).unwrap(), [0x77; 4096]);
    guest.write_zeroes(4096, 512).unwrap();
    guest.trim(8192, 4096).unwrap();
    guest.flush().unwrap();
    daemon.qmp().run("query-version", json!({}));
}

/// Connects and reads the greeting.
fn greeted(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream
}

/// Opens the export, by hand.
fn opened(socket: &Path) -> UnixStream {
    let mut stream = greeted(socket);
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    stream.write_all(b"IHAVEOPT\0\0\0\x07\0\0\0\x09\0\0\0\x03vda\0\0").unwrap();
    loop {
        let mut head = [0; 20];
        stream.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes(head[16..].try_into().unwrap());
        stream.read_exact(&mut vec![0; length as usize]).unwrap();
        if head[12..16] == 1u32.to_be_bytes() {
            return stream;
        }
    }
}

fn request(flags: u16, command: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend([9; 8]);
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// Sends all that the other side takes, then waits until it hangs up (or has nothing more to say).
fn send_and_hear(mut stream: UnixStream, bytes: &[u8]) {
    let mut reader = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut sink = [0; 65536];
            while matches!(reader.read(&mut sink), Ok(read) if read > 0) {}
        });
        match stream.write_all(bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                panic!("the server neither reads nor hangs up")
            }
            _ => {}
        }
        let _ = stream.shutdown(Shutdown::Write);
    });
}

#[test]
fn nonsense_from_nbd_clients_hurts_nobody_else() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(directory.path(), MEMORY);
    let socket = directory.path().join("vda.sock");
    let mut witness = Guest::connect(&socket, "vda");
    witness.write(MIB, &[5; 4096]).unwrap();
    let before = daemon.resident_bytes();
    let mut rng = SmallRng::seed_from_u64(1);
    for round in 0..120 {
        let mut noise = vec![0; rng.random_range(1..20_000)];
        rng.fill_bytes(&mut noise);
        match round % 6 {
            0 => send_and_hear(greeted(&socket), &noise),
            // Options that begin well: their length is what it likes.
            1 => {
                let mut options = 3u32.to_be_bytes().to_vec();
                for chunk in noise.chunks(50) {
                    options.extend(b"IHAVEOPT");
                    options.extend(rng.random_range(0..12u32).to_be_bytes());
                    options.extend(rng.random_range(0..80u32).to_be_bytes());
                    options.extend(chunk);
                }
                send_and_hear(greeted(&socket), &options);
            }
            2 => send_and_hear(opened(&socket), &noise),
            // Requests that begin well; offsets and lengths near all limits.
            3 | 4 => {
                let mut requests = Vec::new();
                for _ in 0..rng.random_range(1..50) {
                    let offset =
                        [0, 63 * MIB, 64 * MIB, u64::MAX - 100, rng.random()][rng.random_range(0..5)];
                    let length = [0, 1, 4096, 32 << 20, u32::MAX, rng.random()][rng.random_range(0..6)];
                    // No payload follows a write, so what follows is its payload.
                    requests.extend(request(
                        rng.random_range(0..128),
                        rng.random_range(0..10),
                        offset,
                        length,
                    ));
                }
                send_and_hear(opened(&socket), &requests);
            }
            // Gone in the middle of a payload.
            _ => {
                let mut stream = opened(&socket);
                stream.write_all(&request(0, 1, 8 * MIB, 32 << 20)).unwrap();
                stream.write_all(&noise).unwrap();
            }
        }
        if round % 20 == 0 {
            serves(&mut daemon, directory.path());
        }
    }
    assert_eq!(witness.read(MIB, 4096).unwrap().len(), 4096);
    serves(&mut daemon, directory.path());
    // The image itself is in memory, and clients may have written all of it.
    let grown = daemon.resident_bytes().saturating_sub(before);
    assert!(grown < 64 * MIB + 48 * MIB, "{} MiB", grown / MIB);
    assert!(daemon.terminate().success());
}

#[test]
fn nonsense_from_monitors_hurts_nobody_else() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(directory.path(), MEMORY);
    let socket = directory.path().join("qmp.sock");
    let before = daemon.resident_bytes();
    let mut rng = SmallRng::seed_from_u64(2);
    let mut noise = vec![0; 100_000];
    rng.fill_bytes(&mut noise);
    let mut half = vec![b'"'; 1];
    half.resize(20 << 20, b'a');
    let words: [&[u8]; 8] = [
        &noise,
        &half,
        &[b'['; 1 << 20],
        b"{\"execute\": \"qmp_capabilities\"}{\"execute\": \"quit\", \"arguments\": 5}\n",
        b"{\"execute\": \"query-block\"}\n{\"execute\"",
        b"\xff\xfe{}{}[]null 17 'x'\n",
        b"{\"execute\": \"qmp_capabilities\"}\n{\"execute\": \"blockdev-add\", \"arguments\": {\"driver\": \"qcow2\", \"node-name\": \"a\", \"file\": {\"driver\": \"qcow2\"}}}\n",
        b"",
    ];
    for word in words {
        send_and_hear(UnixStream::connect(&socket).unwrap(), word);
        serves(&mut daemon, directory.path());
    }
    // Some that say nothing and stay, and one that asks and never listens.
    let silent: Vec<_> = (0..50).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let mut deaf = UnixStream::connect(&socket).unwrap();
    deaf.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let _ = deaf.write_all(b"{\"execute\": \"qmp_capabilities\"}\n");
    for _ in 0..20_000 {
        if deaf
            .write_all(b"{\"execute\": \"query-qmp-schema\"}{\"execute\": \"query-named-block-nodes\"}\n")
            .is_err()
        {
            break;
        }
    }
    serves(&mut daemon, directory.path());
    let grown = daemon.resident_bytes().saturating_sub(before);
    assert!(grown < 64 * MIB, "{} MiB", grown / MIB);
    drop((silent, deaf));
    assert!(daemon.terminate().success());
}

#[test]
fn clients_that_never_finish_their_handshake_make_room_for_others() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), MEMORY);
    let mut qmp = daemon.qmp();
    let socket = directory.path().join("limited.sock");
    let address = json!({ "type": "unix", "data": { "path": socket.to_str().unwrap() } });
    let limits = json!({ "addr": address, "handshake-max-seconds": 1, "max-connections": 5 });
    qmp.run("nbd-server-start", limits);
    qmp.run("block-export-add", json!({ "type": "nbd", "id": "second", "node-name": "vda", "name": "vda" }));
    // All places are taken by clients that say a byte now and then.
    let mut slow: Vec<_> = (0..5).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| Guest::connect(&socket, "vda").read(0, 512).unwrap());
        while !guest.is_finished() {
            slow.iter_mut().for_each(|stream| {
                let _ = stream.write_all(&[0]);
            });
            std::thread::sleep(Duration::from_millis(50));
            assert!(begin.elapsed() < Duration::from_secs(8), "it gets its turn");
        }
    });
}

#[test]
fn two_hundred_clients_are_served_in_turns() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(directory.path(), MEMORY);
    let socket = directory.path().join("vda.sock");
    std::thread::scope(|scope| {
        for number in 0..200u64 {
            let socket = &socket;
            let client = move || {
                let mut guest = Guest::connect(socket, "vda");
                let offset = number * 65536;
                guest.write(offset, &[number as u8; 65536]).unwrap();
                assert!(guest.read(offset, 65536).unwrap() == [number as u8; 65536]);
            };
            std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, client).unwrap();
        }
    });
    let resident = daemon.resident_bytes();
    assert!(resident < 128 * MIB, "{} MiB", resident / MIB);
    serves(&mut daemon, directory.path());
    assert!(daemon.terminate().success());
}

fn make_image(directory: &Path, size: &str) -> String {
    let image = directory.join("image.qcow2").to_str().unwrap().to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, size]);
    image
}

#[test]
fn clients_that_are_killed_in_mid_write_leave_a_clean_image_and_their_marks() {
    let test = "clients_that_are_killed_in_mid_write_leave_a_clean_image_and_their_marks";
    if !have(test, &["qemu-img", "nbdcopy", "nbdinfo"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = make_image(directory.path(), "256M");
    let mut daemon = Daemon::start(directory.path(), IMAGE);
    let uri = daemon.exports[0].split_once(": ").unwrap().1.to_owned();
    let source = daemon.path("source.raw");
    std::fs::write(&source, vec![0xa5; 256 << 20]).unwrap();
    let mut qmp = daemon.qmp();
    let mut seen = 0;
    for _ in 0..3 {
        let mut copy = Command::new("nbdcopy")
            .args(["--connections=3", &source, &uri])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // As soon as something has come, whether or not it has been answered.
        let deadline = Instant::now() + Duration::from_secs(8);
        loop {
            let nodes = qmp.run("query-named-block-nodes", json!({ "flat": true }));
            let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "image").unwrap();
            let count = node["dirty-bitmaps"][0]["count"].as_u64().unwrap();
            if count > seen {
                seen = count;
                break;
            }
            assert!(Instant::now() < deadline, "the copy gets on");
        }
        copy.kill().unwrap();
        copy.wait().unwrap();
        serves(&mut daemon, directory.path());
        // All that is in the image is marked. (What the dead one sent may still be on its way: so marks come second.)
        let allocation = extents(&uri, "base:allocation");
        let marked = dirty(&uri, "daily", 65536);
        for (offset, length, flags) in allocation {
            let granules = offset / 65536..(offset + length).div_ceil(65536);
            assert!(
                flags & 1 == 1 || granules.clone().all(|granule| marked.contains(&granule)),
                "{granules:?}"
            );
        }
    }
    assert!(daemon.terminate().success());
    run("qemu-img", &["check", "-q", &image]);
}

#[test]
fn a_second_program_on_the_same_image_is_refused_and_told_of_the_lock() {
    let test = "a_second_program_on_the_same_image_is_refused_and_told_of_the_lock";
    if !have(test, &["qemu-img", "qemu-io"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = make_image(directory.path(), "16M");
    let mut daemon = Daemon::start(directory.path(), IMAGE);
    let second = directory.path().join("second.toml");
    std::fs::write(&second, IMAGE.replace(".sock", "2.sock")).unwrap();
    let refused = output(Daemon::program().to_str().unwrap(), &["run", second.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("lock") && said.contains("image.qcow2") && said.contains("in use"), "{said}");
    // QEMU is kept out too, and reading without changing anything is not.
    let qemu = output("qemu-io", &["-f", "qcow2", "-c", "write 0 64k", &image]);
    assert!(String::from_utf8_lossy(&qemu.stderr).contains("lock"), "{qemu:?}");
    let check = output(Daemon::program().to_str().unwrap(), &["check", second.to_str().unwrap()]);
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
    serves(&mut daemon, directory.path());
    assert!(daemon.terminate().success());
    run("qemu-io", &["-f", "qcow2", "-c", "write 0 64k", &image]);
}

/// The kernel takes apart the rings of a killed program after it is gone, and its locks with them.
fn wait_for_lock(image: &str) {
    let begin = Instant::now();
    while !output("qemu-io", &["-f", "qcow2", "-c", "quit", image]).status.success() {
        assert!(begin.elapsed() < Duration::from_secs(5), "still locked");
    }
}

#[test]
fn a_program_that_is_killed_leaves_what_was_flushed_and_starts_again() {
    let test = "a_program_that_is_killed_leaves_what_was_flushed_and_starts_again";
    if !have(test, &["qemu-img", "qemu-io"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = make_image(directory.path(), "64M");
    let socket = directory.path().join("vda.sock");
    let mut rng = SmallRng::seed_from_u64(3);
    let mut expected = vec![0u8; 64 << 20];
    for round in 1..=3 {
        let daemon = Daemon::start(directory.path(), IMAGE);
        let mut guest = Guest::connect(&socket, "vda");
        for at in (0..64 * MIB).step_by(4 << 20) {
            assert!(guest.read(at, 4 << 20).unwrap() == expected[at as usize..][..4 << 20], "round {round}");
        }
        for _ in 0..40 {
            let offset = rng.random_range(0..32 * MIB / 512) * 512;
            let data = vec![rng.random(); rng.random_range(1..300) * 512];
            guest.write(offset, &data).unwrap();
            expected[offset as usize..][..data.len()].copy_from_slice(&data);
        }
        guest.flush().unwrap();
        // And in the other half writes that nobody waits for.
        let mut stream = opened(&socket);
        for at in 0..30 {
            let mut write = request(0, 1, 32 * MIB + at * MIB, 1 << 20);
            write.extend(vec![0; 1 << 20]);
            stream.write_all(&write).unwrap();
        }
        drop(daemon); // SIGKILL
        wait_for_lock(&image);
        let checked = output("qemu-img", &["check", "-q", &image]);
        // 3: leaked clusters, and nothing worse.
        assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
    }
}

/// A small file system in memory, until it is dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", path])
            .stderr(Stdio::null())
            .status();
        mounted.is_ok_and(|status| status.success()).then_some(Self(directory))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", self.0.path().to_str().unwrap()]).status();
    }
}

#[test]
fn a_full_disk_is_the_guests_error_and_when_there_is_space_again_it_goes_on() {
    let test = "a_full_disk_is_the_guests_error_and_when_there_is_space_again_it_goes_on";
    if !have(test, &["qemu-img", "mount"]) {
        return;
    }
    let Some(disk) = SmallDisk::mount("6m") else {
        eprintln!("SKIPPED {test}: it takes root to mount a small file system");
        return;
    };
    let directory = disk.0.path();
    let image = make_image(directory, "64M");
    let ballast = directory.join("ballast");
    std::fs::write(&ballast, vec![1; 3 << 20]).unwrap();
    let mut daemon = Daemon::start(directory, IMAGE);
    let mut guest = Guest::connect(&directory.join("vda.sock"), "vda");
    let mut expected = vec![0u8; 64 << 20];
    let write = |guest: &mut Guest, expected: &mut [u8], offset: u64, byte: u8| {
        guest.write(offset, &[byte; 65536])?;
        expected[offset as usize..][..65536].fill(byte);
        std::io::Result::Ok(())
    };
    // All over the image, so that tables do not fit either.
    let mut failed = None;
    for at in 0..200u64 {
        if let Err(error) = write(&mut guest, &mut expected, at * 37 % 1024 * 65536, at as u8 + 1) {
            assert_eq!(error.raw_os_error(), Some(28), "ENOSPC, and not {error}");
            failed.get_or_insert(at);
        }
    }
    let failed = failed.expect("the disk is small");
    assert!(failed > 10, "there was some space: {failed}");
    assert!(daemon.is_alive());
    // What was written before is there, and can be written again.
    write(&mut guest, &mut expected, 0, 0xee).unwrap();
    assert!(guest.read(0, 4 << 20).unwrap() == expected[..4 << 20]);

    std::fs::remove_file(&ballast).unwrap();
    for at in 0..8u64 {
        write(&mut guest, &mut expected, (failed + at) * 37 % 1024 * 65536, 0xdd)
            .unwrap_or_else(|error| panic!("there is space again: {error}"));
    }
    guest.flush().unwrap();
    for at in (0..64 * MIB).step_by(4 << 20) {
        assert!(guest.read(at, 4 << 20).unwrap() == expected[at as usize..][..4 << 20], "at {at}");
    }
    drop(guest);
    assert!(daemon.terminate().success());
    let checked = output("qemu-img", &["check", "-q", &image]);
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
}
