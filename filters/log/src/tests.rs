use super::Log;
use driveline_drivers::conformance::{Check, check};
use driveline_sdk::{
    flag,
    testing::{self, Below, json},
    tracing::Level,
};
use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
    time::Duration,
};
use tracing_subscriber::fmt;

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The lines that a subscriber writes, up to a level, while a test runs.
fn listen(level: Level, test: impl AsyncFnOnce()) -> Vec<String> {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = fmt::Subscriber::builder()
        .with_max_level(level)
        .without_time()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    testing::listen(subscriber, || testing::block_on(test()));
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    text.lines().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn each_request_is_told_when_it_ends() {
    let below = testing::memory(1 << 20);
    below.set_latency(Duration::from_micros(250));
    below.fail("discard", 0..512, 28, 1);
    let node = testing::open::<Log>(json!({}), &below).unwrap();
    let lines = listen(Level::INFO, async || {
        node.read(512..1024).await.unwrap();
        node.write_with(0, b"data", flag::FUA | flag::UNCHANGED).await.unwrap();
        node.discard(0..512).await.unwrap_err();
    });
    let told = "INFO driveline_filter_log: node=\"test\"";
    assert_eq!(
        lines,
        [
            format!("{told} op=\"read\" offset=512 length=512 flags=\"\" result=\"ok\" microseconds=250"),
            format!(
                "{told} op=\"write\" offset=0 length=4 flags=\"fua,unchanged\" result=\"ok\" microseconds=250"
            ),
            format!(
                "{told} op=\"discard\" offset=0 length=512 flags=\"\" \
                 result=\"No space left on device (os error 28)\" microseconds=250"
            ),
        ]
    );
}

#[test]
fn operations_that_are_not_named_are_not_told() {
    let below = testing::memory(1 << 20);
    let node = testing::open::<Log>(json!({ "ops": ["flush", "write-zeroes"] }), &below).unwrap();
    let lines = listen(Level::INFO, async || {
        node.read(0..512).await.unwrap();
        node.write(0, b"data").await.unwrap();
        node.write_zeroes(0..512).await.unwrap();
        node.flush().await.unwrap();
    });
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert!(lines[0].contains("write_zeroes") && lines[1].contains("flush"), "{lines:#?}");
    assert_eq!(below.seen().len(), 4);
}

#[test]
fn only_slow_ones_are_told_if_so_asked() {
    let below = testing::memory(1 << 20);
    let node = testing::open::<Log>(json!({ "slow": "10ms", "level": "warn" }), &below).unwrap();
    let lines = listen(Level::INFO, async || {
        for milliseconds in [0, 9, 10, 30] {
            below.set_latency(Duration::from_millis(milliseconds));
            node.flush().await.unwrap();
        }
    });
    let times: Vec<_> = lines.iter().map(|line| line.split("microseconds=").nth(1).unwrap()).collect();
    assert_eq!(times, ["10000", "30000"]);
    assert!(lines.iter().all(|line| line.starts_with("WARN")), "{lines:#?}");
}

#[test]
fn nobody_hears_what_is_told_below_his_level() {
    for (level, heard) in [("error", 1), ("warn", 1), ("info", 1), ("debug", 0), ("trace", 0)] {
        let node = testing::open::<Log>(json!({ "level": level }), &testing::memory(1 << 20)).unwrap();
        let lines = listen(Level::INFO, async || node.flush().await.unwrap());
        assert_eq!(lines.len(), heard, "{level}");
    }
}

#[test]
fn impossible_options_are_refused_by_name() {
    for (options, text) in [
        (json!({ "ops": [] }), "option 'ops': with no operation, nothing is told"),
        (
            json!({ "level": "loud" }),
            "option 'level': unknown variant `loud`, expected one of `error`, `warn`, `info`, `debug`, `trace`",
        ),
    ] {
        assert_eq!(testing::check::<Log>(options).unwrap_err().to_string(), text);
    }
    assert_eq!(testing::check::<Log>(json!({ "ops": ["erase"] })).unwrap_err().key(), Some("ops[0]"));
}

#[test]
fn the_readme_is_true() {
    testing::check_readme::<Log>(include_str!("../README.md"), |text| toml::from_str(text).unwrap());
}

#[test]
fn it_conforms() {
    let node = testing::open::<Log>(json!({}), &testing::memory(1 << 20)).unwrap();
    testing::block_on(check(&node.edge(), Check { steps: 100, ..Check::default() }));
}
