//! Does a filter's README say what the filter does?

use super::{check, option_names};
use crate::export::Exported;
use serde_json::Value;

/// Asserts that a README is true: the table whose head begins with `option` lists the options that the filter
/// accepts, no more and no fewer, and the filter accepts what the `toml` examples give it. At least one example
/// has a node of it. `read_toml` is a reader of TOML: `|text| toml::from_str(text).unwrap()`.
///
/// ```
/// # use driveline_sdk::{prelude::*, testing::{self, json}};
/// # #[options]
/// # #[allow(dead_code)]
/// # struct Options { #[serde(default)] read: Time }
/// # struct Delay;
/// # #[filter(name = "delay", default = "pass")]
/// # impl Filter for Delay {
/// #     type Options = Options;
/// #     fn open(_: Options, _: &OpenCx<'_>) -> Result<Self> { Ok(Delay) }
/// # }
/// let readme = "
/// | option | type | default | what it does |
/// |---|---|---|---|
/// | `read` | time | `0` | how long reads wait |
///
/// ```toml
/// [node.slow]
/// driver = \"delay\"
/// child = \"disk\"
/// read = \"5ms\"
/// ```";
/// # let from_str = |_: &str| json!({ "node": { "slow": { "driver": "delay", "child": "disk", "read": "5ms" } } });
/// testing::check_readme::<Delay>(readme, from_str);
/// ```
pub fn check_readme<F: Exported>(readme: &str, read_toml: impl Fn(&str) -> Value) {
    let mut accepted = option_names::<F>();
    let mut listed = readme_table(readme, "option");
    accepted.sort_unstable();
    listed.sort_unstable();
    assert_eq!(listed, accepted, "the option table lists what is accepted");

    let mut examples = 0;
    for text in toml_blocks(readme) {
        let graph = read_toml(&text);
        let nodes = graph["node"].as_object().into_iter().flatten();
        for (name, node) in nodes.filter(|(_, node)| node["driver"] == F::DECLARED.name) {
            let mut options = node.as_object().expect("a node is a table").clone();
            let declared = [F::DECLARED.children, F::DECLARED.children_optional, F::DECLARED.child_words];
            let children = declared.into_iter().flatten().map(|child| child.as_str());
            for kept_by_host in ["driver", "child", "file", "read-only"].into_iter().chain(children) {
                options.remove(kept_by_host);
            }
            if let Err(error) = check::<F>(Value::Object(options)) {
                panic!("the node '{name}' of an example is refused: {error}");
            }
            examples += 1;
        }
    }
    assert!(examples > 0, "an example has a node of the driver '{}'", F::DECLARED.name);
}

/// The names (what is between backquotes in the first column) of the first table whose head begins with `head`.
pub fn readme_table<'a>(readme: &'a str, head: &str) -> Vec<&'a str> {
    fn first_cell(line: &str) -> Option<&str> {
        line.trim().strip_prefix('|')?.split('|').next().map(str::trim)
    }
    let rows = readme.lines().skip_while(|line| first_cell(line) != Some(head)).skip(2);
    let cells = rows.map_while(first_cell);
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect()
}

/// What stands between lines of three backquotes, where the first says `toml`.
fn toml_blocks(readme: &str) -> Vec<String> {
    let mut lines = readme.lines();
    let mut blocks = Vec::new();
    while lines.by_ref().any(|line| line.trim() == "```toml") {
        let block = lines.by_ref().take_while(|line| line.trim() != "```");
        blocks.push(block.flat_map(|line| [line, "\n"]).collect());
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_ends_where_its_rows_end() {
        let readme = "| option | type |\n|---|---|\n| `a`, `b` | `c` |\n\n| rule |\n|---|\n| `d` |";
        assert_eq!(readme_table(readme, "option"), ["a", "b"]);
        assert_eq!(readme_table(readme, "rule"), ["d"]);
        assert!(readme_table(readme, "none").is_empty());
    }

    #[test]
    fn only_toml_is_an_example() {
        let readme = "```\na\n```\ntext\n```toml\nb = 1\nc = 2\n```\n```toml\nd = 3\n```";
        assert_eq!(toml_blocks(readme), ["b = 1\nc = 2\n", "d = 3\n"]);
    }
}
