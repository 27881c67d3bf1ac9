//! A graph for Graphviz.

use super::{Picture, Shape};
use std::fmt::Write;

impl Picture {
    /// The graph in Graphviz's language.
    pub fn dot(&self) -> String {
        let mut out = String::from(
            "digraph driveline {\n  rankdir=TB;\n  node [fontname=\"sans-serif\", fontsize=11, shape=box];\n  \
             edge [fontname=\"sans-serif\", fontsize=9];\n",
        );
        for (at, item) in self.items.iter().enumerate() {
            let style = match item.shape {
                Shape::Export => "shape=cds, style=filled, fillcolor=\"#dcebff\"",
                Shape::Drive => "style=\"filled,rounded\", fillcolor=\"#e6f5dc\"",
                Shape::Node => "style=filled, fillcolor=\"#ffffff\"",
            };
            let mut label = if item.name.is_empty() { item.kind.clone() } else { item.name.clone() };
            if !item.name.is_empty() {
                write!(label, "\n{}", item.kind).expect("a string takes any text");
            }
            item.details.iter().for_each(|detail| label.push_str(&format!("\n{detail}")));
            let _ = writeln!(out, "  n{at} [label={}, {style}];", quote(&label));
        }
        for (at, item) in self.items.iter().enumerate() {
            for (role, below) in &item.below {
                let _ = writeln!(out, "  n{at} -> n{below} [label={}];", quote(role));
            }
        }
        out.push_str("}\n");
        out
    }
}

fn quote(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}
