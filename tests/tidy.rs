//! What holds for the whole tree: who depends on whom, where `unsafe` is, and that texts are true.

use crate::harness::{Daemon, have};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// All files of the tree with these endings, by path from its root; what is built is not in it, nor what old SDKs were.
fn files(endings: &[&str]) -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if ["target", ".git", "old-sdk"].contains(&name) {
                continue;
            }
            match path.is_dir() {
                true => walk(&path, found),
                false => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    walk(root(), &mut found);
    let mut texts: Vec<(String, String)> = found
        .into_iter()
        .filter(|path| endings.iter().any(|ending| path.to_str().unwrap().ends_with(ending)))
        .map(|path| {
            let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            (name, fs::read_to_string(&path).unwrap())
        })
        .collect();
    texts.sort();
    assert!(!texts.is_empty());
    texts
}

/// The crates of the workspace by folder, without the tests.
fn manifests() -> BTreeMap<String, toml::Table> {
    let members = ["core", "plugins", "filters", "examples"];
    files(&["Cargo.toml"])
        .into_iter()
        .filter_map(|(name, text)| {
            let folder = name.strip_suffix("/Cargo.toml")?;
            let (above, _) = folder.split_once('/')?;
            let is_member = members.contains(&above) && folder.matches('/').count() == 1;
            is_member.then(|| (folder.to_owned(), text.parse().unwrap()))
        })
        .collect()
}

/// Our own crates that a manifest names in one of its tables, by the last part of their names.
fn ours(manifest: &toml::Table, tables: &[&str]) -> BTreeSet<String> {
    let tables = tables.iter().filter_map(|table| manifest.get(*table)?.as_table());
    tables
        .flat_map(toml::Table::keys)
        .filter_map(|name| Some(name.strip_prefix("driveline-")?.to_owned()))
        .collect()
}

#[test]
fn dependencies_run_downwards_only() {
    const ARROWS: &[(&str, &[&str])] = &[
        ("plugins/abi", &[]),
        ("plugins/macros", &[]),
        ("plugins/op", &["abi"]),
        ("plugins/sdk", &["abi", "macros", "op"]),
        ("core/bitmap", &[]),
        ("core/store", &["bitmap"]),
        ("core/engine", &[]),
        ("core/wire", &[]),
        ("core/transport", &["engine"]),
        ("core/graph", &["bitmap", "op"]),
        ("plugins/loader", &["abi", "graph", "op"]),
        ("core/drivers", &["abi", "bitmap", "engine", "graph", "op", "transport", "wire"]),
        ("core/checkpoints", &["bitmap", "graph"]),
        // Its backup shares the state of the filter that copies before writes.
        ("core/jobs", &["bitmap", "drivers", "graph", "op"]),
        ("core/nbd", &["bitmap", "engine", "graph", "op", "transport", "wire"]),
        ("core/qmp", &["bitmap", "checkpoints", "engine", "graph", "jobs", "op"]),
        // The only one that knows everyone; but filters are loaded.
        (
            "core/daemon",
            &[
                "bitmap",
                "checkpoints",
                "drivers",
                "engine",
                "graph",
                "jobs",
                "loader",
                "nbd",
                "op",
                "qmp",
                "store",
                "transport",
            ],
        ),
    ];
    let manifests = manifests();
    for (folder, manifest) in &manifests {
        let found = ours(manifest, &["dependencies", "build-dependencies"]);
        let allowed = match ARROWS.iter().find(|(crate_, _)| crate_ == folder) {
            Some((_, allowed)) => *allowed,
            None if folder.starts_with("filters/") || folder.starts_with("examples/") => &["sdk"],
            None => panic!("{folder} is new: say here what it may depend on"),
        };
        for name in &found {
            assert!(allowed.contains(&name.as_str()), "{folder} may not depend on {name}");
        }
        // Nor in tests: what knows a filter does so by loading it, and nobody is above the program but tests/.
        for name in ours(manifest, &["dev-dependencies"]) {
            assert!(!name.starts_with("filter-") && name != "daemon", "{folder} tests with {name}");
        }
        assert!(!manifest.contains_key("target"), "{folder}: dependencies of one target are not looked at");
    }
    for (folder, _) in ARROWS {
        assert!(manifests.contains_key(*folder), "{folder} is gone");
    }
    let bitmap = &manifests["core/bitmap"];
    assert_eq!(
        ours(bitmap, &["dev-dependencies"]),
        BTreeSet::new(),
        "bitmaps are tested without anybody else"
    );
}

#[test]
fn crates_are_named_after_their_folders_and_share_the_lints() {
    for (folder, manifest) in manifests() {
        let (above, name) = folder.split_once('/').unwrap();
        let prefix = if above == "core" || above == "plugins" { "" } else { "filter-" };
        assert_eq!(manifest["package"]["name"].as_str(), Some(&*format!("driveline-{prefix}{name}")));
        if above == "examples" {
            assert!(!manifest.to_string().contains("workspace = true"), "{folder} inherits nothing");
        } else {
            assert_eq!(manifest["lints"]["workspace"].as_bool(), Some(true), "{folder}");
            assert_eq!(manifest["package"]["license"]["workspace"].as_bool(), Some(true), "{folder}");
        }
        let main = fs::read_to_string(root().join(&folder).join("src/lib.rs")).unwrap();
        assert!(main.starts_with("//! "), "{folder}: a crate says what it is");
        if above == "filters" {
            let readme = fs::read_to_string(root().join(&folder).join("README.md")).unwrap();
            let tests = fs::read_to_string(root().join(&folder).join("src/tests.rs")).unwrap();
            assert!(
                readme.contains("\n| option | type | default | what it does |\n"),
                "{folder}: an option table"
            );
            assert!(
                tests.contains("include_str!(\"../README.md\")"),
                "{folder}: a test compares README's options"
            );
        }
    }
}

/// The lines of a source that are code, with their numbers.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line));
    lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
}

fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(part) && !line[at + word.len()..].starts_with(part))
}

#[test]
fn unsafe_code_is_where_it_is_allowed_and_says_why_it_is_sound() {
    let allowed = [
        "plugins/",
        "core/engine/",
        "core/drivers/src/file/",
        "core/store/src/mapping.rs",
        "tests/plugin-sets/",
    ];
    let mut wrong = Vec::new();
    for (name, text) in files(&[".rs"]) {
        if name == "tests/tidy.rs" {
            continue;
        }
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in code(&text).filter(|(_, line)| has_word(line, "unsafe")) {
            if !allowed.iter().any(|folder| name.starts_with(folder)) {
                wrong.push(format!("{name}:{number}: unsafe code has no place here"));
            }
            // Clippy looks closely; this is for what it is not run on.
            let opens = line.contains("unsafe {") || line.contains("unsafe impl");
            let above = &lines[number.saturating_sub(9)..number];
            if opens && !above.iter().any(|line| line.contains("SAFETY:")) {
                wrong.push(format!("{name}:{number}: SAFETY: is missing"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (folder, manifest) in manifests() {
        let main = fs::read_to_string(root().join(&folder).join("src/lib.rs")).unwrap();
        let may =
            folder.starts_with("plugins/") || ["core/engine", "core/drivers"].contains(&folder.as_str());
        let forbids = main.contains("#![forbid(unsafe_code)]")
            // All but one module, which is looked for above.
            || folder == "core/store" && main.contains("#![deny(unsafe_code)]");
        // The attributes of filters expand to what the loader needs.
        let exports = ours(&manifest, &["dependencies"]).contains("sdk");
        assert!(may || forbids || exports, "{folder} forbids unsafe code");
    }
}

#[test]
fn nothing_is_left_undone_and_no_file_is_too_long() {
    let mut wrong = Vec::new();
    // In halves, so that this file is none of those that it looks for.
    let words = [("TO", "DO"), ("FIX", "ME"), ("XX", "X")].map(|(head, tail)| head.to_owned() + tail);
    let calls = [("to", "do!("), ("unimpl", "emented!(")].map(|(head, tail)| head.to_owned() + tail);
    for (name, text) in files(&[".rs", ".md", ".toml", "run", ".sh"]) {
        if name.ends_with(".rs") && text.lines().count() > 700 {
            wrong.push(format!("{name}: {} lines are more than one idea", text.lines().count()));
        }
        for (number, line) in text.lines().enumerate() {
            if words.iter().any(|word| has_word(line, word)) {
                wrong.push(format!("{name}:{}: {line}", number + 1));
            }
        }
        for (number, line) in code(&text).filter(|_| name.ends_with(".rs")) {
            if calls.iter().any(|call| line.contains(call)) {
                wrong.push(format!("{name}:{number}: {line}"));
            }
        }
        // Folders of those who write this are nobody's business.
        for folder in ["/root/", "/home/"] {
            if name != "tests/tidy.rs" && text.contains(folder) {
                wrong.push(format!("{name}: a path of one machine, {folder}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn texts_lead_to_files_that_are_there() {
    let mut wrong = Vec::new();
    for (name, text) in files(&[".md"]) {
        let folder = root().join(&name).parent().unwrap().to_owned();
        for (_, rest) in text.match_indices("](").map(|(at, _)| text[at..].split_at(2)) {
            let target = rest.split([')', '#', ' ']).next().unwrap();
            if !target.is_empty() && !target.contains("://") && !folder.join(target).exists() {
                wrong.push(format!("{name}: {target}"));
            }
        }
    }
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for path in readme
        .lines()
        .filter(|line| line.starts_with('|'))
        .flat_map(|line| line.split('`').skip(1).step_by(2))
    {
        let is_path = ["core/", "plugins/", "filters/", "examples/"].iter().any(|top| path.starts_with(top));
        if is_path && !root().join(path).exists() {
            wrong.push(format!("README.md: {path}"));
        }
    }
    for folder in manifests().keys().filter(|folder| folder.starts_with("core/") || *folder == "plugins/sdk")
    {
        if !readme.contains(&format!("| `{folder}` |")) {
            wrong.push(format!("README.md: its map lacks {folder}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn ci_runs_the_two_commands_of_readme() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, commands) = readme.split_once("## Two commands").unwrap();
    let commands: Vec<&str> =
        commands.split("```sh\n").skip(1).take(2).filter_map(|part| part.lines().next()).collect();
    assert!(commands[0].starts_with("cargo build --release") && commands[0].ends_with("driveline demo"));
    assert!(commands[1].starts_with("cargo test"));
    let ci = fs::read_to_string(root().join(".ci/run")).unwrap();
    for line in [
        "demo=$(readme 'cargo build --release')",
        "tests=$(readme 'cargo test')",
        "bash -c \"$demo\"",
        "bash -c \"$tests\"",
    ] {
        assert!(ci.lines().any(|found| found == line), ".ci/run: {line}");
    }
    for lint in [
        "cargo fmt --all -- --check",
        "cargo clippy --workspace --all-targets",
        "RUSTDOCFLAGS=\"-D warnings\" cargo doc",
        "cargo deny",
    ] {
        assert!(ci.contains(lint), ".ci/run: {lint}");
    }
}

/// Does what the comments of an example say to do first, here: the commands that make its images.
fn make_images(example: &str, directory: &Path) {
    let commands =
        example.lines().filter_map(|line| line.trim_start_matches("#").trim().strip_prefix("qemu-img "));
    for command in commands {
        let command =
            format!("qemu-img {}", command.replace("/mnt/far/", "").replace("create -f", "create -q -f"));
        let status = Command::new("sh").args(["-c", &command]).current_dir(directory).status().unwrap();
        assert!(status.success(), "{command}");
    }
}

#[test]
fn the_example_graphs_have_no_mistakes_and_run() {
    if !have("the_example_graphs_have_no_mistakes_and_run", &["qemu-img"]) {
        return;
    }
    for (name, example) in files(&[".toml"]) {
        let Some(file) = name.strip_prefix("examples/graphs/") else { continue };
        let directory = tempfile::tempdir().unwrap();
        if example.contains("golden.qcow2") {
            make_images("# qemu-img create -f qcow2 golden.qcow2 1G", directory.path());
        }
        make_images(&example, directory.path());
        let path = directory.path().join(file);
        fs::write(&path, &example).unwrap();
        let checked = Command::new(Daemon::program()).arg("check").arg(&path).output().unwrap();
        assert!(checked.status.success(), "{name}: {}", String::from_utf8_lossy(&checked.stderr));
        // The port may be somebody else's just now.
        let anywhere = example.replace("127.0.0.1:10809", "127.0.0.1:0");
        assert!(Daemon::start(directory.path(), &anywhere).terminate().success(), "{name}");
    }
}
