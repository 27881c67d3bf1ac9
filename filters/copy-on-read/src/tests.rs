use super::CopyOnRead;
use driveline_drivers::{
    MemoryDriver,
    conformance::{Check, OpenNodeArgs, check, open_node},
    qcow2::Qcow2Driver,
};
use driveline_graph::OpenChild;
use driveline_sdk::{
    BlockStatus,
    prelude::*,
    status,
    testing::{self, Below, Leaf, Node, Value, json},
};
use std::{
    collections::BTreeSet,
    ops::Range,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

/// An image over a base, as a filter: what was written lies in child 0, the rest comes from `base`, sector by sector.
struct Overlay {
    written: Mutex<BTreeSet<u64>>,
}

const SECTOR: u64 = 512;

impl Overlay {
    /// The first extent: is it written, and how long is it?
    fn extent(&self, range: Range<u64>) -> (bool, u64) {
        let written = self.written.lock().unwrap();
        let first = range.start / SECTOR;
        let here = written.contains(&first);
        let same = (first..range.end.div_ceil(SECTOR)).take_while(|sector| written.contains(sector) == here);
        let end = (first + same.count() as u64) * SECTOR;
        (here, end.min(range.end) - range.start)
    }

    /// Fills a sector that is only written in part from the base.
    async fn take(&self, next: &mut Next<'_>, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        for sector in range.start / SECTOR..range.end.div_ceil(SECTOR) {
            let whole = range.start <= sector * SECTOR && (sector + 1) * SECTOR <= range.end;
            if !whole && !self.extent(sector * SECTOR..(sector + 1) * SECTOR).0 {
                let mut data = [0; SECTOR as usize];
                next.read_at(1, sector * SECTOR, &mut data).await?;
                next.write_at(0, sector * SECTOR, &data, 0).await?;
            }
            self.written.lock().unwrap().insert(sector);
        }
        Ok(())
    }
}

#[filter(name = "overlay", default = "pass", children("base"))]
impl Filter for Overlay {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Overlay { written: Mutex::default() })
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        let (mut at, end) = (request.range().start, request.range().end);
        while at < end {
            let (here, length) = self.extent(at..end);
            let from = at - request.offset();
            let memory = request.part(from..from + length);
            let read = memory.read_request(at);
            next.child(usize::from(!here)).read(&read).await?;
            at += length;
        }
        Ok(())
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        next.write(request).await?; // a full disk shows before anything is taken
        self.take(next, request.range()).await?;
        next.write(request).await
    }

    async fn write_zeroes(&self, next: &mut Next<'_>, request: &WriteZeroesRequest<'_>) -> Result<()> {
        self.take(next, request.range()).await?;
        next.write_zeroes(request).await
    }

    async fn block_status(&self, _: &mut Next<'_>, request: &BlockStatusRequest<'_>) -> Result<()> {
        let (here, length) = self.extent(request.range());
        request.answer(BlockStatus {
            flags: status::DATA,
            depth: if here { 1 } else { 2 },
            length,
            ..BlockStatus::default()
        });
        Ok(())
    }
}

const MIB: u64 = 1 << 20;

struct Layers {
    node: Node,
    image: Leaf,
    base: Leaf,
}

/// A `copy-on-read` above an empty image above a base that is full of sevens.
fn layers(options: Value) -> Layers {
    let (image, base) = (testing::memory(MIB), testing::memory(MIB));
    base.set_data(0, &[7; MIB as usize]);
    let overlay = testing::open_with::<Overlay>(json!({}), &image, &[("base", &base)]).unwrap();
    Layers { node: testing::open::<CopyOnRead>(options, &overlay).unwrap(), image, base }
}

#[test]
fn what_is_read_is_kept_in_whole_chunks_unchanged() {
    let Layers { node, image, base } = layers(json!({}));
    testing::block_on(async {
        assert_eq!(node.read(70_000..70_100).await.unwrap(), [7; 100]);
        assert!(image.seen().contains(&"write 65536+65536 unchanged".to_owned()));
        base.seen();
        assert_eq!(node.read(65536..131_072).await.unwrap(), [7; 65536]);
        assert!(base.seen().is_empty(), "it is read from the image now");
        assert_eq!(image.seen(), ["read 65536+65536"]);
    });
    assert_eq!(image.data(65535..65537), [0, 7]);
    assert_eq!(image.data(131_071..131_073), [7, 0]);
}

#[test]
fn what_is_in_the_image_is_left_alone() {
    let Layers { node, image, .. } = layers(json!({ "chunk": "4KiB" }));
    testing::block_on(async {
        node.write(1024, &[9; 512]).await.unwrap();
        image.seen();
        let data = node.read(0..8192).await.unwrap();
        assert_eq!((data[1023], data[1024], data[1535], data[1536]), (7, 9, 9, 7));
        let writes: BTreeSet<_> = image.seen().into_iter().filter(|seen| seen.starts_with("write")).collect();
        let expected = ["write 0+1024 unchanged", "write 1536+2560 unchanged", "write 4096+4096 unchanged"];
        assert_eq!(writes, expected.map(str::to_owned).into());
    });
}

#[test]
fn zeroes_are_kept_as_zeroes() {
    let Layers { node, image, base } = layers(json!({ "chunk": 512 }));
    base.set_data(0, &[0; 4096]);
    testing::block_on(async {
        assert_eq!(node.read(0..512).await.unwrap(), [0; 512]);
        assert_eq!(image.seen(), ["event cor_write", "write_zeroes 0+512 unchanged", "read 0+512"]);
    });
}

#[test]
fn a_hint_keeps_data_without_reading_it_upwards() {
    let Layers { node, image, base } = layers(json!({}));
    testing::block_on(async {
        node.cache(0..MIB).await.unwrap();
        base.seen();
        node.read(0..MIB).await.unwrap();
    });
    assert!(base.seen().is_empty());
    assert_eq!(image.data(0..MIB), vec![7; MIB as usize]);
}

#[test]
fn writes_at_the_same_time_win() {
    for delay in 0..8 {
        let Layers { node, image, base } = layers(json!({}));
        base.set_latency(Duration::from_millis(3));
        image.set_latency(Duration::from_millis(1));
        testing::block_on(async {
            testing::join((0..20_u64).map(async |number| {
                if number % 2 == 0 {
                    node.read(0..128 << 10).await.unwrap();
                } else {
                    sleep(Duration::from_millis(delay)).await;
                    node.write(number * 4096, &[number as u8; 4096]).await.unwrap();
                }
            }))
            .await;
            let data = node.read(0..128 << 10).await.unwrap();
            for number in 0..32 {
                let expected = if number < 20 && number % 2 == 1 { number as u8 } else { 7 };
                let found = &data[number * 4096..][..4096];
                assert!(
                    found.iter().all(|byte| *byte == expected),
                    "block {number}, written after {delay} ms"
                );
            }
        });
    }
}

#[test]
fn a_read_succeeds_though_its_data_cannot_be_kept() {
    let Layers { node, image, .. } = layers(json!({}));
    image.fail("write", 0..MIB, 28, 1);
    testing::block_on(async {
        assert_eq!(node.read(0..512).await.unwrap(), [7; 512]);
        assert_eq!(image.data(0..512), [0; 512]);
        node.read(0..512).await.unwrap();
        assert_eq!(image.data(0..512), [7; 512], "the next one tries again");
    });
}

#[test]
fn the_log_has_the_first_failure_of_a_series() {
    let Layers { node, image, .. } = layers(json!({ "chunk": 512 }));
    let warnings = Arc::new(AtomicUsize::new(0));
    testing::listen(Warnings(warnings.clone()), || {
        testing::block_on(async {
            let mut logged = Vec::new();
            for (sector, fails) in [true, true, true, false, true, true].into_iter().enumerate() {
                let start = sector as u64 * SECTOR;
                image.fail("write", start..start + SECTOR, 28, u32::from(fails));
                node.read(start..start + SECTOR).await.unwrap();
                logged.push(warnings.load(Relaxed));
            }
            assert_eq!(logged, [1, 1, 1, 1, 2, 2]);
        });
    });
}

/// Counts warnings.
struct Warnings(Arc<AtomicUsize>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "driveline_filter_copy_on_read" && *metadata.level() == tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Relaxed);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn a_read_fails_if_that_is_to_be_reported() {
    let Layers { node, image, .. } = layers(json!({ "on-write-error": "report" }));
    image.fail("write", 0..MIB, 28, 1);
    testing::block_on(async {
        assert_eq!(node.read(0..512).await.unwrap_err().code(), 28);
        assert_eq!(node.read(0..512).await.unwrap(), [7; 512]);
    });
}

#[test]
fn a_read_fails_only_where_it_cannot_be_read() {
    let Layers { node, image, base } = layers(json!({}));
    testing::block_on(async {
        base.fail("read", 512..1024, 5, 1);
        assert_eq!(node.read(0..512).await.unwrap(), [7; 512], "only the rest of its chunk is bad");
        assert_eq!(image.data(0..512), [0; 512]);
        base.fail("read", 512..1024, 5, 2);
        assert_eq!(node.read(0..1024).await.unwrap_err().code(), 5);
        assert_eq!(node.read(0..1024).await.unwrap(), [7; 1024], "it is well again");
        assert_eq!(image.data(0..1024), [7; 1024]);
    });
}

#[test]
fn impossible_options_are_refused_by_name() {
    for wrong in [json!(0), json!(256), json!(65537), json!("32MiB")] {
        let refused = testing::check::<CopyOnRead>(json!({ "chunk": wrong })).unwrap_err();
        let text = "option 'chunk': expected a power of two from 512 to \"16MiB\"";
        assert_eq!(refused.to_string(), text);
    }
}

#[test]
fn the_readme_is_true() {
    testing::check_readme::<CopyOnRead>(include_str!("../README.md"), |text| toml::from_str(text).unwrap());
}

#[test]
fn it_conforms() {
    let Layers { node, .. } = layers(json!({ "chunk": "16KiB" }));
    testing::block_on(check(&node.edge(), Check { steps: 60, ..Check::default() }));
}

/// An empty qcow2 image in memory over a base that is full of sevens. `None`: QEMU's tools are missing.
async fn qcow2() -> Option<OpenChild> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.qcow2");
    let made = Command::new("qemu-img").args(["create", "-f", "qcow2"]).arg(&path).arg("1M").output();
    if made.is_err() {
        assert!(std::env::var_os("CI").is_none(), "qemu-img is missing, and CI must not skip tests");
        eprintln!("SKIPPED: qemu-img is missing, so this test shows nothing");
        return None;
    }
    let memory = async |name, data: Vec<u8>| {
        let args = OpenNodeArgs { name, ..OpenNodeArgs::default() };
        let node = args.open(&MemoryDriver::default(), json!({ "size": data.len() }), vec![]).await.unwrap();
        let filled = testing::open::<Nothing>(json!({}), &node.edge).unwrap();
        filled.write(0, &data).await.unwrap();
        node
    };
    let file = memory("file", std::fs::read(&path).unwrap()).await;
    let base = memory("backing", vec![7; MIB as usize]).await;
    Some(open_node(&Qcow2Driver::default(), json!({}), vec![file, base]).await.unwrap())
}

#[filter(name = "nothing", default = "pass")]
impl Filter for Nothing {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Nothing)
    }
}

struct Nothing;

#[test]
fn a_qcow2_image_is_populated_by_its_clusters() {
    testing::block_on(async {
        let Some(image) = qcow2().await else { return };
        let node = testing::open::<CopyOnRead>(json!({}), &image.edge).unwrap();
        assert_eq!(node.block_status(0..MIB).await.unwrap().depth, 2);
        assert_eq!(node.read(100_000..100_001).await.unwrap(), [7]);
        let kept = node.block_status(65536..MIB).await.unwrap();
        assert_eq!((kept.depth, kept.length), (1, 65536));
        assert_eq!(node.block_status(131_072..MIB).await.unwrap().depth, 2);
        check(&node.edge(), Check { steps: 40, ..Check::default() }).await;
    });
}
