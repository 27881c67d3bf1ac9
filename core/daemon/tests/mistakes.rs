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
