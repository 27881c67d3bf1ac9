//! `driveline demo`: what a drive bitmap records while a guest writes and jobs rearrange the images below.
//!
//! ```text
//!   vda ─▶ active ─▶ middle ─▶ base         a guest writes all the while
//!   vda ─▶ active ─▶ base                   after the stream: middle's data is in active
//!   vda ─▶ base                             after the commit: all of it is in base
//! ```

mod chain;
mod client;
mod guest;

use crate::{
    commands::{fail, print},
    config::Address,
    daemon::{Daemon, StartError},
};
use driveline_bitmap::{Bitmap, Bits, View, render_map};
use driveline_drivers::Bytes;
use driveline_graph::{Error, Kind, NewBitmap, Result};
use driveline_jobs::{Base, CommitArgs, JobStatus, StreamArgs};
use guest::{Guest, PLACES};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Bytes a second, so that there is something to see.
const STREAM_SPEED: u64 = 10 << 20;
const COMMIT_SPEED: u64 = 24 << 20;
/// Columns of the maps.
const MAP_WIDTH: usize = 64;

/// Runs the demo.
pub fn demo() -> ExitCode {
    let directory = match tempfile::Builder::new().prefix("driveline-demo-").tempdir() {
        Ok(directory) => directory,
        Err(error) => return fail(format_args!("no temporary folder: {error}")),
    };
    match run(directory.path()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => fail("the drive bitmap is not what the guest wrote"),
        Err(message) => fail(message),
    }
}

/// What came of it.
struct Outcome {
    guest: Arc<Guest>,
    same_content: bool,
    daily: Arc<Bitmap>,
    on_base: Arc<Bitmap>,
}

/// Is the drive bitmap exact?
fn run(directory: &Path) -> Result<bool, String> {
    let content = chain::make(directory)?;
    let (config, mistakes) = chain::config(directory);
    let socket = match config.exports.first().map(|export| export.address.get_ref()) {
        Some(Address::Unix(path)) => path.clone(),
        _ => return Err("the demo has a socket".to_owned()),
    };
    let daemon = Daemon::start(&config, mistakes).map_err(|error| match error {
        StartError::Config(mistakes) => mistakes.render(false),
        error => error.to_string(),
    })?;
    let uri = daemon.exports().first().map(|export| export.uri.clone()).unwrap_or_default();
    print(&format!(
        "A chain of three images of {}, and a guest that writes to drive 'vda' over NBD:\n  {uri}\n\n",
        Bytes(chain::SIZE_BYTES)
    ));
    let outcome = daemon.engine().block_on_local(|| play(&daemon, socket, content));
    let stopped = daemon.stop();
    let outcome = outcome.map_err(|error| error.to_string())?;
    stopped.map_err(|error| error.to_string())?;
    let (exact, text) = tell(&outcome);
    print(&text);
    Ok(exact && outcome.same_content)
}

/// The story: a guest writes, and two jobs run.
async fn play(daemon: &Daemon, socket: PathBuf, mut content: Vec<u8>) -> Result<Outcome> {
    let (graph, jobs) = (daemon.graph(), daemon.jobs());
    // What QEMU has: a bitmap of a node, which records whatever is written to its node.
    let mut change = graph.change().await;
    let of_node = NewBitmap { granularity: Some(64 << 10), view: View::Node, ..NewBitmap::named("of-node") };
    change.add_bitmap("base", of_node)?;
    change.commit().await?;
    let (daily, on_base) = (graph.bitmap("vda", "daily")?, graph.bitmap("base", "of-node")?);

    let guest = Arc::new(Guest {
        socket: socket.clone(),
        written: Bits::new(daily.granularity(), daily.length()),
        requests: Default::default(),
        stop: Default::default(),
    });
    let start = Instant::now();
    let clock = || start.elapsed().as_secs_f64();
    let count = || guest.requests.load(Relaxed);
    let part = |place: &std::ops::Range<u64>| content[place.start as usize..place.end as usize].to_vec();
    let writers: Vec<_> = PLACES
        .iter()
        .enumerate()
        .map(|(number, place)| driveline_engine::spawn_local(guest.clone().run(number, part(place))))
        .collect();

    say(clock(), "the guest writes, with three connections");
    driveline_engine::sleep(Duration::from_millis(100)).await;
    say(clock(), "stream begins: what is in 'middle' is copied up into 'active'");
    let before = count();
    let stream = StreamArgs {
        device: "vda".into(),
        base: Some(Base::Node("base".into())),
        speed: STREAM_SPEED,
        ..StreamArgs::default()
    };
    let job = jobs.stream(stream).await?;
    succeeded(jobs.wait(&job).await?.error)?;
    say(clock(), &format!("stream is done: vda -> active -> base; {} writes meanwhile", count() - before));

    say(clock(), "commit begins: all of 'active' is written down into 'base'");
    let before = count();
    let commit = CommitArgs {
        device: "vda".into(),
        base_node: Some("base".into()),
        speed: COMMIT_SPEED,
        ..CommitArgs::default()
    };
    let job = jobs.commit(commit).await?;
    loop {
        let info = jobs.get(&job)?;
        match info.status {
            JobStatus::Ready => break,
            _ if info.error.is_some() => succeeded(info.error)?,
            _ => driveline_engine::sleep(Duration::from_millis(5)).await,
        }
    }
    jobs.complete(&job)?;
    succeeded(jobs.wait(&job).await?.error)?;
    say(clock(), &format!("commit is done: vda -> base; {} writes meanwhile", count() - before));
    driveline_engine::sleep(Duration::from_millis(50)).await;

    guest.stop.store(true, Relaxed);
    let broken = |error: std::io::Error| Error::new(Kind::Io, format_args!("the guest: {error}"));
    for (place, writer) in PLACES.iter().zip(writers) {
        let written =
            writer.await.map_err(|error| Error::new(Kind::Io, format_args!("the guest: {error:?}")))?;
        content[place.start as usize..place.end as usize].copy_from_slice(&written.map_err(broken)?);
    }
    let same_content = guest::read_all(&socket).await.map_err(broken)? == content;
    say(clock(), "the guest stops, and reads everything back\n");
    Ok(Outcome { guest, same_content, daily, on_base })
}

fn succeeded(error: Option<String>) -> Result<()> {
    error.map_or(Ok(()), |error| Err(Error::new(Kind::Io, format_args!("the job failed: {error}"))))
}

fn say(seconds: f64, what: &str) {
    print(&format!("  {seconds:4.1} s  {what}\n"));
}

/// Whether the drive bitmap is exact, and the table.
fn tell(outcome: &Outcome) -> (bool, String) {
    let Outcome { guest, same_content, daily, on_base } = outcome;
    let exact = guest.written.iter_dirty().eq(daily.bits().iter_dirty());
    let wrote = guest.written.dirty_granules();
    let verdict = |bits: &Bits| {
        let (noise, lost) = (minus(bits, &guest.written), minus(&guest.written, bits));
        match (noise, lost) {
            (0, 0) => "exactly that".to_owned(),
            (noise, 0) => format!("{noise} too many"),
            (noise, lost) => format!("{noise} too many, {lost} missing"),
        }
    };
    let rows = [
        ("the guest wrote", &guest.written, String::new()),
        ("drive bitmap 'daily'", daily.bits(), verdict(daily.bits())),
        ("node bitmap on 'base'", on_base.bits(), verdict(on_base.bits())),
    ];
    let mut out =
        format!("{:24}  {:>8}\n", format!("blocks of {}", Bytes(daily.granularity().bytes())), "dirty");
    for (name, bits, verdict) in &rows {
        let line = format!("{name:24}  {:>8}  {verdict}", bits.dirty_granules());
        out.push_str(&format!("{}\n", line.trim_end()));
    }
    out.push_str(&format!(
        "\nThe same as maps, each character {}:\n",
        Bytes(chain::SIZE_BYTES / MAP_WIDTH as u64)
    ));
    for (name, bits, _) in &rows {
        out.push_str(&format!("{name:24}  {}\n", render_map(bits, MAP_WIDTH)));
    }
    let requests = guest.requests.load(Relaxed);
    let equal = if exact { "equal" } else { "NOT equal" };
    let content = if *same_content { "reads back as written" } else { "does NOT read back as written" };
    out.push_str(&format!(
        "\nAfter {requests} writes to {wrote} blocks, drive bitmap and guest are {equal}, and the disk {content}.\n"
    ));
    let more = on_base.bits().dirty_granules() as f64 / wrote.max(1) as f64;
    out.push_str(&format!(
        "The node bitmap has what the commit wrote as well: a backup by it would copy {more:.1} times as much.\n"
    ));
    (exact, out)
}

/// How many blocks are dirty in `bits` and not in `other`.
fn minus(bits: &Bits, other: &Bits) -> u64 {
    let granularity = bits.granularity().bytes();
    let blocks = bits.iter_dirty().flat_map(|range| range.step_by(granularity as usize));
    blocks.filter(|offset| !other.is_dirty(*offset)).count() as u64
}
