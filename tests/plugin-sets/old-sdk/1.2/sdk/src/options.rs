//! From a node's options to a filter's own struct, and errors that name the key.

use crate::{Error, Result};
use abi_stable::std_types::{RSlice, RStr};
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use std::{fmt, sync::OnceLock};

/// The options of a filter that has none.
#[derive(serde::Deserialize, Debug, Clone, Copy, Default)]
#[serde(deny_unknown_fields)]
pub struct NoOptions {}

/// Reads options. Errors name the key and say what was expected.
pub(crate) fn parse<T: DeserializeOwned>(json: &str) -> Result<T> {
    let mut reader = serde_json::Deserializer::from_str(json);
    serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let (path, inner) = (error.path().to_string(), error.inner());
        let text = inner.to_string();
        // The position counts in a text that the user never saw.
        let place = format!(" at line {} column {}", inner.line(), inner.column());
        refuse(&path, text.strip_suffix(&place).unwrap_or(&text))
    })
}

fn refuse(path: &str, text: &str) -> Error {
    let base = path.trim_end_matches('.');
    // serde names these keys in the text; for an unknown one the path may end at it, or before it.
    let inside = |key: &str| match base {
        "" => key.to_owned(),
        _ if base == key || base.ends_with(&format!(".{key}")) => base.to_owned(),
        _ => format!("{base}.{key}"),
    };
    if let Some((key, rest)) = text.strip_prefix("unknown field `").and_then(|text| text.split_once('`')) {
        return Error::option(&inside(key), format!("there is no such option{}", plain(rest)));
    }
    if let Some((key, _)) = text.strip_prefix("missing field `").and_then(|text| text.split_once('`')) {
        return Error::option(&inside(key), "it must be given");
    }
    // JSON objects have a key once; this is an option that has two names.
    if let Some((key, _)) = text.strip_prefix("duplicate field `").and_then(|text| text.split_once('`')) {
        return Error::option(&inside(key), "it is given twice, by two of its names");
    }
    Error::option(base, plain(text))
}

/// The names of Rust's types, as people say them.
fn plain(text: &str) -> String {
    for (rust, said) in [
        ("expected u64", "expected a whole number, 0 or more"),
        ("expected u32", "expected a whole number from 0 to 4294967295"),
        ("expected u16", "expected a whole number from 0 to 65535"),
        ("expected u8", "expected a whole number from 0 to 255"),
        ("expected usize", "expected a whole number, 0 or more"),
        ("expected i64", "expected a whole number"),
        ("expected f64", "expected a number"),
        ("expected a boolean", "expected true or false"),
        ("expected there are no fields", "expected none"),
        (", there are no fields", "; it takes none"),
    ] {
        if let Some(start) = text.strip_suffix(rust) {
            return format!("{start}{said}");
        }
    }
    text.to_owned()
}

/// The names of the options that a type accepts, found out once.
#[derive(Debug)]
pub struct OptionNames(OnceLock<Vec<RStr<'static>>>);

impl OptionNames {
    /// Not found out yet.
    #[allow(clippy::new_without_default)] // only ever a static
    pub const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// Those of `T`. (A type that flattens others hides their names.)
    pub fn of<T: DeserializeOwned>(&'static self) -> RSlice<'static, RStr<'static>> {
        let names = self.0.get_or_init(|| names::<T>().iter().map(|name| RStr::from_str(name)).collect());
        RSlice::from_slice(names)
    }
}

/// The fields that `T` asks a deserializer for.
pub(crate) fn names<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    let _: Result<T, Asked> = T::deserialize(Ask(&mut names));
    names
}

/// A deserializer that has nothing to give: it only remembers which fields it was asked for.
struct Ask<'n>(&'n mut &'static [&'static str]);

#[derive(Debug)]
struct Asked;

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("asked")
    }
}

impl std::error::Error for Asked {}

impl serde::de::Error for Asked {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Asked
    }
}

impl<'de> Deserializer<'de> for Ask<'_> {
    type Error = Asked;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Asked> {
        Err(Asked)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Asked> {
        *self.0 = fields;
        Err(Asked)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Asked> {
        visitor.visit_newtype_struct(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
