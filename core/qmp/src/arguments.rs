//! Arguments of commands: a JSON object becomes a command's struct, or an error that names the argument.
//!
//! The texts are QEMU's, which is why serde's own deserializer does not do. It is also stricter: a struct takes its own
//! fields and no others, whether it says `deny_unknown_fields` or not, and `null` is no way to leave an argument out.

use crate::error::{Error, Result};
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, Expected, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, Visitor,
};
use serde_json::{Map, Value};
use std::fmt;

/// Reads arguments. `at` is where the value stands within the arguments of the command; empty for all of them.
pub(crate) fn parse<T: DeserializeOwned>(value: Value, at: &str) -> Result<T> {
    T::deserialize(Argument(value)).map_err(|mut error| {
        if !at.is_empty() {
            error = error.within(at);
        }
        Error::generic(error)
    })
}

/// What is wrong with an argument, and with which: `actions[0].data.name`.
#[derive(Debug)]
struct Wrong {
    path: String,
    what: What,
}

#[derive(Debug)]
enum What {
    Missing,
    Unexpected,
    Type(String),
    Range(&'static str),
    Value(String),
    Other(String),
}

impl Wrong {
    fn new(what: What) -> Self {
        Self { path: String::new(), what }
    }

    fn expected(kind: &str) -> Self {
        Self::new(What::Type(kind.to_owned()))
    }

    fn unexpected(name: &str) -> Self {
        Self { path: name.to_owned(), what: What::Unexpected }
    }

    /// The same, inside of a member (or an element, `[3]`).
    fn within(mut self, name: &str) -> Self {
        let dot = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        self.path = format!("{name}{dot}{}", self.path);
        self
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = &self.path;
        match &self.what {
            What::Missing => write!(f, "Parameter '{path}' is missing"),
            What::Unexpected => write!(f, "Parameter '{path}' is unexpected"),
            What::Type(expected) => {
                write!(f, "Invalid parameter type for '{path}', expected: {expected}")
            }
            What::Range(kind) => write!(f, "Parameter '{path}' expects {kind}"),
            What::Value(value) => write!(f, "Parameter '{path}' does not accept value '{value}'"),
            What::Other(text) => write!(f, "Parameter '{path}': {text}"),
        }
    }
}

impl std::error::Error for Wrong {}

impl de::Error for Wrong {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self::new(What::Other(text.to_string()))
    }

    fn invalid_type(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::expected(&expected.to_string())
    }

    fn unknown_field(field: &str, _: &'static [&'static str]) -> Self {
        Self::unexpected(field)
    }

    fn missing_field(field: &'static str) -> Self {
        Self { path: field.to_owned(), what: What::Missing }
    }
}

/// A value, as serde takes it apart.
struct Argument(Value);

impl Argument {
    fn integer<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match self.0.as_i64() {
            Some(number) => visitor.visit_i64(number),
            None => Err(Wrong::expected("integer")),
        }
    }

    fn unsigned<'de, V: Visitor<'de>>(
        self,
        max: u64,
        kind: &'static str,
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        match self.0.as_u64() {
            Some(number) if number <= max => visitor.visit_u64(number),
            Some(_) => Err(Wrong::new(What::Range(kind))),
            None if self.0.is_i64() => Err(Wrong::new(What::Range(kind))),
            None => Err(Wrong::new(What::Range("uint64"))),
        }
    }

    fn object(self) -> Result<Map<String, Value>, Wrong> {
        match self.0 {
            Value::Object(object) => Ok(object),
            _ => Err(Wrong::expected("object")),
        }
    }
}

macro_rules! integers {
    ($($method:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
            self.integer(visitor)
        })*
    };
}

impl<'de> Deserializer<'de> for Argument {
    type Error = Wrong;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(number), _) => visitor.visit_u64(number),
                (None, Some(number)) => visitor.visit_i64(number),
                (None, None) => visitor.visit_f64(number.as_f64().unwrap_or(f64::NAN)),
            },
            Value::String(text) => visitor.visit_string(text),
            Value::Array(values) => visitor.visit_seq(Elements::new(values)),
            Value::Object(object) => visitor.visit_map(Members::all(object)),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match self.0 {
            Value::Bool(value) => visitor.visit_bool(value),
            _ => Err(Wrong::expected("boolean")),
        }
    }

    integers! { deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.unsigned(u8::MAX.into(), "uint8_t", visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.unsigned(u16::MAX.into(), "uint16_t", visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.unsigned(u32::MAX.into(), "uint32_t", visitor)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        // QEMU takes a negative number as one of 64 bits without a sign.
        match self.0.as_i64() {
            Some(number) => visitor.visit_u64(number.cast_unsigned()),
            None => self.unsigned(u64::MAX, "uint64", visitor),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.deserialize_string(visitor)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match self.0 {
            Value::String(text) => visitor.visit_string(text),
            _ => Err(Wrong::expected("string")),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match self.0 {
            Value::Array(values) => visitor.visit_seq(Elements::new(values)),
            _ => Err(Wrong::expected("array")),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        visitor.visit_map(Members::all(self.object()?))
    }

    /// Its own fields first, in their order; then what is left is unexpected. So an argument that is missing is said
    /// before one that is too much, as in QEMU.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        let mut object = self.object()?;
        let known = fields.iter().filter_map(|field| object.shift_remove_entry(*field)).collect();
        let value = visitor.visit_map(Members::all(known))?;
        match object.keys().next() {
            Some(name) => Err(Wrong::unexpected(name)),
            None => Ok(value),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        match self.0 {
            Value::String(text) if variants.contains(&&*text) => visitor.visit_enum(text.into_deserializer()),
            Value::String(text) => Err(Wrong::new(What::Value(text))),
            _ => Err(Wrong::expected("string")),
        }
    }

    serde::forward_to_deserialize_any! {
        f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct identifier ignored_any
    }
}

/// The elements of an array.
struct Elements {
    values: std::iter::Enumerate<std::vec::IntoIter<Value>>,
}

impl Elements {
    fn new(values: Vec<Value>) -> Self {
        Self { values: values.into_iter().enumerate() }
    }
}

impl<'de> SeqAccess<'de> for Elements {
    type Error = Wrong;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Wrong> {
        let Some((at, value)) = self.values.next() else { return Ok(None) };
        seed.deserialize(Argument(value)).map(Some).map_err(|wrong| wrong.within(&format!("[{at}]")))
    }
}

/// The members of an object.
struct Members {
    members: serde_json::map::IntoIter,
    value: Option<(String, Value)>,
}

impl Members {
    fn all(object: Map<String, Value>) -> Self {
        Self { members: object.into_iter(), value: None }
    }
}

impl<'de> MapAccess<'de> for Members {
    type Error = Wrong;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Wrong> {
        let Some((name, value)) = self.members.next() else { return Ok(None) };
        let key = seed.deserialize(name.as_str().into_deserializer());
        self.value = Some((name, value));
        key.map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Wrong> {
        let (name, value) = self.value.take().expect("a value follows its key");
        seed.deserialize(Argument(value)).map_err(|wrong| wrong.within(&name))
    }
}

#[cfg(test)]
mod tests;
