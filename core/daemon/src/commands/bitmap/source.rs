//! The sources of a merge: bitmaps of the same file, or of others.

use std::path::{Path, PathBuf};

/// Where a source is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// In the file itself.
    Own(String),
    /// In another one.
    Other(PathBuf, String),
}

impl Source {
    /// Reads `NAME` or `FILE:NAME`. Both may contain colons: a bitmap of the file itself comes first, then the longest
    /// beginning that is a file.
    pub(super) fn parse(text: &str, is_own: impl Fn(&str) -> bool, is_file: impl Fn(&Path) -> bool) -> Self {
        if is_own(text) {
            return Source::Own(text.to_owned());
        }
        let colons = text.rmatch_indices(':').map(|(at, _)| at);
        let file = colons.map(|at| (Path::new(&text[..at]), &text[at + 1..])).find(|(file, _)| is_file(file));
        match (file, text.rsplit_once(':')) {
            (Some((file, name)), _) => Source::Other(file.to_owned(), name.to_owned()),
            // A file that is missing is named by the error, if it looks like one.
            (None, Some((file, name))) if file.contains(['/', '.']) => {
                Source::Other(file.into(), name.to_owned())
            }
            _ => Source::Own(text.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_bitmap_of_the_file_or_of_another_one() {
        let own = |name: &str| ["daily", "a.qcow2:daily"].contains(&name);
        let file = |path: &Path| ["b.qcow2", "odd:name", "odd"].contains(&path.to_str().unwrap());
        let parse = |text: &str| Source::parse(text, own, file);
        let other = |file: &str, name: &str| Source::Other(file.into(), name.into());
        assert_eq!(parse("daily"), Source::Own("daily".into()));
        assert_eq!(parse("b.qcow2:daily"), other("b.qcow2", "daily"));
        assert_eq!(parse("a.qcow2:daily"), Source::Own("a.qcow2:daily".into()), "a name of its own");
        assert_eq!(parse("odd:name:x"), other("odd:name", "x"));
        assert_eq!(parse("odd:other:x"), other("odd", "other:x"));
        assert_eq!(parse("gone.qcow2:x"), other("gone.qcow2", "x"), "so that the error names the file");
        assert_eq!(parse("no:such"), Source::Own("no:such".into()));
    }
}
