//! `driveline check-image` and `driveline image`: qcow2 images that are not in use.

use super::{fail, print};
use crate::cli::{Image, RepairWhat, Snapshot};
use driveline_drivers::{
    Bytes,
    qcow2::{
        CheckReport, Repair, Verdict, apply_snapshot_of_file, check_file, delete_snapshot_of_file,
        snapshots_of_file, take_snapshot_of_file,
    },
};
use driveline_engine::{Config, Engine};
use driveline_graph::{Kind, Result};
use std::{fmt::Write, future::Future, path::Path, process::ExitCode};

/// What a file that is no qcow2 image gets, as from `qemu-img check`.
const NO_IMAGE: u8 = 63;

/// Runs something that uses files, on an engine of one thread.
fn on_engine<T: Send, F: Future<Output = Result<T>>>(make: impl FnOnce() -> F + Send) -> Result<T, String> {
    let engine = Engine::start(Config { threads: 1, ..Config::default() })
        .map_err(|error| format!("the engine does not start: {error}"))?;
    let result = engine.block_on_local(|| async { Ok(make().await) });
    engine.shutdown();
    result.and_then(|result: Result<T>| result.map_err(|error| error.to_string()))
}

/// Checks an image, and repairs it if that is asked for.
pub fn check_image(image: &Path, repair: Option<RepairWhat>, json: bool) -> ExitCode {
    let repair = match repair {
        None => Repair::Nothing,
        Some(RepairWhat::Leaks) => Repair::Leaks,
        Some(RepairWhat::All) => Repair::All,
    };
    let checked = on_engine(|| async {
        match check_file(image, repair).await {
            Err(error) if error.kind() == Kind::Invalid => Ok(Err(error.to_string())),
            other => other.map(Ok),
        }
    });
    let report = match checked {
        Ok(Ok(report)) => report,
        Ok(Err(no_image)) => {
            fail(format_args!("{}: {no_image}", image.display()));
            return ExitCode::from(NO_IMAGE);
        }
        Err(error) => return fail(format_args!("{}: the check failed: {error}", image.display())),
    };
    let text = if json { in_json(image, &report) } else { in_words(&report) };
    let printed = print(&text);
    match report.verdict() {
        Verdict::Clean => printed,
        Verdict::Incomplete => ExitCode::from(1),
        Verdict::Corrupt => ExitCode::from(2),
        Verdict::Leaks => ExitCode::from(3),
    }
}

/// With the keys of `qemu-img check --output=json`, all of them always, and what was found in words.
fn in_json(image: &Path, report: &CheckReport) -> String {
    let json = serde_json::json!({
        "image-end-offset": report.image_end_bytes,
        "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters,
        "fragmented-clusters": report.fragmented_clusters,
        "compressed-clusters": report.compressed_clusters,
        "check-errors": report.check_errors,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "corruptions-fixed": report.corruptions_fixed,
        "leaks-fixed": report.leaks_fixed,
        "filename": image.to_string_lossy(),
        "format": "qcow2",
        "findings": report.findings,
        "findings-left-out": report.findings_left_out,
    });
    format!("{json:#}\n")
}

/// Looks after an image.
pub fn image(command: Image) -> ExitCode {
    let Image::Snapshot(command) = command;
    let (image, done) = match &command {
        Snapshot::List { json, image } => {
            let listed = on_engine(|| snapshots_of_file(image));
            (image, listed.map(|found| if *json { list_in_json(&found) } else { list_in_words(&found) }))
        }
        Snapshot::Create(new) => {
            let taken = on_engine(|| take_snapshot_of_file(&new.image, &new.name));
            (&new.image, taken.map(|id| format!("{id}\n")))
        }
        Snapshot::Apply(old) => {
            let applied = on_engine(|| apply_snapshot_of_file(&old.image, &old.name));
            (&old.image, applied.map(|()| String::new()))
        }
        Snapshot::Delete(old) => {
            let deleted = on_engine(|| delete_snapshot_of_file(&old.image, &old.name));
            (&old.image, deleted.map(|()| String::new()))
        }
    };
    match done {
        Ok(text) => print(&text),
        Err(error) => fail(format_args!("{}: {error}", image.display())),
    }
}

fn list_in_json(snapshots: &[driveline_graph::Snapshot]) -> String {
    let list = snapshots.iter().map(|snapshot| {
        serde_json::json!({
            "id": snapshot.id,
            "name": snapshot.name,
            "vm-state-size": snapshot.vm_state_bytes,
            "date-sec": snapshot.date_ns / 1_000_000_000,
            "date-nsec": snapshot.date_ns % 1_000_000_000,
            "vm-clock-nsec": snapshot.vm_clock_ns,
            "virtual-size": snapshot.size_bytes,
        })
    });
    format!("{:#}\n", serde_json::Value::Array(list.collect()))
}

fn list_in_words(snapshots: &[driveline_graph::Snapshot]) -> String {
    let mut out = String::new();
    let width = |of: fn(&driveline_graph::Snapshot) -> usize| snapshots.iter().map(of).max().unwrap_or(0);
    let widths = (width(|s| s.id.chars().count()), width(|s| s.name.chars().count()));
    for snapshot in snapshots {
        let size = snapshot.size_bytes.map(|bytes| Bytes(bytes).to_string());
        let _ = writeln!(
            out,
            "{:>4$}  {:5$}  {}  {}",
            snapshot.id,
            // It is whatever its maker wrote.
            snapshot.name.escape_debug().to_string(),
            date(snapshot.date_ns / 1_000_000_000),
            size.as_deref().unwrap_or("size unknown"),
            widths.0,
            widths.1
        );
    }
    out
}

/// Seconds since 1970 as a date, in the Gregorian calendar, of UTC.
fn date(seconds: u64) -> String {
    let (days, seconds) = (seconds / 86_400, seconds % 86_400);
    let leap = |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let (mut year, mut day) = (1970, days);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year}-{month:02}-{:02} {hour:02}:{minute:02}:{second:02}", day + 1)
}

fn in_words(report: &CheckReport) -> String {
    let mut out = String::new();
    for finding in &report.findings {
        let _ = writeln!(out, "{finding}");
    }
    if report.findings_left_out > 0 {
        let _ = writeln!(out, "and {} more", report.findings_left_out);
    }
    let count = |what: &str, count: u64| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    let (corruptions, leaks) = (report.corruptions_fixed, report.leaks_fixed);
    if corruptions + leaks > 0 {
        let _ = writeln!(out, "repaired: {}, {}", count("corruption", corruptions), count("leak", leaks));
    }
    let _ = match report.verdict() {
        Verdict::Clean => writeln!(out, "no errors were found"),
        _ => writeln!(
            out,
            "wrong: {}, {}, {} not checked",
            count("corruption", report.corruptions),
            count("leak", report.leaks),
            count("cluster", report.check_errors)
        ),
    };
    let allocated = report.allocated_clusters;
    let percent = |part: u64, of: u64| part as f64 * 100.0 / of.max(1) as f64;
    let _ = writeln!(
        out,
        "{allocated} of {} clusters are allocated ({:.2} %), {:.2} % of them fragmented, {:.2} % compressed",
        report.total_clusters,
        percent(allocated, report.total_clusters),
        percent(report.fragmented_clusters, allocated),
        percent(report.compressed_clusters, allocated)
    );
    let _ = writeln!(out, "the image ends at {}", report.image_end_bytes);
    out
}

#[cfg(test)]
mod tests {
    use super::date;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(1_709_251_199), "2024-02-29 23:59:59");
        assert_eq!(date(4_107_542_400), "2100-03-01 00:00:00");
        assert_eq!(date(1_735_689_599), "2024-12-31 23:59:59");
    }
}
