//! What `ctl` says after a job, and what a refused start says, done to the letter: the drive then shows the same data through the
//! filters of its file.

use crate::harness::{Daemon, Guest, have, output, run};
use toml::{Table, Value};

const BLOCK: u64 = 64 << 10;

struct World {
    folder: tempfile::TempDir,
    config: Table,
    daemon: Option<Daemon>,
}

/// How a drive's layers are said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layers {
    /// All by name; the base is read-only.
    Named,
    /// The same, and a throttle between the drive and its image.
    Throttled,
    /// The image is named, and says itself what is below it.
    Implicit,
}

impl World {
    fn new(layers: Layers) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (base, middle, active) = (path("base.qcow2"), path("middle.qcow2"), path("active.qcow2"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", &base, "8M"]);
        run("qemu-io", &["-c", "write -q -P 9 0 512k", &base]);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &middle]);
        run("qemu-io", &["-c", "write -q -P 8 0 64k", &middle]);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &middle, "-F", "qcow2", &active]);
        let below = "backing = \"middle\"\n[node.middle]\ndriver = \"qcow2\"\nfile = \"middle.qcow2\"\nbacking = \"base\"\n\
            read-only = true\n[node.base]\ndriver = \"qcow2\"\nfile = \"base.qcow2\"\nread-only = true\n";
        let limit = "[node.limit]\ndriver = \"throttle\"\nchild = \"active\"\niops = 100000\n";
        let (below, limit, root) = match layers {
            Layers::Named => (below, "", "active"),
            Layers::Throttled => (below, limit, "limit"),
            Layers::Implicit => ("", "", "active"),
        };
        let text = format!(
            "[node.active]\ndriver = \"qcow2\"\nfile = \"active.qcow2\"\n{below}{limit}[drive.vda]\nroot = \"{root}\"\n\
             [export.vda]\ntype = \"nbd\"\ndrive = \"vda\"\nsocket = \"vda.sock\"\nwritable = true\n\
             [monitor]\nqmp = \"qmp.sock\"\n"
        );
        let mut world = Self { folder, config: text.parse().unwrap(), daemon: None };
        world.start();
        world.write(1, 0);
        world.write(2, 1);
        world
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn start(&mut self) {
        self.daemon = Some(Daemon::start(self.folder.path(), &self.config.to_string()));
    }

    fn driveline(&self, words: &[&str]) -> (bool, String) {
        let done = output(Daemon::program().to_str().unwrap(), words);
        (done.status.success(), String::from_utf8([done.stdout, done.stderr].concat()).unwrap())
    }

    fn guest(&self) -> Guest {
        Guest::connect(&self.folder.path().join("vda.sock"), "vda")
    }

    /// A guest fills a block.
    fn write(&self, block: u64, byte: u8) {
        let mut guest = self.guest();
        guest.write(block * BLOCK, &[byte; BLOCK as usize]).unwrap();
        guest.flush().unwrap();
    }

    fn data(&self) -> Vec<u8> {
        self.guest().read(0, (16 * BLOCK) as u32).unwrap()
    }

    /// A person's command; what it says is to be written before the next start.
    fn ctl(&self, words: &[&str]) -> Option<String> {
        let socket = self.path("qmp.sock");
        let (done, said) = self.driveline(&[&["ctl", "--socket", &*socket], words].concat());
        assert!(done, "{words:?}: {said}");
        let line = said.lines().find_map(|line| line.strip_prefix("before the next start, in its file: "));
        line.map(str::to_owned)
    }

    /// What `check` says is to be written, if it refuses the file for where its drive has gone.
    fn refusal(&self) -> Option<String> {
        let (done, text) = self.check();
        // Reports are broken into lines to fit a terminal.
        let words: Vec<&str> = text.split_whitespace().filter(|word| !["│", "|"].contains(word)).collect();
        let text = words.join(" ");
        let advice = text
            .split_once("it would go back in time: ")
            .and_then(|(_, rest)| rest.split_once("; to go back"));
        assert_eq!(done, advice.is_none(), "{text}");
        advice.map(|(advice, _)| advice.to_owned())
    }

    fn check(&self) -> (bool, String) {
        let file = self.path("drive.toml");
        std::fs::write(&file, self.config.to_string()).unwrap();
        self.driveline(&["check", &file])
    }

    /// Does what it says to the file, and nothing else.
    fn follow(&mut self, advice: &str) {
        let advice = advice.strip_prefix("write ").unwrap_or_else(|| panic!("{advice}"));
        for part in advice.split(", and ") {
            let inner = |text: &str| text.strip_suffix(']').unwrap().to_owned();
            if let Some(node) =
                part.strip_prefix("let [node.").and_then(|rest| rest.strip_suffix("] be no more read-only"))
            {
                self.section("node", node).remove("read-only");
            } else if let Some(rest) = part.strip_prefix("[node.NAME] with ") {
                *self.section("node", "NAME") = table(rest);
            } else if let Some((keys, node)) = part.split_once(" and nothing else in [node.") {
                *self.section("node", &inner(node)) = table(keys);
            } else {
                let (keys, place) = part.split_once(" in [").unwrap_or_else(|| panic!("{part}"));
                let place = inner(place);
                let (kind, name) = place.split_once('.').unwrap();
                self.section(kind, name).extend(table(keys));
            }
        }
    }

    fn section(&mut self, kind: &str, name: &str) -> &mut Table {
        let sections = self.config[kind].as_table_mut().unwrap();
        sections.entry(name).or_insert_with(|| Value::Table(Table::new())).as_table_mut().unwrap()
    }

    fn end(&mut self) {
        assert!(self.daemon.take().unwrap().terminate().success());
    }

    /// How many filters its requests pass.
    fn filters(&self) -> usize {
        let socket = self.path("qmp.sock");
        let (done, said) = self.driveline(&["ctl", "--socket", &socket, "graph"]);
        assert!(done, "{said}");
        let of_drive = said.lines().skip_while(|line| !line.contains("drive vda"));
        of_drive
            .take_while(|line| !line.contains("(file)"))
            .filter(|line| line.contains("(throttle)"))
            .count()
    }
}

fn table(keys: &str) -> Table {
    let line = format!("it = {{ {keys} }}");
    let table: Table = line.parse().unwrap_or_else(|error| panic!("{line}: {error}"));
    table["it"].as_table().unwrap().clone()
}

/// The copy of a mirror that had no backing was given the old one's, and read its data where the guest had written zeroes; a drive lost
/// its throttle; a base that was committed to could not be written to.
fn said_and_done(words: &[&str]) {
    if !have("advice", &["qemu-img", "qemu-io"]) {
        return;
    }
    for layers in [Layers::Named, Layers::Throttled, Layers::Implicit] {
        // Once by what `ctl` says, once by what the next start says.
        for by_refusal in [false, true] {
            let mut world = World::new(layers);
            if layers == Layers::Implicit && words.contains(&"--base") {
                // Its layers have no names that a person knows.
                continue;
            }
            let paths: Vec<String> =
                words.iter().map(|word| word.replace("DIR", world.folder.path().to_str().unwrap())).collect();
            let words: Vec<&str> = paths.iter().map(String::as_str).collect();
            let said = world.ctl(&words);
            // An image that says itself what is below it has been told.
            let says = !(layers == Layers::Implicit && words[0] == "stream");
            assert_eq!(said.is_some(), says, "{words:?}, {layers:?}: {said:?}");
            world.write(3, 2);
            let data = world.data();
            assert!(data[BLOCK as usize..][..BLOCK as usize] == [0; BLOCK as usize], "{words:?}, {layers:?}");
            world.end();
            let advice = if by_refusal { world.refusal() } else { said };
            let stays = words[0] == "stream" || words.contains(&"--top");
            assert!(!by_refusal || advice.is_none() == stays, "{words:?}, {layers:?}: {advice:?}");
            if let Some(advice) = &advice {
                world.follow(advice);
            }
            let (done, text) = world.check();
            assert!(done, "{words:?}, {layers:?}, {advice:?}: {text}");
            world.start();
            assert!(world.data() == data, "{words:?}, {layers:?}, {advice:?}: it shows other data");
            // A mirror's target takes the place of the drive's root, filters and all; the file keeps them.
            let filters = usize::from(layers == Layers::Throttled);
            assert_eq!(world.filters(), filters, "{words:?}, {layers:?}, {advice:?}");
            world.write(4, 3);
            world.end();
        }
    }
}

#[test]
fn what_is_said_after_a_mirror_of_all_leads_to_the_same_data() {
    said_and_done(&["mirror", "vda", "DIR/copy.qcow2", "--pivot"]);
}

#[test]
fn what_is_said_after_a_mirror_to_a_raw_image_leads_to_the_same_data() {
    said_and_done(&["mirror", "vda", "DIR/copy.raw", "--format", "raw", "--pivot"]);
}

#[test]
fn what_is_said_after_a_mirror_of_the_top_leads_to_the_same_data() {
    said_and_done(&["mirror", "vda", "DIR/copy.qcow2", "--sync", "top", "--pivot"]);
}

#[test]
fn what_is_said_after_a_commit_of_the_top_leads_to_the_same_data() {
    said_and_done(&["commit", "vda", "--base", "base"]);
    said_and_done(&["commit", "vda"]);
}

#[test]
fn what_is_said_after_a_snapshot_leads_to_the_same_data() {
    said_and_done(&["snapshot", "vda", "DIR/top.qcow2"]);
}

#[test]
fn what_is_said_after_a_stream_leads_to_the_same_data() {
    said_and_done(&["stream", "vda"]);
    said_and_done(&["stream", "vda", "--base", "base"]);
    said_and_done(&["commit", "vda", "--top", "middle", "--base", "base"]);
}
