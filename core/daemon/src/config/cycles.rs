//! Nodes that lead back to themselves.

use super::{
    Config,
    mistake::{Mistake, Mistakes, Span},
    value::{Table, Value},
};

/// Reports every cycle once, at the reference that closes it.
pub(super) fn check(config: &Config, mistakes: &mut Mistakes) {
    let mut walk = Walk { config, done: vec![false; config.nodes.len()], path: Vec::new(), mistakes };
    for start in 0..config.nodes.len() {
        walk.visit(start, 0..0);
    }
}

struct Walk<'a> {
    config: &'a Config,
    done: Vec<bool>,
    path: Vec<usize>,
    mistakes: &'a mut Mistakes,
}

impl Walk<'_> {
    fn visit(&mut self, at: usize, from: Span) {
        let nodes = &self.config.nodes;
        if let Some(begin) = self.path.iter().position(|&on_path| on_path == at) {
            let cycle: Vec<_> =
                self.path[begin..].iter().chain([&at]).map(|&i| nodes[i].name.get_ref().as_str()).collect();
            let message = format_args!("a cycle of nodes: {}", cycle.join(" -> "));
            return self.mistakes.add(Mistake::new(from, message).label("it closes here"));
        }
        if std::mem::replace(&mut self.done[at], true) {
            return;
        }
        self.path.push(at);
        if let Value::Table(table) = nodes[at].value.get_ref() {
            for (name, span) in references(table) {
                if let Some(next) = nodes.iter().position(|node| node.name.get_ref() == name) {
                    self.visit(next, span);
                }
            }
        }
        self.path.pop();
    }
}

/// Texts that could name a node, at any depth. That a path is spelt as a node means that it is that node, as the
/// graph sees it too; other options are left out by their keys.
fn references(table: &Table) -> Vec<(&str, Span)> {
    let mut found = Vec::new();
    for (key, value) in table {
        match value.get_ref() {
            Value::String(text) if !["driver", "node-name", "path"].contains(&key.get_ref().as_str()) => {
                found.push((text.as_str(), value.span()));
            }
            Value::Table(inner) => found.extend(references(inner)),
            _ => {}
        }
    }
    found
}
