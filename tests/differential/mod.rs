//! The same random commands to Driveline and to qemu-storage-daemon: replies, events and images must be the same.
//!
//! Where they differ on purpose, a row of `core/qmp/differences.md` says so: `outcome: COMMAND: TEXT` where one of them does what the
//! other refuses with that text, `text: COMMAND: TEXT` where both refuse and QEMU says TEXT; `*` stands for anything. After a
//! difference of outcome the two are in different states, so a sequence ends there.
//!
//! To add a command: a line in `steps.rs`. A seed that fails is printed; `DIFFERENTIAL_SEED=N` runs that one alone, `DIFFERENTIAL_SEEDS=N` so many.

mod clients;
mod jobs;
mod sides;
mod steps;

use crate::harness::{have, output, run};
use serde_json::{Value, json};
use sides::{CRASH, Side, make_images};
use steps::Script;

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io"];
/// Sequences, and steps in each.
const SEEDS: u64 = 12;
const STEPS: usize = 40;

/// Rows of one kind: the command and the text.
fn allowed(kind: &str) -> Vec<(String, String)> {
    let table = include_str!("../../core/qmp/differences.md");
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
    rows.filter_map(|(row, _)| {
        let (command, text) = row.strip_prefix(kind)?.strip_prefix(": ")?.split_once(": ")?;
        Some((command.to_owned(), text.to_owned()))
    })
    .collect()
}

/// Does a text match a pattern in which `*` stands for anything?
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, rest)) => {
            let Some(text) = text.strip_prefix(head) else { return false };
            (0..=text.len()).any(|at| text.is_char_boundary(at) && matches(rest, &text[at..]))
        }
    }
}

fn is_allowed(rows: &[(String, String)], command: &str, text: &str) -> bool {
    rows.iter().any(|(of, pattern)| matches(of, command) && matches(pattern, text))
}

/// How two answers compare.
#[derive(Debug, PartialEq)]
enum Comparison {
    Same,
    /// Both refuse, in other words; they are in the same state all the same.
    OtherText,
    /// They go different ways from here.
    OtherOutcome,
}

/// Compares two answers. The second part: the table has a row for it.
fn compare(
    command: &Value,
    ours: &Result<Value, Value>,
    theirs: &Result<Value, Value>,
) -> (Comparison, bool) {
    let name = command["execute"].as_str().unwrap();
    match (ours, theirs) {
        (Ok(ours), Ok(theirs)) if undated(ours) == undated(theirs) => (Comparison::Same, true),
        (Ok(_), Ok(_)) => (Comparison::OtherOutcome, false),
        (Err(ours), Err(theirs)) if ours == theirs => (Comparison::Same, true),
        (_, Err(theirs)) if theirs["desc"] == CRASH => {
            (Comparison::OtherOutcome, is_allowed(&allowed("outcome"), name, CRASH))
        }
        (Err(ours), Err(theirs)) => {
            // Clients match on the class: no row allows another.
            let listed = is_allowed(&allowed("text"), name, theirs["desc"].as_str().unwrap());
            (Comparison::OtherText, listed && ours["class"] == theirs["class"])
        }
        (Ok(_), Err(error)) | (Err(error), Ok(_)) => {
            let listed = is_allowed(&allowed("outcome"), name, error["desc"].as_str().unwrap());
            (Comparison::OtherOutcome, listed)
        }
    }
}

/// A reply without the moment at which something was done: two programs cannot do it at the same one.
fn undated(reply: &Value) -> Value {
    let mut reply = reply.clone();
    if let Some(reply) = reply.as_object_mut() {
        reply.retain(|key, _| !key.starts_with("date-") && !key.starts_with("vm-clock-"));
    }
    reply
}

/// What sequences came to.
#[derive(Default)]
struct Tally {
    done: usize,
    refused: usize,
    /// Differences that the table does not list.
    unlisted: Vec<String>,
}

/// The jobs that a command starts.
fn jobs_of(command: &Value) -> Vec<String> {
    let arguments = &command["arguments"];
    let actions = arguments["actions"].as_array().into_iter().flatten().map(|action| &action["data"]);
    let jobs = actions.chain([arguments]).filter_map(|arguments| arguments["job-id"].as_str());
    jobs.map(str::to_owned).collect()
}

/// Waits for what jobs come to, and compares what was told of it.
fn wait(what: &Value, sides: &mut [Side; 2], told: &dyn Fn() -> String) {
    let ends = what["end"].as_array().into_iter().flatten().map(|job| (job, None));
    let ready = what.get("ready").map(|job| (job, Some("BLOCK_JOB_READY")));
    let event = what.get("job").map(|job| (job, what["event"].as_str()));
    for (job, so_far) in ends.chain(ready).chain(event) {
        let job = job.as_str().unwrap();
        let [ours, theirs] = sides.each_mut().map(|side| side.wait_job(job, so_far));
        assert_same(&ours.into(), &theirs.into(), &format!("{}\nthe events of {job}", told()));
    }
}

/// Panics where two values differ, and shows only that.
fn assert_same(ours: &Value, theirs: &Value, told: &str) {
    let lines = |value: &Value| -> Vec<String> {
        match value {
            Value::Object(members) => members.iter().map(|(key, value)| format!("{key}: {value}")).collect(),
            Value::Array(values) => values.iter().map(Value::to_string).collect(),
            other => vec![other.to_string()],
        }
    };
    let (ours, theirs) = (lines(ours), lines(theirs));
    let only = |these: &[String], those: &[String]| {
        let only: Vec<_> = these.iter().filter(|line| !those.contains(line)).cloned().collect();
        if only.is_empty() { these.join("\n  ") } else { only.join("\n  ") }
    };
    assert!(
        ours == theirs,
        "{told}\n Driveline:\n  {}\n QEMU:\n  {}",
        only(&ours, &theirs),
        only(&theirs, &ours)
    );
}

/// Compares what there is and what was told, when nothing runs. False: an overlay that nobody uses is gone in QEMU, see the
/// table; from there on they go different ways.
fn check(sides: &mut [Side; 2], script: &mut Script, told: &dyn Fn() -> String) -> bool {
    let [ours, theirs] = sides.each_mut().map(Side::other_events);
    assert_same(&ours.into(), &theirs.into(), &format!("{}\nevents", told()));
    let [ours, theirs] = sides.each_mut().map(Side::state);
    if ours.as_object().unwrap().keys().any(|node| node.starts_with("ss") && theirs.get(node).is_none()) {
        return false;
    }
    assert_same(&ours, &theirs, &format!("{}\nthe state", told()));
    script.learn(&ours);
    true
}

fn sequence(seed: u64, tally: &mut Tally) {
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let images = make_images(folders[0].path());
    make_images(folders[1].path());
    let mut sides = [Side::driveline(folders[0].path()), Side::qemu(folders[1].path())];
    let mut script = Script::new(seed);
    let (mut history, mut left_over) = (Vec::new(), false);
    for command in script.beginning() {
        let [ours, theirs] = sides.each_mut().map(|side| side.execute(&command));
        assert!(ours.is_ok() && theirs.is_ok(), "{command}\n{ours:?}\n{theirs:?}");
    }
    // What began is brought to its end: how far a job has come when its program ends is nobody's answer.
    for step in 0.. {
        if step >= STEPS && script.queue.is_empty() {
            break;
        }
        let command = script.step();
        history.push(command.to_string());
        eprintln!("seed {seed}: {command}");
        let told = || format!("seed {seed}:\n{}", history.join("\n"));
        if let Some(write) = command.get("qemu-io") {
            sides.iter().for_each(|side| side.write(write.as_str().unwrap()));
            continue;
        }
        if command.get("execute").is_none() {
            wait(&command, &mut sides, &told);
            if script.queue.is_empty() && !check(&mut sides, &mut script, &told) {
                return sides.into_iter().for_each(Side::quit);
            }
            continue;
        }
        let [ours, theirs] = sides.each_mut().map(|side| side.execute(&command));
        let (compared, listed) = compare(&command, &ours, &theirs);
        if !listed {
            tally
                .unlisted
                .push(format!("seed {seed}: {command}\n  Driveline: {ours:?}\n  QEMU:      {theirs:?}"));
        }
        match &ours {
            Ok(_) => tally.done += 1,
            Err(_) => tally.refused += 1,
        }
        if compared == Comparison::OtherOutcome {
            // What became of the images before is looked at in other sequences.
            sides.into_iter().for_each(Side::quit);
            return;
        }
        if ours.is_err() && command.to_string().contains("\"drive-") {
            // QEMU has made the file by then, and leaves it: see the table.
            left_over = true;
        }
        if ours.is_err() && !jobs_of(&command).is_empty() {
            script.refused();
            // QEMU makes a job before it sees that it cannot run, and tells of both: see the table.
            for job in jobs_of(&command) {
                sides.iter_mut().for_each(|side| side.forget_job(&job));
            }
        } else if command.get("hold").is_none() {
            wait(&json!({ "end": jobs_of(&command) }), &mut sides, &told);
        }
        if script.queue.is_empty() && !check(&mut sides, &mut script, &told) {
            return sides.into_iter().for_each(Side::quit);
        }
    }
    let told = format!("seed {seed}:\n{}", history.join("\n"));
    sides.into_iter().for_each(Side::quit);
    for image in images.into_iter().filter(|image| !left_over || !image.starts_with('d')) {
        let [ours, theirs] = [0, 1].map(|at| folders[at].path().join(image).to_str().unwrap().to_owned());
        let compared = output("qemu-img", &["compare", "-U", &ours, &theirs]);
        assert!(compared.status.success(), "{told}\n{image}: {}", String::from_utf8_lossy(&compared.stdout));
        if image.ends_with(".qcow2") {
            run("qemu-img", &["check", "-q", &ours]);
        }
    }
}

#[test]
fn random_commands_have_the_same_answers_events_and_images_as_in_qemu() {
    if !have("random_commands_have_the_same_answers_events_and_images_as_in_qemu", TOOLS) {
        return;
    }
    let one = std::env::var("DIFFERENTIAL_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let count = std::env::var("DIFFERENTIAL_SEEDS").map_or(SEEDS, |count| count.parse().unwrap());
    let seeds = one.map_or(0..count, |seed| seed..seed + 1);
    let mut tally = Tally::default();
    let failed = seeds.filter(|seed| {
        let run = std::panic::AssertUnwindSafe(|| sequence(*seed, &mut tally));
        std::panic::catch_unwind(run).is_err()
    });
    let failed: Vec<u64> = failed.collect();
    let Tally { done, refused, unlisted } = tally;
    eprintln!("{done} commands done, {refused} refused");
    assert!(unlisted.is_empty(), "not in core/qmp/differences.md:\n{}", unlisted.join("\n"));
    assert!(failed.is_empty(), "the seeds {failed:?} went different ways");
    assert!(one.is_some() || done > 60 && refused > 20, "{done} done, {refused} refused: they say nothing");
}

/// What an export showed could be changed and used by others here.
#[test]
fn what_an_export_shows_is_as_busy_as_in_qemu() {
    if !have("what_an_export_shows_is_as_busy_as_in_qemu", TOOLS) {
        return;
    }
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    for folder in &folders {
        let _ = make_images(folder.path());
    }
    let mut sides = [Side::driveline(folders[0].path()), Side::qemu(folders[1].path())];
    let of = |name: &str, more: Value| {
        let mut arguments = json!({ "node": "n0", "name": name });
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        arguments
    };
    let export = |id: &str, more: Value| {
        let mut arguments = json!({ "type": "nbd", "id": id, "name": id, "node-name": "n0" });
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        steps::command("block-export-add", arguments)
    };
    let bitmap =
        |verb: &str, name: &str| steps::command(&format!("block-dirty-bitmap-{verb}"), of(name, json!({})));
    let merge = |target: &str, source: &str| {
        let arguments = json!({ "node": "n0", "target": target, "bitmaps": [source] });
        steps::command("block-dirty-bitmap-merge", arguments)
    };
    let mut script = Script::new(0).beginning();
    script.extend([
        bitmap("add", "b"),
        bitmap("add", "c"),
        steps::command("block-dirty-bitmap-add", json!({ "node": "n2", "name": "low" })),
        export("e0", json!({ "bitmaps": ["b"] })),
        export("e0", json!({ "bitmaps": ["nope"], "writable": true })),
        export("e0", json!({ "bitmaps": [{ "node": "n0", "name": "nope" }], "writable": true })),
        export("e0", json!({ "bitmaps": ["b", "b"], "writable": true })),
        export("e1", json!({ "bitmaps": ["b"], "writable": true })),
        export("e1", json!({ "bitmaps": ["low"] })),
        bitmap("clear", "b"),
        bitmap("disable", "b"),
        bitmap("enable", "b"),
        bitmap("remove", "b"),
        merge("b", "c"),
        merge("c", "b"),
        steps::command("block-dirty-bitmap-clear", json!({ "node": "n2", "name": "low" })),
        steps::command(
            "blockdev-backup",
            json!({ "job-id": "j", "device": "n0", "target": "t1", "sync": "incremental", "bitmap": "b" }),
        ),
        steps::command("block-export-del", json!({ "id": "e0" })),
        bitmap("clear", "b"),
        bitmap("disable", "c"),
        export("e0", json!({ "bitmaps": ["c"] })),
        bitmap("enable", "c"),
        steps::command("nbd-server-add", json!({ "device": "n0", "name": "x", "bitmap": "c" })),
        steps::command("nbd-server-add", json!({ "device": "n0", "name": "x", "bitmap": "b" })),
        steps::command(
            "nbd-server-add",
            json!({ "device": "n0", "name": "x", "bitmap": "b", "writable": true }),
        ),
    ]);
    for command in script {
        let [ours, theirs] = sides.each_mut().map(|side| side.execute(&command));
        let (compared, listed) = compare(&command, &ours, &theirs);
        assert!(listed && compared != Comparison::OtherOutcome, "{command}\n{ours:?}\n{theirs:?}");
        let [ours, theirs] = sides.each_mut().map(Side::state);
        assert_same(&ours, &theirs, &command.to_string());
    }
    sides.into_iter().for_each(Side::quit);
}

#[test]
fn patterns_of_the_table_match_what_they_say() {
    assert!(matches("a*c", "abc") && matches("*", "") && matches("a", "a"));
    assert!(!matches("a*c", "abd") && !matches("a", "ab"));
    assert!(!allowed("text").is_empty());
    let wrong = json!({ "class": "GenericError", "desc": "x" });
    let command = json!({ "execute": "blockdev-add" });
    assert_eq!(compare(&command, &Ok(json!({})), &Err(wrong)), (Comparison::OtherOutcome, false));
}
