//! `driveline check-image`: qcow2 images that are not in use.

use super::{fail, print};
use crate::cli::RepairWhat;
use driveline_drivers::qcow2::{CheckReport, Repair, Verdict, check_file};
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
