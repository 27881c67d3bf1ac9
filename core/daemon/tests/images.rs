//! Images that are not in use, as users look after them.

mod common;

use common::{driveline, text};
use driveline_drivers::qcow2::{CreateOptions, create_file};
use std::{fs, path::Path};

fn image(directory: &Path) -> String {
    let path = directory.join("vm.qcow2");
    create_file(&path, &CreateOptions::new(64 << 20)).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Changes bytes of a file.
fn poke(path: &str, at: usize, bytes: &[u8]) {
    let mut file = fs::read(path).unwrap();
    file[at..at + bytes.len()].copy_from_slice(bytes);
    fs::write(path, file).unwrap();
}

#[test]
fn the_exit_status_of_a_check_says_what_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path());
    let run = |arguments: &[&str]| {
        let out = driveline(&[&["check-image"], arguments, &[&path]].concat());
        (out.status.code().unwrap(), text(&out.stdout))
    };
    assert_eq!(run(&[]), (0, run(&[]).1));
    assert!(run(&[]).1.starts_with("no errors were found\n"));
    // The refcount block is the third cluster; the last cluster of the file is the fourth.
    let size = fs::metadata(&path).unwrap().len() as usize;
    poke(&path, 0x20000 + 2 * (size.div_ceil(65536) - 1), &2u16.to_be_bytes());
    assert_eq!(run(&[]).0, 3);
    let (code, json) = run(&["--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, json["leaks"].as_u64(), json["format"].as_str()), (3, Some(1), Some("qcow2")));
    assert_eq!(run(&["--repair=leaks"]).0, 0);
    poke(&path, 0x20000, &[0; 8]);
    assert_eq!(run(&["--repair=leaks"]).0, 2);
    let (code, words) = run(&["--repair"]);
    assert!(code == 0 && words.contains("repaired: 4 corruptions"), "{words}");
    assert_eq!(run(&["--repair=all"]).0, 0);
    poke(&path, 0, b"RAW!");
    assert_eq!(run(&[]).0, 63);
    fs::remove_file(&path).unwrap();
    assert_eq!(run(&[]).0, 1);
}

#[test]
fn snapshots_are_taken_listed_applied_and_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path());
    let run = |command: &str, name: &[&str]| {
        let out = driveline(&[&["image", "snapshot", command, &path], name].concat());
        (out.status.code().unwrap(), text(&out.stdout), text(&out.stderr))
    };
    assert_eq!(run("list", &[]), (0, String::new(), String::new()));
    assert_eq!(run("create", &["before the upgrade"]).1, "1\n");
    assert_eq!(run("create", &["after"]).1, "2\n");
    assert_eq!(run("create", &["after"]).0, 1);
    let (_, list, _) = run("list", &[]);
    assert!(list.lines().count() == 2 && list.starts_with("1  before the upgrade  20"), "{list}");
    assert!(list.lines().all(|line| line.ends_with("64MiB")), "{list}");
    let json: serde_json::Value = serde_json::from_str(&run("list", &["--json"]).1).unwrap();
    assert_eq!((json[1]["name"].as_str(), json[1]["virtual-size"].as_u64()), (Some("after"), Some(64 << 20)));
    assert_eq!(run("apply", &["before the upgrade"]).0, 0);
    assert_eq!(run("delete", &["1"]).0, 0);
    let (code, _, why) = run("apply", &["before the upgrade"]);
    assert!(code == 1 && why.contains("there is no snapshot 'before the upgrade'"), "{why}");
    assert_eq!(run("delete", &["after"]).0, 0);
    assert_eq!(run("list", &[]).1, "");
    assert!(driveline(&["check-image", &path]).status.success());
}

/// Is the mark set that every program takes away that may write and does not know it?
fn has_witness(path: &str) -> bool {
    fs::read(path).unwrap()[88] & 0x80 != 0
}

#[test]
fn what_leaves_the_data_as_it_is_leaves_the_proof_that_nobody_else_wrote() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path());
    let run = |arguments: &[&str]| assert!(driveline(arguments).status.success(), "{arguments:?}");
    run(&["image", "snapshot", "create", &path, "s"]);
    assert!(!has_witness(&path), "nobody sets it who found none");
    poke(&path, 88, &[0x80]);
    run(&["image", "snapshot", "create", &path, "t"]);
    run(&["image", "snapshot", "delete", &path, "t"]);
    // The dirty bit.
    poke(&path, 79, &[1]);
    run(&["check-image", "--repair", &path]);
    assert!(has_witness(&path));
    run(&["image", "snapshot", "apply", &path, "s"]);
    assert!(!has_witness(&path));
}
