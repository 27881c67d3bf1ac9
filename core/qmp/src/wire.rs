//! Framing: bytes in any portions become JSON values, and garbage becomes errors without losing what follows.
//!
//! QMP has no delimiter. A message ends where its braces and brackets are closed, or, for a bare word or string, where
//! it ends itself. So the scanner knows strings, escapes and depth, and nothing else of JSON; what it has put
//! together is parsed as a whole.
//!
//! Two liberties are QEMU's, because people type into monitors: strings may have single quotes, and `\'` is an escape.
//!
//! After an error that leaves open where a message ends (a control character within a string, too much of anything) all is
//! skipped up to the next control character, such as the end of the line. The bytes 0xFE and 0xFF end a message
//! too: clients send them to make the other side forget what came before.

use crate::error::{Error, Result};
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value};
use std::fmt;

/// How long a message may be. QEMU takes 64 MiB; the longest that make sense, large transactions, stay far below this.
pub(crate) const BYTES_MAX: usize = 8 << 20;
/// How deep objects and arrays may be nested.
pub(crate) const DEPTH_MAX: u32 = 100;

/// Where the scanner is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Between tokens; with depth 0, between messages.
    Between,
    /// In a bare word at depth 0: `null`, `17`, or nonsense.
    Word,
    /// In a string that this quote ends.
    String(u8),
    /// After a backslash in such a string.
    Escape(u8),
    /// In what is skipped.
    Skip,
}

/// Puts messages together.
#[derive(Debug)]
pub(crate) struct Decoder {
    at: At,
    /// Open braces and brackets.
    depth: u32,
    message: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { at: At::Between, depth: 0, message: Vec::new() }
    }
}

impl Decoder {
    /// Takes bytes from `input` up to the end of the first message or error in it. Call it until there is none.
    pub(crate) fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value>> {
        while let Some((&byte, rest)) = input.split_first() {
            let before = *input;
            *input = rest;
            let step = self.step(byte);
            if matches!(step, Step::EndBefore) {
                *input = before;
            }
            match step {
                Step::More => {}
                Step::End | Step::EndBefore => {
                    let message = self.take();
                    return Some(parse(&message));
                }
                Step::Bad(error) => {
                    self.take();
                    return Some(Err(error));
                }
            }
        }
        None
    }

    fn take(&mut self) -> Vec<u8> {
        self.depth = 0;
        if self.at != At::Skip {
            self.at = At::Between;
        }
        std::mem::take(&mut self.message)
    }

    fn step(&mut self, byte: u8) -> Step {
        match self.at {
            At::Skip => {
                if ends_skip(byte) {
                    self.at = At::Between;
                }
                Step::More
            }
            At::String(quote) => self.string(byte, quote),
            At::Escape(quote) => self.escape(byte, quote),
            At::Word if byte.is_ascii_whitespace() || b"{}[],:\"'".contains(&byte) || byte >= 0xFE => {
                Step::EndBefore
            }
            At::Word | At::Between => self.between(byte),
        }
    }

    fn between(&mut self, byte: u8) -> Step {
        match byte {
            0xFE.. => {
                if self.message.is_empty() {
                    return Step::More;
                }
                return Step::Bad(syntax("the message was cut off"));
            }
            _ if byte.is_ascii_whitespace() && self.depth == 0 => return Step::More,
            b'"' | b'\'' => {
                self.at = At::String(byte);
                return self.keep(b'"');
            }
            b'{' | b'[' => {
                self.depth += 1;
                if self.depth > DEPTH_MAX {
                    self.at = At::Skip;
                    return Step::Bad(syntax(format_args!("nested deeper than {DEPTH_MAX} levels")));
                }
            }
            b'}' | b']' | b',' | b':' if self.depth == 0 => return Step::Bad(syntax("expecting value")),
            b'}' | b']' => self.depth -= 1,
            _ if self.depth == 0 => {
                self.at = At::Word;
                return self.keep(byte);
            }
            _ => {}
        }
        let closed = self.depth == 0;
        match self.keep(byte) {
            Step::More if closed => Step::End,
            step => step,
        }
    }

    fn string(&mut self, byte: u8, quote: u8) -> Step {
        match byte {
            0..0x20 | 0xFE.. => {
                // The character itself may be the end of the line: what follows it is a new beginning.
                self.at = At::Between;
                Step::Bad(syntax("a string has a control character in it, or no end"))
            }
            b'\\' => {
                self.at = At::Escape(quote);
                Step::More
            }
            _ if byte == quote => {
                self.at = At::Between;
                match self.keep(b'"') {
                    Step::More if self.depth == 0 => Step::End,
                    step => step,
                }
            }
            // A double quote within single ones.
            b'"' => self.keep_all(b"\\\""),
            _ => self.keep(byte),
        }
    }

    fn escape(&mut self, byte: u8, quote: u8) -> Step {
        self.at = At::String(quote);
        match byte {
            b'\'' => self.keep(b'\''),
            0..0x20 | 0xFE.. => self.string(byte, quote),
            _ => self.keep_all(&[b'\\', byte]),
        }
    }

    fn keep(&mut self, byte: u8) -> Step {
        self.keep_all(&[byte])
    }

    fn keep_all(&mut self, bytes: &[u8]) -> Step {
        if self.message.len() + bytes.len() > BYTES_MAX {
            self.at = At::Skip;
            return Step::Bad(syntax(format_args!("a message is longer than {BYTES_MAX} bytes")));
        }
        self.message.extend_from_slice(bytes);
        Step::More
    }
}

/// What a byte does.
enum Step {
    More,
    /// It ends a message.
    End,
    /// It comes after the end of a message, and is looked at again.
    EndBefore,
    Bad(Error),
}

fn ends_skip(byte: u8) -> bool {
    matches!(byte, 0..0x20 | 0xFE..)
}

fn syntax(what: impl fmt::Display) -> Error {
    Error::generic(format_args!("JSON parse error, {what}"))
}

fn parse(message: &[u8]) -> Result<Value> {
    let parsed: Result<Strict, _> = serde_json::from_slice(message);
    parsed.map(|Strict(value)| value).map_err(|error| match std::str::from_utf8(message) {
        Ok(word) if word.bytes().all(|b| b.is_ascii_alphabetic()) => {
            syntax(format_args!("invalid keyword '{}'", &word[..word.len().min(32)]))
        }
        _ if error.is_data() => syntax(DUPLICATE),
        _ => syntax(error),
    })
}

const DUPLICATE: &str = "duplicate key";

/// A value whose objects have no key twice: whoever sends one twice does not know which of the two is meant.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Strict;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }
            fn visit_unit<E>(self) -> Result<Strict, E> {
                Ok(Strict(Value::Null))
            }
            fn visit_bool<E>(self, value: bool) -> Result<Strict, E> {
                Ok(Strict(value.into()))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Strict, E> {
                Ok(Strict(value.into()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Strict, E> {
                Ok(Strict(value.into()))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Strict, E> {
                Ok(Strict(value.into()))
            }
            fn visit_str<E>(self, value: &str) -> Result<Strict, E> {
                Ok(Strict(value.into()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Strict, A::Error> {
                let mut values = Vec::new();
                while let Some(Strict(value)) = sequence.next_element()? {
                    values.push(value);
                }
                Ok(Strict(values.into()))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strict, A::Error> {
                let mut object = Map::new();
                while let Some((key, Strict(value))) = map.next_entry::<String, Strict>()? {
                    if object.insert(key, value).is_some() {
                        return Err(de::Error::custom(DUPLICATE));
                    }
                }
                Ok(Strict(object.into()))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests;
