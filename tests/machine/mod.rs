//! A backup tool for machines, over a machine that is none: what it copies is what the guest had when the agent froze it, whatever the
//! guest writes meanwhile.
//!
//! The tool puts a copy-before-write over the disk, plugs the device into it, and copies what a snapshot-access above it shows. Such a
//! tool is qmpbackup (<https://github.com/abbbi/qmpbackup>); who has it installed sees it run, and what it sends is what the other test
//! sends.

mod half;
mod tool;

use crate::harness::{GRANULE, Moment, have, output, run};
use half::Machine;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tool::Tool;

const SIZE: usize = 256 * GRANULE;

/// A backup and what it must be.
struct Backup {
    image: PathBuf,
    moment: Moment,
}

/// Bytes of an image that are not left to the image that it is based on.
fn allocated(image: &Path) -> u64 {
    let map = run("qemu-img", &["map", "--output=json", image.to_str().unwrap()]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let here = map.as_array().unwrap().iter().filter(|area| area["present"] == true && area["depth"] == 0);
    here.map(|area| area["length"].as_u64().unwrap()).sum()
}

/// An incremental has no more than what the guest can have changed. It is looked at before it is put over another image.
fn assert_is_small(backup: &Backup) {
    let (is, most) = (allocated(&backup.image), backup.moment.most());
    assert!(is <= most, "{} has {is} bytes, and the guest wrote {most}", backup.image.display());
}

#[test]
fn a_tool_that_swaps_the_disk_under_a_device_copies_the_moment_of_the_freeze() {
    let name = "a_tool_that_swaps_the_disk_under_a_device_copies_the_moment_of_the_freeze";
    if !have(name, &["qemu-img"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let machine = Machine::start(folder.path(), SIZE);
    let mut tool = Tool::connect(&machine, folder.path(), SIZE);
    let mut backups = Vec::new();
    for (level, compress) in [("full", false), ("inc", false), ("copy", false), ("inc", true), ("inc", false)]
    {
        machine.writer().go_on(20);
        let image = tool.back_up(level, compress);
        let backup = Backup { image, moment: machine.moment() };
        match level {
            // It is beside the chain: those that follow know nothing of it.
            "copy" => {
                backup.moment.assert_is(&backup.image);
                machine.writer().pause().written.extend(backup.moment.written);
                continue;
            }
            "inc" => assert_is_small(&backup),
            _ => {}
        }
        if let Some(Backup { image, .. }) = backups.last() {
            let (below, image) = (image.to_str().unwrap(), backup.image.to_str().unwrap());
            run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, image]);
        }
        backup.moment.assert_is(&backup.image);
        backups.push(backup);
    }
    // Nothing of the tool is left but its bitmap, and the guest has what it wrote.
    let nodes = tool.monitor().run("query-named-block-nodes", serde_json::json!({ "flat": true }));
    let names: Vec<&str> =
        nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap()).collect();
    assert!(names.iter().all(|name| !name.starts_with("backup")), "{names:?}");
    machine.assert_guest_is_right();
    machine.end();
}

#[test]
fn qmpbackup_and_qmprestore_bring_back_what_the_guest_had() {
    let name = "qmpbackup_and_qmprestore_bring_back_what_the_guest_had";
    let tools = ["qmpbackup", "qmprestore", "qemu-img"];
    // No registry has it, so CI cannot install it; the other test is what it sends.
    let path = std::env::var_os("PATH").unwrap_or_default();
    if !tools.iter().all(|tool| std::env::split_paths(&path).any(|folder| folder.join(tool).is_file())) {
        eprintln!("SKIPPED {name}: not installed: one of {tools:?}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let machine = Machine::start(folder.path(), SIZE);
    let (target, monitor, agent) = (folder.path().join("backups"), machine.monitor(), machine.agent());
    let target = target.to_str().unwrap();
    let qmpbackup = |arguments: &[&str]| {
        let sockets = ["--socket", monitor.to_str().unwrap(), "--agent-socket", agent.to_str().unwrap()];
        run("qmpbackup", &[&sockets, arguments].concat())
    };
    let mut backups: Vec<Backup> = Vec::new();
    for (level, more) in [("full", &[][..]), ("inc", &[]), ("inc", &["--compress"]), ("auto", &[])] {
        machine.writer().go_on(20);
        let arguments = ["backup", "--level", level, "--target", target, "--quiesce"];
        let said = qmpbackup(&[&arguments, more].concat());
        let problem = said.lines().find(|line| ["WARNING", "ERROR"].iter().any(|word| line.contains(word)));
        assert_eq!(problem, None, "{said}");
        let entries = std::fs::read_dir(folder.path().join("backups/disk.qcow2")).unwrap();
        let mut images = entries.map(|entry| entry.unwrap().path());
        let is_new = |image: &PathBuf| backups.iter().all(|backup| backup.image != *image);
        let backup = Backup { image: images.find(is_new).unwrap(), moment: machine.moment() };
        if level != "full" {
            assert_is_small(&backup);
        }
        backups.push(backup);
    }
    assert!(qmpbackup(&["info", "--show", "bitmaps"]).contains("qmpbackup-"));
    let copies = folder.path().join("copies");
    qmpbackup(&["backup", "--level", "copy", "--target", copies.to_str().unwrap(), "--quiesce"]);
    let copy = std::fs::read_dir(copies.join("disk.qcow2")).unwrap().next().unwrap().unwrap().path();
    machine.moment().assert_is(&copy);

    let chain = folder.path().join("backups/disk.qcow2");
    let merged = folder.path().join("merged/disk.qcow2");
    std::fs::create_dir(merged.parent().unwrap()).unwrap();
    run("qmprestore", &["merge", "--dir", chain.to_str().unwrap(), "--targetfile", merged.to_str().unwrap()]);
    backups.last().unwrap().moment.assert_is(&merged);
    run("qmprestore", &["rebase", "--dir", chain.to_str().unwrap()]);
    backups.iter().for_each(|backup| backup.moment.assert_is(&backup.image));
    assert!(qmpbackup(&["cleanup", "--remove-bitmap"]).contains("Removing bitmap: qmpbackup-"));
    machine.assert_guest_is_right();
    machine.end();
    let image = folder.path().join("disk.qcow2");
    let info = output("qemu-img", &["info", image.to_str().unwrap()]);
    assert!(!String::from_utf8_lossy(&info.stdout).contains("bitmaps"), "none is left in the image");
}
