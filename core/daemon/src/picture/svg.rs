//! A graph as SVG, drawn without any other tool.

use super::{
    Picture, Shape,
    layout::{GAP_Y, LINE, layout, lines},
};
use std::fmt::Write;

const STYLE: &str = "text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#1b1f24}\
    .n{font-weight:bold}.k{fill:#57606a}.r{font-size:10px;fill:#57606a;paint-order:stroke;stroke:#fff;stroke-width:4px}\
    rect{stroke:#57606a;stroke-width:1}path{fill:none;stroke:#57606a;stroke-width:1.2}";

impl Picture {
    /// The graph as a picture for a browser.
    pub fn svg(&self) -> String {
        let (places, width, height) = layout(self);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
             viewBox=\"0 0 {width:.0} {height:.0}\">\n<style>{STYLE}</style>\n\
             <defs><marker id=\"a\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"8\" markerHeight=\"8\" \
             orient=\"auto\"><path d=\"M0 0L8 4L0 8z\" style=\"fill:#57606a;stroke:none\"/></marker></defs>\n\
             <rect width=\"100%\" height=\"100%\" style=\"fill:#fff;stroke:none\"/>\n"
        );
        // Words come after all lines, so that none of them is crossed out.
        let mut roles = String::new();
        for (at, item) in self.items.iter().enumerate() {
            for (index, (role, below)) in item.below.iter().enumerate() {
                let (from, to) = (places[at], places[*below]);
                // Lines leave side by side, so that two to one box stay apart.
                let share = (index + 1) as f64 / (item.below.len() + 1) as f64;
                let (x1, y1) = (from.x + from.width * share, from.y + from.height);
                let (x2, y2) = (to.middle(), to.y);
                let bend = ((y2 - y1) / 2.0).max(GAP_Y / 4.0);
                let _ = writeln!(
                    out,
                    "<path d=\"M{x1:.1} {y1:.1}C{x1:.1} {:.1} {x2:.1} {:.1} {x2:.1} {y2:.1}\" marker-end=\"url(#a)\"/>",
                    y1 + bend,
                    y2 - bend
                );
                if !role.is_empty() {
                    // Beside the line where it leaves: the first of several has its word to the left.
                    let first_of_several = index == 0 && item.below.len() > 1;
                    let (x, anchor) = if first_of_several { (x1 - 5.0, "end") } else { (x1 + 5.0, "start") };
                    let y = y1 + 12.0;
                    let _ = writeln!(
                        roles,
                        "<text class=\"r\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>",
                        escape(role)
                    );
                }
            }
        }
        out.push_str(&roles);
        for (at, item) in self.items.iter().enumerate() {
            let place = places[at];
            let (fill, round) = match item.shape {
                Shape::Export => ("#dcebff", 2),
                Shape::Drive => ("#e6f5dc", 12),
                Shape::Node => ("#f6f8fa", 4),
            };
            let _ = writeln!(
                out,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"{round}\" fill=\"{fill}\"/>",
                place.x, place.y, place.width, place.height
            );
            for (index, line) in lines(self, at).iter().enumerate() {
                let class = if index == 0 { "n" } else { "k" };
                let (x, y) = (place.middle(), place.y + LINE * (index as f64 + 1.0) + 2.0);
                let line = escape(line);
                let _ = writeln!(
                    out,
                    "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{line}</text>"
                );
            }
        }
        out.push_str("</svg>\n");
        out
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
