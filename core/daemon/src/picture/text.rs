//! A graph as a tree for a terminal.

use super::{Item, Picture, Shape};

impl Picture {
    /// The graph as a tree. What is reached twice is drawn once, and named where it comes again.
    pub fn text(&self) -> String {
        let mut draw = Draw { picture: self, drawn: vec![false; self.items.len()], out: String::new() };
        for top in self.tops() {
            draw.item(top, "", "", "");
        }
        draw.out
    }
}

struct Draw<'a> {
    picture: &'a Picture,
    drawn: Vec<bool>,
    out: String,
}

impl Draw<'_> {
    /// Draws a box after `lead`, what is below it after `indent`.
    fn item(&mut self, at: usize, lead: &str, indent: &str, role: &str) {
        let item = &self.picture.items[at];
        let again = std::mem::replace(&mut self.drawn[at], true);
        self.out.push_str(lead);
        if !role.is_empty() {
            self.out.push_str(&format!("{role}: "));
        }
        self.out.push_str(&words(item));
        let last = item.below.len().wrapping_sub(1);
        self.out.push_str(if again && !item.below.is_empty() { " (see above)\n" } else { "\n" });
        if again {
            return;
        }
        for (index, (role, below)) in item.below.iter().enumerate() {
            let (line, rest) = if index == last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            // A word on the line says nothing new where there is only one.
            let role = if item.below.len() > 1 { role.as_str() } else { "" };
            self.item(*below, &format!("{indent}{line}"), &format!("{indent}{rest}"), role);
        }
    }
}

fn words(item: &Item) -> String {
    let details = item.details.join(", ");
    let details = if details.is_empty() { String::new() } else { format!("  {details}") };
    match (item.shape, item.name.is_empty()) {
        (Shape::Export, _) => format!("export {} ({}){details}", item.name, item.kind),
        (Shape::Drive, _) => format!("drive {}{details}", item.name),
        (Shape::Node, true) => format!("({}){details}", item.kind),
        (Shape::Node, false) => format!("{} ({}){details}", item.name, item.kind),
    }
}
