//! The kill comes at any moment: before the job has begun, while it looks for what to do, at work, at its end.
//!
//! Every world has a seed, which is printed when it fails. `DRIVELINE_RESTARTS` says how many worlds, and `DRIVELINE_RESTARTS_SEED`
//! runs one alone.

use super::{TOOLS, keep, qcow2_target, raw_target, world::*};
use crate::harness::{have, output};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const WORLDS_IN_CI: u64 = 10;

/// What a job ends with, besides its drive.
enum Copy {
    None,
    /// A copy that follows, in this format.
    Follows(&'static str),
    /// A copy of the drive as it was, in this format; and what it was.
    Was(&'static str, String),
}

fn live(seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut world = if seed.is_multiple_of(2) { World::raw(seed) } else { World::chain(seed, 12) };
    let kind = if seed.is_multiple_of(2) { random.random_range(3..7) } else { random.random_range(0..7) };
    let blocking = if random.random_bool(0.5) { "write-blocking" } else { "background" };
    let (command, mut arguments, copy) = match kind {
        0 => ("block-stream", json!({}), Copy::None),
        1 => ("block-commit", json!({ "top-node": "mid", "base-node": "base" }), Copy::None),
        2 => ("block-commit", json!({ "base-node": "base" }), Copy::None),
        3 | 4 => {
            let format = if kind == 3 { "raw" } else { "qcow2" };
            if kind == 3 {
                raw_target(&mut world)
            } else {
                qcow2_target(&mut world, &[])
            }
            let arguments = json!({ "target": "copy", "sync": "full", "copy-mode": blocking });
            ("blockdev-mirror", arguments, Copy::Follows(format))
        }
        _ => {
            let format = if kind == 5 { "raw" } else { "qcow2" };
            if kind == 5 {
                raw_target(&mut world)
            } else {
                qcow2_target(&mut world, &[])
            }
            let kept = keep(&world);
            let arguments = json!({ "target": "copy", "sync": "full" });
            ("blockdev-backup", arguments, Copy::Was(format, kept))
        }
    };
    arguments["device"] = json!("vda");
    arguments["job-id"] = json!("work");
    arguments["speed"] = json!([4 * MIB, 16 * MIB, 64 * MIB][random.random_range(0..3)]);
    let mut may_be_missing = true;
    match random.random_range(0..4) {
        // Whoever asked was not told.
        0 => {
            let mut qmp = world.daemon().qmp();
            let asking = std::thread::spawn(move || qmp.attempt(command, arguments).is_ok());
            std::thread::sleep(Duration::from_micros(random.random_range(0..20_000)));
            world.kill();
            asking.join().unwrap();
        }
        _ => {
            world.qmp.run(command, arguments);
            may_be_missing = false;
            world.begin_to_write();
            std::thread::sleep(Duration::from_micros(random.random_range(0..500_000)));
            world.kill();
        }
    }
    let mut goes_on = true;
    for _ in 0..2 {
        // An image is opened without its witness, and gets it when its bitmaps are found: killed between, all of it is dirty.
        if seed.is_multiple_of(2) && random.random_bool(0.5) {
            world.kill_while_starting(Duration::from_micros(random.random_range(0..80_000)));
        }
        let jobs = world.start();
        goes_on &= jobs.iter().any(|job| job["outcome"] == "resumed");
        let over = jobs.is_empty() || jobs[0]["outcome"] == "finished";
        let never = may_be_missing && jobs.first().is_none_or(|job| job["outcome"] == "dropped");
        assert!(goes_on || over || never, "seed {seed}: {jobs:?}");
        world.begin_to_write();
        std::thread::sleep(Duration::from_micros(random.random_range(0..300_000)));
        world.kill();
    }
    let jobs = world.start();
    goes_on &= jobs.iter().any(|job| job["outcome"] == "resumed");
    world.begin_to_write();
    if goes_on {
        finish(&mut world, seed);
    }
    world.stop_writing();
    world.assert_data_is_the_guests();
    // A chain that a job has shortened, and that the configuration still has, is another one for the bitmap.
    if kind > 1 || goes_on {
        world.assert_bitmap_is_exact();
    }
    let follows = matches!(copy, Copy::Follows(_)) && goes_on;
    let now = if follows { keep(&world) } else { String::new() };
    if world.job("work").is_some() {
        world.qmp.run("block-job-cancel", json!({ "device": "work" }));
        world.wait_completed("work");
    }
    assert_eq!(world.journals(), [""; 0], "seed {seed}");
    world.end();
    let expected = match (copy, goes_on || !may_be_missing) {
        (Copy::Follows(format), _) if follows => (format, now),
        (Copy::Was(format, kept), true) => (format, kept),
        _ => return,
    };
    let path = world.path(&format!("copy.{}", expected.0));
    let compared = output("qemu-img", &["compare", "-f", expected.0, "-F", "raw", &path, &expected.1]);
    let told = String::from_utf8_lossy(&compared.stdout);
    assert!(compared.status.success(), "seed {seed}, {command}: {told}");
    if expected.0 == "qcow2" {
        // Leaks are what a crash may leave.
        let code = output("qemu-img", &["check", "-q", &path]).status.code();
        assert!(matches!(code, Some(0 | 3)), "seed {seed}: {code:?}");
    }
}

/// Lets the job come to its end, or follow its drive.
fn finish(world: &mut World, seed: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut hurried = false;
    loop {
        let Some(job) = world.job("work") else { return };
        match job["status"].as_str().unwrap() {
            "ready" => return,
            "running" if !hurried => {
                // It may be over by now.
                let speed = json!({ "device": "work", "speed": 0 });
                hurried = world.qmp.try_run("block-job-set-speed", speed).is_ok();
            }
            _ => {}
        }
        assert_eq!(job["error"], Value::Null, "seed {seed}");
        assert!(Instant::now() < deadline, "seed {seed}: {job}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn whenever_the_program_is_killed_jobs_end_with_what_they_would_have_ended_with() {
    if !have("restarts", &TOOLS) {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    if let Some(seed) = number("DRIVELINE_RESTARTS_SEED") {
        return live(seed);
    }
    let worlds = number("DRIVELINE_RESTARTS").unwrap_or(WORLDS_IN_CI);
    let first = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs() % 1_000_000;
    std::thread::scope(|scope| {
        for half in 0..2 {
            scope.spawn(move || (first + half..first + worlds).step_by(2).for_each(live));
        }
    });
}
