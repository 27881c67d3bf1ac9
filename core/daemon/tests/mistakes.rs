//! Every wrong file in `mistakes/` is told all of its mistakes, with the text beside it. `UPDATE_GOLDEN=1` writes the texts.

mod common;

use common::{golden, tests};
use driveline_daemon::{config::Config, drivers};
use driveline_graph::{Graph, GraphOptions};
use std::path::Path;

fn render(name: &str, text: &str) -> String {
    // Built-in drivers alone: which filters lie about is not what this is about.
    let graph = Graph::new(GraphOptions::default());
    drivers::register_builtin(&graph);
    let (config, mut mistakes) = Config::parse(Path::new(name), text);
    config.check(&graph, &mut mistakes);
    assert!(!mistakes.is_empty(), "{name} has mistakes");
    mistakes.render(false)
}

#[test]
fn every_mistake_of_a_file_is_told_at_once_and_in_its_place() {
    let mut files = 0;
    for entry in std::fs::read_dir(tests().join("mistakes")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let name = path.file_name().unwrap().to_str().unwrap();
            golden(&path.with_extension("txt"), &render(name, &std::fs::read_to_string(&path).unwrap()));
            files += 1;
        }
    }
    assert!(files >= 20, "{files} files");
}

#[test]
fn a_mistake_on_one_line_names_file_and_line() {
    let text = "[node.a]\ndriver = \"memory\"\nsize = 1\nsise = 2\n";
    let graph = Graph::new(GraphOptions::default());
    drivers::register_builtin(&graph);
    let (config, mut mistakes) = Config::parse(Path::new("vm.toml"), text);
    config.check(&graph, &mut mistakes);
    let expected = "vm.toml:4: unknown key 'sise' in node 'a' (driver 'memory'); did you mean 'size'?";
    assert_eq!(mistakes.to_string(), expected);
}

/// A column that does not fit into 16 bits took the program down instead of being shown.
#[test]
fn a_mistake_far_out_on_a_line_is_shown_with_what_is_near_it() {
    let far = "\u{e4}".repeat(50_000);
    let text = format!("node = {{ a = {{ driver = \"memory\", size = 1, long = \"{far}\", sise = 2 }} }}\n");
    let shown = render("vm.toml", &text);
    assert!(shown.contains("unknown key 'long'") && shown.contains("unknown key 'sise'"), "{shown}");
    assert!(shown.contains("sise = 2 }") && shown.len() < 40_000, "{shown}");
}

/// Whatever stands in a file, reading it ends in mistakes or none, never in a panic.
#[test]
fn no_text_makes_reading_panic() {
    let files = std::fs::read_dir(tests().join("mistakes")).unwrap();
    let mut texts: Vec<String> = files
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    texts.extend(
        ["", "\u{feff}", "[", "[[node]]", "node = 1", "[node]\na = 1", "é = \"é", "[export.\"\"]"]
            .map(String::from),
    );
    let graph = Graph::new(GraphOptions::default());
    drivers::register_builtin(&graph);
    for text in texts {
        // Cut anywhere, as an editor that saves half a file would.
        for end in (0..=text.len()).filter(|end| text.is_char_boundary(*end)) {
            let (config, mut mistakes) = Config::parse(Path::new("x.toml"), &text[..end]);
            config.check(&graph, &mut mistakes);
            let _ = mistakes.render(false);
            let _ = mistakes.to_string();
        }
    }
}

/// The table in the documentation of `config` has exactly the keys that are read.
#[test]
fn every_documented_key_is_known_and_every_known_key_is_documented() {
    let source = include_str!("../src/config/mod.rs");
    let mut table = String::new();
    let mut documented: Vec<(String, String)> = Vec::new();
    for line in source.lines().filter_map(|line| line.strip_prefix("//! |")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        if let Some(name) = cells[0].strip_prefix("`[") {
            table = name.trim_end_matches("]`").replace("NAME", "x");
        }
        for key in cells[1].split(" or ").filter_map(|key| key.strip_prefix('`')) {
            documented.push((table.clone(), key.trim_end_matches('`').to_owned()));
        }
    }
    assert_eq!(documented.len(), 27, "{documented:?}");
    for part in ["plugins", "engine", "drive.x", "export.x", "monitor"] {
        let keys = |of: &str| -> Vec<String> {
            documented.iter().filter(|(table, _)| table == of).map(|(_, key)| key.clone()).collect()
        };
        // A key that nobody reads is told with all that are.
        let (_, mistakes) = Config::parse(Path::new("x.toml"), &format!("[{part}]\nqqqqqqqqqqqqqqqq = 1\n"));
        let help = mistakes
            .list()
            .iter()
            .find_map(|mistake| mistake.help.clone().filter(|h| h.starts_with("valid")));
        let help = help.unwrap();
        let known: Vec<&str> = help.trim_start_matches("valid here: ").split(", ").collect();
        let mut known: Vec<String> = known.iter().map(|key| key.trim_matches('\'').to_owned()).collect();
        let mut documented = keys(part);
        known.sort();
        documented.sort();
        assert_eq!(known, documented, "[{part}]");
    }
}
