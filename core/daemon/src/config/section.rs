//! A table of known keys: what is asked for is what is allowed.

use super::{
    mistake::{Mistake, Mistakes, Span},
    value::{Table, Value, get},
};
use driveline_drivers::Bytes;
use toml::Spanned;

/// A table that is being read. Each key that is asked for counts as known; [`Section::finish`] reports the others.
pub(crate) struct Section<'t, 'm> {
    /// What the table is, for people: `export 'vda'`.
    pub(crate) what: String,
    /// Its header.
    pub(crate) span: Span,
    table: &'t Table,
    known: Vec<&'static str>,
    pub(crate) mistakes: &'m mut Mistakes,
}

impl<'t, 'm> Section<'t, 'm> {
    /// Begins to read. A value that is no table is a mistake, and reads as an empty one.
    pub(crate) fn new(
        what: impl Into<String>,
        span: Span,
        value: &'t Spanned<Value>,
        mistakes: &'m mut Mistakes,
    ) -> Self {
        static EMPTY: Table = Vec::new();
        let what = what.into();
        let table = match value.get_ref() {
            Value::Table(table) => table,
            Value::Wrong => &EMPTY,
            other => {
                let message = format_args!("{what} is a table, but this is {}", other.kind());
                mistakes.add(Mistake::new(value.span(), message));
                &EMPTY
            }
        };
        Self { what, span, table, known: Vec::new(), mistakes }
    }

    /// All entries, for tables whose keys are names.
    pub(crate) fn entries(&self) -> &'t Table {
        self.table
    }

    /// The key and value, whatever it is.
    pub(crate) fn take(&mut self, key: &'static str) -> Option<(&'t Spanned<String>, &'t Spanned<Value>)> {
        self.known.push(key);
        get(self.table, key)
    }

    fn wrong(&mut self, key: &str, expected: &str, found: &Spanned<Value>) {
        if *found.get_ref() == Value::Wrong {
            return;
        }
        let message =
            format_args!("'{key}' of {} is {expected}, but this is {}", self.what, found.get_ref().kind());
        self.mistakes.add(Mistake::new(found.span(), message).label(format_args!("expected {expected}")));
    }

    pub(crate) fn string(&mut self, key: &'static str) -> Option<Spanned<String>> {
        let (_, value) = self.take(key)?;
        if let Value::String(text) = value.get_ref() {
            return Some(Spanned::new(value.span(), text.clone()));
        }
        self.wrong(key, "a string", value);
        None
    }

    pub(crate) fn boolean(&mut self, key: &'static str) -> Option<Spanned<bool>> {
        let (_, value) = self.take(key)?;
        if let Value::Boolean(flag) = value.get_ref() {
            return Some(Spanned::new(value.span(), *flag));
        }
        self.wrong(key, "a boolean", value);
        None
    }

    /// A number of bytes: an integer, or a string with a unit.
    pub(crate) fn bytes(&mut self, key: &'static str) -> Option<Spanned<u64>> {
        let (_, value) = self.take(key)?;
        let parsed = match value.get_ref() {
            Value::Integer(number) => u64::try_from(*number).map_err(|_| "a size is not negative".to_owned()),
            Value::String(text) => text.parse().map(|Bytes(n)| n).map_err(|error| error.to_string()),
            _ => {
                self.wrong(key, "a number of bytes, as 65536 or \"64KiB\"", value);
                return None;
            }
        };
        match parsed {
            Ok(number) => Some(Spanned::new(value.span(), number)),
            Err(message) => {
                self.mistakes.add(Mistake::new(value.span(), message));
                None
            }
        }
    }

    pub(crate) fn integer(
        &mut self,
        key: &'static str,
        valid: std::ops::RangeInclusive<i128>,
    ) -> Option<i128> {
        let (_, value) = self.take(key)?;
        match value.get_ref() {
            Value::Integer(number) if valid.contains(number) => return Some(*number),
            Value::Integer(_) => {
                let message =
                    format_args!("'{key}' of {} is from {} to {}", self.what, valid.start(), valid.end());
                self.mistakes.add(Mistake::new(value.span(), message));
            }
            _ => self.wrong(key, "an integer", value),
        }
        None
    }

    /// One of some words.
    pub(crate) fn choice<T: Copy>(&mut self, key: &'static str, words: &[(&'static str, T)]) -> Option<T> {
        let text = self.string(key)?;
        let found = words.iter().find(|(word, _)| word == text.get_ref());
        if found.is_none() {
            let message = format_args!("'{}' is no value for '{key}' of {}", text.get_ref(), self.what);
            let mistake = Mistake::new(text.span(), message);
            self.mistakes.add(mistake.nearest(text.get_ref(), words.iter().map(|(word, _)| *word)));
        }
        found.map(|(_, value)| *value)
    }

    pub(crate) fn array(&mut self, key: &'static str, of: &str) -> &'t [Spanned<Value>] {
        let Some((_, value)) = self.take(key) else { return &[] };
        if let Value::Array(items) = value.get_ref() {
            return items;
        }
        self.wrong(key, &format!("an array of {of}"), value);
        &[]
    }

    pub(crate) fn strings(&mut self, key: &'static str) -> Vec<Spanned<String>> {
        let mut strings = Vec::new();
        for item in self.array(key, "strings") {
            match item.get_ref() {
                Value::String(text) => strings.push(Spanned::new(item.span(), text.clone())),
                Value::Wrong => {}
                other => {
                    let message =
                        format_args!("'{key}' of {} has strings, but this is {}", self.what, other.kind());
                    self.mistakes.add(Mistake::new(item.span(), message));
                }
            }
        }
        strings
    }

    /// A key that has to be there and is not.
    pub(crate) fn missing(&mut self, key: &str, example: &str) {
        let message = format_args!("{} has no '{key}'", self.what);
        let help = format_args!("for example: {example}");
        self.mistakes.add(Mistake::new(self.span.clone(), message).label("missing here").help(help));
    }

    /// Was this key written?
    pub(crate) fn has(&self, key: &str) -> bool {
        get(self.table, key).is_some()
    }

    /// Reports the keys that nobody asked for.
    pub(crate) fn finish(self) {
        for (key, _) in self.table {
            if !self.known.contains(&key.get_ref().as_str()) {
                self.mistakes.add(unknown_key(key, &self.what, self.known.iter().copied()));
            }
        }
    }
}

/// A key that means nothing there.
pub(crate) fn unknown_key<'a>(
    key: &Spanned<String>,
    what: &str,
    known: impl Iterator<Item = &'a str> + Clone,
) -> Mistake {
    let message = format_args!("unknown key '{}' in {what}", key.get_ref());
    Mistake::new(key.span(), message).nearest(key.get_ref(), known)
}
