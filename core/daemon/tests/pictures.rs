//! A graph is drawn as text, for Graphviz, and as SVG; `UPDATE_GOLDEN=1` writes the pictures anew.

mod common;

use common::{golden, tests};
use driveline_daemon::{config::Config, drivers, picture::Picture};
use driveline_graph::{Graph, GraphOptions};

fn picture() -> Picture {
    let file = tests().join("pictures/two-drives.toml");
    let graph = Graph::new(GraphOptions::default());
    drivers::register_builtin(&graph);
    let (mut config, mut mistakes) = Config::read(&file).unwrap();
    config.check(&graph, &mut mistakes);
    assert!(mistakes.is_empty(), "{mistakes}");
    // Where this folder is must not be in the picture.
    for export in &mut config.exports {
        if let driveline_daemon::config::Address::Unix(path) = export.address.get_mut() {
            *path = path.file_name().unwrap().into();
        }
    }
    let definitions = config.definitions(&graph).unwrap();
    Picture::new(&config, &definitions)
}

#[test]
fn a_graph_is_drawn_as_a_tree() {
    golden(&tests().join("pictures/two-drives.txt"), &picture().text());
}

#[test]
fn a_graph_is_drawn_for_graphviz() {
    golden(&tests().join("pictures/two-drives.dot"), &picture().dot());
}

#[test]
fn a_graph_is_drawn_as_svg() {
    golden(&tests().join("pictures/two-drives.svg"), &picture().svg());
}

/// Boxes of one layer stand side by side, and whatever leads somewhere stands above it.
#[test]
fn boxes_of_the_svg_do_not_overlap() {
    let svg = picture().svg();
    let number = |line: &str, name: &str| -> f64 {
        let rest = line.split(&format!(" {name}=\"")).nth(1).unwrap();
        rest.split('"').next().unwrap().parse().unwrap()
    };
    let boxes: Vec<[f64; 4]> = svg
        .lines()
        .filter(|line| line.starts_with("<rect x="))
        .map(|line| ["x", "y", "width", "height"].map(|name| number(line, name)))
        .collect();
    assert!(boxes.len() >= 8);
    for (index, a) in boxes.iter().enumerate() {
        for b in &boxes[index + 1..] {
            let apart = |i: usize| a[i] + a[i + 2] <= b[i] || b[i] + b[i + 2] <= a[i];
            assert!(apart(0) || apart(1), "{a:?} and {b:?}");
        }
    }
}
