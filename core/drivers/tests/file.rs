//! The file driver, on both backends of the engine.

use driveline_drivers::{
    FileDriver,
    conformance::{Check, OpenNodeArgs, check, edge_to, options_with_words},
};
use driveline_engine::{Backend, Config, Engine};
use driveline_graph::{Driver, Kind, OpenChild, Result};
use driveline_op::{
    Answer, Ask, Body, Buffer, Call, Edge, Instance, Next, OpTable, ReadRequest, Route, Target, WriteRequest,
    flag, info, op, status,
};
use serde_json::{Value, json};
use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Command, sync::Arc};
use tempfile::TempDir;

const BACKENDS: [Backend; 2] = [Backend::IoUring, Backend::Fallback];

/// `None`: the kernel here has no io_uring.
fn engine(backend: Backend) -> Option<Engine> {
    Engine::start(Config { threads: 1, backend, ..Config::default() })
        .inspect_err(|error| eprintln!("skipped: no engine on {backend}: {error}"))
        .ok()
}

fn open(engine: &Engine, directory: &Path, options: Value, read_only: bool) -> Result<OpenChild> {
    let args = OpenNodeArgs { directory: directory.to_owned(), read_only, ..OpenNodeArgs::default() };
    engine.block_on_local(|| async move { args.open(&FileDriver::default(), options, vec![]).await })
}

fn ask(engine: &Engine, edge: &Edge, ask: Ask, data: &[u8]) -> Answer {
    let (edge, data) = (edge.clone(), Buffer::from(data));
    engine.block_on_local(|| async move { Call::new(edge, ask, data).await })
}

fn run(engine: &Engine, edge: &Edge, op: u32, offset: u64, length: u64, data: &[u8]) -> Answer {
    ask(engine, edge, Ask { op, offset, length, ..Ask::default() }, data)
}

/// An engine, a folder with a file of that size in it, and the file opened.
fn with_file(size: u64, options: Value) -> (Engine, TempDir, OpenChild) {
    let engine = engine(Backend::Auto).expect("there is always a backend");
    let folder = TempDir::new().unwrap();
    fs::File::create(folder.path().join("a.img")).unwrap().set_len(size).unwrap();
    let mut all = json!({ "path": "a.img" });
    all.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    let node = open(&engine, folder.path(), all, false).unwrap();
    (engine, folder, node)
}

#[test]
fn options_are_those_of_the_description() {
    let all = json!({
        "path": "x", "cache": "none", "locking": "on", "discard": "ignore", "aio": "native", "drop-cache": true,
        "x-check-cache-dropped": false, "force-share": false, "auto-read-only": true,
    });
    options_with_words(&FileDriver::default(), all, &["filename"]);
    for wrong in [
        json!({}),
        json!({ "path": "" }),
        json!({ "path": "x", "cache": "writethrough" }),
        json!({ "path": "x", "locking": true }),
    ] {
        let error = FileDriver::default().check(wrong.as_object().unwrap()).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{error}");
    }
}

/// Passes requests on with memory at an odd address.
struct Odd;

static ODD: OpTable<Odd> = OpTable::new().read(Odd::read).write(Odd::write);

impl Odd {
    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> driveline_op::Result<()> {
        let mut data = vec![0; request.length() as usize + 4097];
        let odd = data.as_ptr().align_offset(4096) + 1;
        let data = &mut data[odd..odd + request.length() as usize];
        next.read_at(0, request.offset(), data).await?;
        request.fill(0, data);
        Ok(())
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> driveline_op::Result<()> {
        let mut data = vec![0; request.length() as usize + 4097];
        let odd = data.as_ptr().align_offset(4096) + 1;
        let data = &mut data[odd..odd + request.length() as usize];
        request.copy_to(0, data);
        next.write_at(0, request.offset(), data, request.flags()).await
    }
}

fn odd(edge: &Edge) -> Edge {
    let target =
        Target::new(Instance::new(Arc::new(Body { cookie: 0, driver: Odd }), &ODD), vec![edge.clone()]);
    let info = driveline_op::Info { memory_alignment: 1, ..*edge.info() };
    Edge::new(info, |op| if target.instance().has(op) { Route::To(&target) } else { Route::As(edge) })
}

fn conform(folder: &Path, seed: u64) {
    for backend in BACKENDS {
        let Some(engine) = engine(backend) else { continue };
        for (number, options) in
            [json!({}), json!({ "discard": "ignore" }), json!({ "cache": "none" })].into_iter().enumerate()
        {
            let path = folder.join(format!("{backend}-{number}.img"));
            fs::write(&path, vec![7; 1_500_000]).unwrap();
            let mut all = json!({ "path": &path });
            all.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
            let node = match open(&engine, folder, all, false) {
                Err(error) if error.option() == Some("cache") => {
                    eprintln!("skipped: {error}");
                    continue;
                }
                node => node.unwrap(),
            };
            let edges = [node.edge.clone(), odd(&node.edge)];
            engine.block_on_local(|| async move {
                for (edge, steps) in edges.iter().zip([150, 80]) {
                    check(edge, Check { seed: seed + number as u64, steps, ..Check::default() }).await;
                }
            });
        }
    }
}

#[test]
fn a_file_conforms_on_both_backends() {
    conform(TempDir::new().unwrap().path(), 10);
}

#[test]
fn a_file_in_memory_conforms_on_both_backends() {
    // tmpfs has no ZERO_RANGE, and other ways of waiting.
    if let Ok(folder) = TempDir::new_in("/dev/shm") {
        conform(folder.path(), 20);
    }
}

#[test]
fn a_write_beyond_the_end_makes_the_file_longer_and_a_read_there_gives_zeroes() {
    let (engine, folder, node) = with_file(1000, json!({}));
    assert_eq!(node.edge.info().size_bytes, 1000);
    let found = run(&engine, &node.edge, op::READ, 900, 0, &[7; 4096]);
    assert_eq!((found.result.is_ok(), &found.buffer[..]), (true, &[0; 4096][..]));
    run(&engine, &node.edge, op::WRITE, 5000, 0, &[1; 100]).result.unwrap();
    assert_eq!(node.node.info(&[]).size_bytes, 5100);
    for (flags, end) in [(flag::MAY_UNMAP, 9000), (0, 10_000)] {
        let zeroes = Ask { op: op::WRITE_ZEROES, flags, offset: end - 3000, length: 3000, ..Ask::default() };
        ask(&engine, &node.edge, zeroes, &[]).result.unwrap();
        assert_eq!(node.node.info(&[]).size_bytes, end);
        assert_eq!(fs::metadata(folder.path().join("a.img")).unwrap().len(), end);
    }
    let beyond = run(&engine, &node.edge, op::READ, 1 << 40, 0, &[7; 512]);
    assert_eq!((beyond.result.is_ok(), &beyond.buffer[..]), (true, &[0; 512][..]));
    assert_eq!(run(&engine, &node.edge, op::WRITE, i64::MAX as u64, 0, &[7]).result.unwrap_err().code(), 22);
}

#[test]
fn holes_are_seen_made_and_filled() {
    let (engine, folder, node) = with_file(4 << 20, json!({}));
    let extents = || {
        let (mut at, mut all) = (0, Vec::new());
        while at < 4 << 20 {
            let extent = run(&engine, &node.edge, op::BLOCK_STATUS, at, (4 << 20) - at, &[]).status;
            assert_eq!(extent.depth, 1);
            all.push((extent.flags & status::ZERO != 0, extent.length));
            at += extent.length;
        }
        all
    };
    let blocks = || fs::metadata(folder.path().join("a.img")).unwrap().blocks();
    assert_eq!(extents(), [(true, 4 << 20)]);
    run(&engine, &node.edge, op::WRITE, 1 << 20, 0, &vec![1; 1 << 20]).result.unwrap();
    assert_eq!(extents(), [(true, 1 << 20), (false, 1 << 20), (true, 2 << 20)]);
    assert_eq!(extents().len(), 3, "also when it was asked before");
    let before = blocks();
    run(&engine, &node.edge, op::DISCARD, 1 << 20, 512 << 10, &[]).result.unwrap();
    assert_eq!(extents(), [(true, 1536 << 10), (false, 512 << 10), (true, 2 << 20)]);
    assert!(blocks() <= before - 900, "the space is given back");
    let zeroes = Ask { op: op::WRITE_ZEROES, flags: flag::MAY_UNMAP, length: 4 << 20, ..Ask::default() };
    ask(&engine, &node.edge, zeroes, &[]).result.unwrap();
    assert_eq!((extents(), blocks() < 100), (vec![(true, 4 << 20)], true));
    ask(&engine, &node.edge, Ask { flags: 0, ..zeroes }, &[]).result.unwrap();
    assert!(blocks() >= 8192, "zeroes that may not be unmapped keep their space");
}

#[test]
fn discard_can_be_ignored() {
    let (engine, folder, node) = with_file(0, json!({ "discard": "ignore" }));
    assert_eq!(node.edge.info().flags & info::DISCARD, 0);
    run(&engine, &node.edge, op::WRITE, 0, 0, &vec![1; 1 << 20]).result.unwrap();
    let blocks = || fs::metadata(folder.path().join("a.img")).unwrap().blocks();
    run(&engine, &node.edge, op::DISCARD, 0, 1 << 20, &[]).result.unwrap();
    let zeroes = Ask { op: op::WRITE_ZEROES, flags: flag::MAY_UNMAP, length: 1 << 20, ..Ask::default() };
    ask(&engine, &node.edge, zeroes, &[]).result.unwrap();
    assert!(blocks() >= 2048);
}

#[test]
fn many_pieces_of_memory_are_one_request() {
    let (engine, _folder, node) = with_file(1 << 20, json!({}));
    let edge = driveline_drivers::conformance::scattered(&node.edge);
    // 40 MiB in pieces of at most 70 kB, some of a byte: more of them than a system call takes.
    let data: Vec<u8> = (0..40u32 << 20).map(|i| (i % 251) as u8).collect();
    run(&engine, &edge, op::WRITE, 5, 0, &data).result.unwrap();
    let found = run(&engine, &edge, op::READ, 5, 0, &vec![0; data.len() + 10]).buffer;
    assert!(found[..data.len()] == data[..] && found[data.len()..] == [0; 10]);
}

#[test]
fn o_direct_refuses_what_is_not_aligned() {
    let (engine, folder, _) = with_file(1 << 20, json!({ "locking": "off" }));
    let options = json!({ "path": "a.img", "cache": "none", "locking": "off" });
    let Ok(node) = open(&engine, folder.path(), options, false) else { return };
    let align = u64::from(node.edge.info().request_alignment);
    assert!(align >= 512 && node.edge.info().memory_alignment > 1, "{:?}", node.edge.info());
    assert_eq!(
        run(&engine, &node.edge, op::READ, 1, 0, &vec![0; align as usize]).result.unwrap_err().code(),
        22
    );
    assert_eq!(node.node.details()["cache"], "none");
}

#[test]
fn a_read_only_file_becomes_writable_and_back_without_losing_its_locks() {
    let (engine, folder, writer) = with_file(4096, json!({}));
    drop(writer);
    let node = open(&engine, folder.path(), json!({ "path": "a.img", "locking": "on" }), true).unwrap();
    let write = || run(&engine, &node.edge, op::WRITE, 0, 0, &[5; 10]).result.map_err(|error| error.code());
    let locks = || node.node.details()["locks"].clone();
    assert_eq!(write(), Err(1));
    assert_ne!(node.node.info(&[]).flags & info::READ_ONLY, 0);
    let before = locks();
    let set = |read_only| {
        let node = node.node.clone();
        engine.block_on_local(|| async move { node.set_read_only(&[], read_only).await })
    };
    // The file may have been renamed meanwhile.
    fs::rename(folder.path().join("a.img"), folder.path().join("b.img")).unwrap();
    set(false).unwrap();
    assert_eq!((write(), &locks()["used"]), (Ok(()), &json!("consistent read, write")));
    assert_eq!(&fs::read(folder.path().join("b.img")).unwrap()[..10], [5; 10]);
    set(true).unwrap();
    assert_eq!((write(), locks()), (Err(1), before));
}

#[test]
fn a_file_takes_a_new_size() {
    let (engine, folder, node) = with_file(4096, json!({}));
    for size in [8192, 100] {
        let node = node.node.clone();
        engine.block_on_local(|| async move { node.resize(&[], size).await }).unwrap();
        assert_eq!(fs::metadata(folder.path().join("a.img")).unwrap().len(), size);
    }
    assert_eq!(edge_to(FileDriver::default().description(), &*node.node, &[]).info().size_bytes, 100);
}

#[test]
fn what_cannot_be_opened_is_named() {
    let engine = engine(Backend::Auto).unwrap();
    let folder = TempDir::new().unwrap();
    Command::new("mkfifo").arg(folder.path().join("pipe")).status().unwrap();
    for (path, kind) in [("no.img", Kind::NotFound), (".", Kind::Io), ("pipe", Kind::Invalid)] {
        let error = open(&engine, folder.path(), json!({ "path": path }), false).map(drop).unwrap_err();
        let full = folder.path().join(path).display().to_string();
        assert!(error.message().contains(full.trim_end_matches("/.")), "{error}");
        assert_eq!((error.kind(), error.option()), (kind, Some("path")), "{error}");
    }
}

/// Mounted on a folder while it lives.
struct Mount(TempDir);

impl Mount {
    fn tmpfs(size: &str) -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let options = format!("size={size}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder.path()).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(Self(folder))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_reported_and_nothing_else_breaks() {
    let Some(mount) = Mount::tmpfs("1m") else {
        eprintln!("skipped: nothing can be mounted here");
        return;
    };
    for backend in BACKENDS {
        let Some(engine) = engine(backend) else { continue };
        let path = mount.0.path().join("a.img");
        fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
        let node = open(&engine, mount.0.path(), json!({ "path": "a.img" }), false).unwrap();
        run(&engine, &node.edge, op::WRITE, 0, 0, &vec![3; 512 << 10]).result.unwrap();
        let full = run(&engine, &node.edge, op::WRITE, 512 << 10, 0, &vec![4; 2 << 20]).result.unwrap_err();
        assert_eq!(full.code(), 28, "{full}");
        let zeroes = run(&engine, &node.edge, op::WRITE_ZEROES, 3 << 20, 1 << 20, &[]).result.unwrap_err();
        assert_eq!(zeroes.code(), 28, "{zeroes}");
        assert!(run(&engine, &node.edge, op::FLUSH, 0, 0, &[]).result.is_ok());
        let found = run(&engine, &node.edge, op::READ, 0, 0, &vec![0; 512 << 10]).buffer;
        assert!(found.iter().all(|byte| *byte == 3));
        run(&engine, &node.edge, op::DISCARD, 512 << 10, 3 << 20, &[]).result.unwrap();
        run(&engine, &node.edge, op::WRITE, 2 << 20, 0, &[5; 4096]).result.unwrap();
        fs::remove_file(&path).unwrap();
    }
}

/// A loop device while it lives.
struct Loop(String);

impl Loop {
    fn on(path: &Path) -> Option<Self> {
        let made = Command::new("losetup").args(["-f", "--show"]).arg(path).output().ok()?;
        made.status.success().then(|| Self(String::from_utf8(made.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_write_back_that_failed_is_not_forgotten() {
    // The kernel tells of it once, and gives the data up; the next fdatasync would succeed.
    let Some(mount) = Mount::tmpfs("1m") else { return };
    let path = mount.0.path().join("a.img");
    fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    let Some(device) = Loop::on(&path) else { return };
    let engine = engine(Backend::Auto).unwrap();
    let node = open(&engine, Path::new("/"), json!({ "path": &device.0 }), false).unwrap();
    run(&engine, &node.edge, op::WRITE, 0, 0, &vec![3; 4 << 20]).result.unwrap();
    for _ in 0..3 {
        run(&engine, &node.edge, op::FLUSH, 0, 0, &[]).result.unwrap_err();
    }
    let durable = Ask { op: op::WRITE, flags: flag::FUA, ..Ask::default() };
    ask(&engine, &node.edge, durable, &[1; 512]).result.unwrap_err();
}

#[test]
fn requests_need_little_memory_for_their_state() {
    let (_engine, _folder, node) = with_file(4096, json!({}));
    assert!(node.edge.arena_bytes() <= 2048, "{} bytes", node.edge.arena_bytes());
}

#[test]
fn a_block_device_conforms() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.img");
    fs::File::create(&path).unwrap().set_len(2 << 20).unwrap();
    let Some(device) = Loop::on(&path) else {
        eprintln!("skipped: no loop device can be made here");
        return;
    };
    for backend in BACKENDS {
        let Some(engine) = engine(backend) else { continue };
        for cache in ["writeback", "none"] {
            let options = json!({ "path": &device.0, "cache": cache });
            let node = open(&engine, Path::new("/"), options, false).unwrap();
            assert_eq!(node.edge.info().size_bytes, 2 << 20);
            assert_eq!(node.node.details()["kind"], "block device");
            let edge = node.edge.clone();
            engine.block_on_local(|| async move {
                check(&edge, Check { seed: 30, steps: 60, ..Check::default() }).await;
            });
            let full = run(&engine, &node.edge, op::WRITE, 2 << 20, 0, &[1; 4096]).result.unwrap_err();
            assert_eq!(full.code(), 28);
        }
    }
}
