//! Doubtful files, looked at in a child process.

use super::{child, sets::library};
use driveline_loader::{Verdict, probe};
use std::{fs, path::Path, time::Duration};

fn verdict(path: &Path) -> Verdict {
    probe(child::command("probe", path), Duration::from_secs(20)).expect("a child can be run")
}

#[test]
fn a_good_plugin_is_described() {
    let path = library("current", "small");
    let Verdict::Good(report) = verdict(&path) else { panic!("{}", verdict(&path)) };
    assert_eq!((report.path, &*report.filters[0].name), (path, "small"));
}

#[test]
fn a_refused_plugin_says_why() {
    let Verdict::Refused(why) = verdict(&library("current", "aborts")) else { panic!("it is refused") };
    assert!(why.ends_with("found panic = \"abort\""), "{why}");
}

#[test]
fn a_corrupt_file_takes_the_child_and_not_the_parent() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fs::read(library("current", "small")).unwrap();
    let path = folder.path().join("corrupt.so");
    // The headers stay, so that only the dynamic linker can find out. What it does depends on what is hit.
    for part in [20, 50] {
        let mut bytes = whole.clone();
        let at = bytes.len() * part / 100;
        bytes[at..at + 8192].fill(0xa5);
        fs::write(&path, &bytes).unwrap();
        verdict(&path); // we are still here
    }
    let mut bytes = whole;
    bytes[4096..].iter_mut().for_each(|byte| *byte ^= 0x5a);
    fs::write(&path, &bytes).unwrap();
    let last = verdict(&path);
    assert!(!matches!(last, Verdict::Good(_)), "{last}");
}

#[test]
fn a_child_that_hangs_is_killed() {
    let verdict = probe(child::command("hang", Path::new("/")), Duration::from_millis(300)).unwrap();
    assert_eq!(verdict, Verdict::Died("it did not come to an end in 300ms".into()));
}
