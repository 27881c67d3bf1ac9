//! Tables and amounts for people.

use std::fmt::Write;

/// Rows of cells under headings, in columns as wide as their widest cell.
#[derive(Debug)]
pub(super) struct Table {
    rows: Vec<Vec<String>>,
    /// Columns of numbers, which stand to the right.
    right: &'static [usize],
}

impl Table {
    pub(super) fn new(headings: &[&str], right: &'static [usize]) -> Self {
        Self { rows: vec![headings.iter().map(|&heading| heading.to_owned()).collect()], right }
    }

    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.rows[0].len(), "a cell for each heading");
        self.rows.push(cells.into());
    }

    /// The table; or, without rows, what there is none of.
    pub(super) fn text(&self, nothing: &str) -> String {
        if self.rows.len() == 1 {
            return format!("{nothing}\n");
        }
        let columns = self.rows[0].len();
        let wide = |at: usize| self.rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(wide).collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let gap = if at == 0 { "" } else { "  " };
                let _ = match self.right.contains(&at) {
                    true => write!(line, "{gap}{cell:>width$}"),
                    false => write!(line, "{gap}{cell:width$}"),
                };
            }
            let _ = writeln!(out, "{}", line.trim_end());
        }
        out
    }
}

/// An amount of bytes, to three digits: `1.25 GiB`.
pub(super) fn amount(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // What would be shown as 1000 and more is one of the next unit, or nearly.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match value {
        value if value >= 99.95 => 0,
        value if value >= 9.995 => 1,
        _ => 2,
    };
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_three_digits_at_most() {
        let shown = [0, 1023, 1024, 1536, 1 << 20, 10 << 30, (1 << 30) - 1, u64::MAX].map(amount);
        let expected = ["0 B", "1023 B", "1 KiB", "1.5 KiB", "1 MiB", "10 GiB", "1 GiB", "16 EiB"];
        assert_eq!(shown, expected);
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["node", "size"], &[1]);
        assert_eq!(table.text("no nodes"), "no nodes\n");
        table.row(["active".into(), amount(1 << 30)]);
        table.row(["b".into(), amount(1536)]);
        assert_eq!(table.text("no nodes"), "node       size\nactive    1 GiB\nb       1.5 KiB\n");
    }
}
