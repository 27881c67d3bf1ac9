//! The path of a write, as README tells it, read from the trace of the program.

use crate::harness::{Daemon, Guest};

const CONFIGURATION: &str = r#"
[node.image]
driver = "raw"
file = { driver = "file", path = "disk.raw", node-name = "bytes" }

[node.watch]
driver = "log"
child = "image"

[drive.vda]
root = "watch"
bitmaps = [{ name = "daily" }]

[export.vda]
type = "nbd"
drive = "vda"
socket = "vda.sock"
writable = true
bitmaps = ["daily"]
"#;

/// The trace of what a guest does: for each event the stage, and where: `drive watch`.
fn trace(then: impl FnOnce(&mut Guest), replies: usize) -> Vec<String> {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk.raw"), vec![0; 1 << 20]).unwrap();
    let file = directory.path().join("drive.toml");
    std::fs::write(&file, CONFIGURATION).unwrap();
    let log = "driveline::io=trace,driveline_filter_log=info";
    let daemon = Daemon::start_file(&file, 1, &[("DRIVELINE_LOG", log)]);
    then(&mut Guest::connect(&directory.path().join("vda.sock"), "vda"));
    let answered =
        |lines: &[String]| lines.iter().filter(|line| line.contains("stage=\"reply\"")).count() == replies;
    daemon.wait_log(answered).iter().filter_map(|line| stage(line)).collect()
}

fn stage(line: &str) -> Option<String> {
    let field = |name: &str| {
        let (_, rest) = line.split_once(&format!(" {name}=\""))?;
        rest.split_once('"').map(|(value, _)| value.to_owned())
    };
    if line.contains("driveline_filter_log") {
        return Some(format!("filter {}", field("node")?));
    }
    if line.contains("command=DISC") {
        return None; // the guest leaves
    }
    let place = field("node").or_else(|| field("root").map(|_| "root".to_owned())).unwrap_or_default();
    Some(format!("{} {place}", field("stage")?).trim_end().to_owned())
}

#[test]
fn a_write_goes_the_way_that_readme_tells() {
    let found = trace(|guest| guest.write(4096, &[7; 4096]).unwrap(), 1);
    let expected = [
        "parse", // core/nbd
        "submit",
        "check", // core/graph
        "begin root",
        "permit root",
        "drive root",
        "begin watch", // waits for overlaps, marks the bitmap
        "drive watch", // the plugin, by which the request passes on
        "begin image",
        "drive image",
        "begin bytes",
        "drive bytes", // where the bytes end
        "finish bytes",
        "finish image",
        "filter watch", // the plugin tells of it when its child has answered
        "finish watch",
        "finish root",
        "reply", // core/nbd
    ];
    assert_eq!(found, expected);

    // README's table has the same stages in the same order, with the nodes summed up.
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
    let (_, table) = readme.split_once("| stage | where | what happens |\n").expect("README has the table");
    let rows = table.lines().skip(1).map_while(|line| line.strip_prefix("| "));
    let told: Vec<&str> = rows.map(|row| row.split(" |").next().unwrap()).collect();
    let at_nodes = ["hop", "filter", "format, file"];
    let (inside, outside): (Vec<&str>, Vec<&str>) = told.iter().partition(|stage| at_nodes.contains(*stage));
    let at_root = expected.iter().filter(|s| !s.contains(' ') || s.ends_with(" root"));
    let at_root: Vec<&str> = at_root.map(|stage| stage.trim_end_matches(" root")).collect();
    assert_eq!(outside, at_root);
    assert_eq!(inside, at_nodes);
    assert_eq!(told.iter().position(|stage| *stage == "hop"), Some(6), "the nodes come after `drive`");
}

#[test]
fn what_cannot_be_done_is_refused_as_early_as_can_be_known() {
    // The size was told in the handshake, so nothing of the graph is asked.
    let refused = |guest: &mut Guest| {
        guest.write(1 << 20, &[7; 512]).unwrap_err();
    };
    assert_eq!(trace(refused, 1), ["parse", "reply"]);
}
