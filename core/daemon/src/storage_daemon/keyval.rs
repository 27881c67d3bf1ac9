//! `key=value` lists as QEMU's options take them: dotted keys make objects, numbered ones lists, `,,` is a comma.
//! Source: QEMU's util/keyval.c and util/qemu-option.c, the grammars in their comments.

use serde_json::{Map, Value};

/// QEMU takes no longer part of a key.
const FRAGMENT_BYTES_MAX: usize = 127;

/// Reads an option's argument: JSON if it begins with `{`, else `key=value`, the first of which may leave out `implied`.
///
/// Values of the second form are strings, objects and lists; see [`typed`](super::typed). Errors: QEMU's texts.
pub(super) fn parse(text: &str, implied: Option<&str>) -> Result<(Map<String, Value>, bool), String> {
    if text.starts_with('{') {
        return json(text).map(|object| (object, false));
    }
    let mut object = Map::new();
    let mut rest = text;
    let mut first = implied;
    while !rest.is_empty() {
        let (key, value, after) = pair(rest, first.take())?;
        let fragments = fragments(&key)?;
        put(&mut object, &key, &fragments, value)?;
        rest = after;
    }
    let object = object.into_iter().map(|(key, value)| Ok((key.clone(), listed(value, &key)?)));
    object.collect::<Result<_, String>>().map(|object| (object, true))
}

fn json(text: &str) -> Result<Map<String, Value>, String> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let first = values.next().unwrap_or(Ok(Value::Null));
    let object = match first {
        Ok(Value::Object(object)) => object,
        Ok(_) => return Err("JSON parse error, expecting an object".into()),
        Err(error) if error.is_eof() => return Err("JSON parse error, premature EOI".into()),
        Err(error) => return Err(format!("JSON parse error, {error}")),
    };
    match text[values.byte_offset()..].trim().is_empty() {
        true => Ok(object),
        false => Err("Expecting at most one JSON value".into()),
    }
}

/// The first pair, and what follows its comma.
fn pair<'a>(text: &'a str, implied: Option<&str>) -> Result<(String, String, &'a str), String> {
    let end = text.find(['=', ',']).unwrap_or(text.len());
    let head = &text[..end];
    if !text[end..].starts_with('=') {
        // No value is escaped here: a comma ends it.
        let after = text[end..].strip_prefix(',').unwrap_or_default();
        return match implied {
            Some(_) if ["help", "?"].contains(&head) => Err("Help is not available for this option".into()),
            Some(implied) => Ok((implied.to_owned(), head.to_owned(), after)),
            None => Err(format!("Expected '=' after parameter '{head}'")),
        };
    }
    let (value, after) = value(&text[end + 1..]);
    Ok((head.to_owned(), value, after))
}

/// A value up to the next single comma, and what follows it.
pub(super) fn value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some(comma) = rest.find(',') {
        value.push_str(&rest[..comma]);
        match rest[comma + 1..].strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, &rest[comma + 1..]),
        }
    }
    value.push_str(rest);
    (value, "")
}

fn fragments(key: &str) -> Result<Vec<&str>, String> {
    let fragments: Vec<&str> = key.split('.').collect();
    let mut letters = |fragment: &&str| {
        let is_index = fragment.bytes().all(|byte| byte.is_ascii_digit());
        let is_name = fragment.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
            && fragment.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
        !fragment.is_empty() && (is_index || is_name)
    };
    if !fragments.iter().all(&mut letters) {
        return Err(format!("Invalid parameter '{key}'"));
    }
    match fragments.iter().find(|fragment| fragment.len() > FRAGMENT_BYTES_MAX) {
        Some(long) => Err(format!("Parameter '{long}' is too long")),
        None => Ok(fragments),
    }
}

/// The last of equal keys counts.
fn put(object: &mut Map<String, Value>, key: &str, fragments: &[&str], value: String) -> Result<(), String> {
    let (last, path) = fragments.split_last().expect("a key has a fragment");
    let mut at = object;
    let mut length = 0;
    for fragment in path {
        length += fragment.len() + 1;
        let inner = at.entry(*fragment).or_insert_with(|| Value::Object(Map::new()));
        at = match inner {
            Value::Object(inner) => inner,
            _ => return Err(format!("Parameters '{}.*' used inconsistently", &key[..length - 1])),
        };
    }
    match at.get(*last) {
        Some(Value::Object(_)) => Err(format!("Parameters '{key}.*' used inconsistently")),
        _ => {
            at.insert((*last).to_owned(), value.into());
            Ok(())
        }
    }
}

/// Objects whose keys are all numbers become lists, at every depth.
fn listed(value: Value, at: &str) -> Result<Value, String> {
    let Value::Object(object) = value else { return Ok(value) };
    let numbers = object.keys().filter(|key| key.bytes().all(|byte| byte.is_ascii_digit())).count();
    let count = object.len();
    let mut inner = Map::new();
    for (key, value) in object {
        let value = listed(value, &format!("{at}.{key}"))?;
        inner.insert(key, value);
    }
    match numbers {
        0 => Ok(inner.into()),
        _ if numbers < count => Err(format!("Parameters '{at}.*' used inconsistently")),
        _ => {
            let element = |index: usize| {
                inner.shift_remove(&index.to_string()).ok_or(format!("Parameter '{at}.{index}' missing"))
            };
            (0..count).map(element).collect::<Result<_, _>>().map(Value::Array)
        }
    }
}

/// Reads the argument of `--chardev` and `--trace`, in QEMU's older and flat form: a key without a value is `on`, or `off` if it begins
/// with `no`; the first may leave out `implied`. Keys in their order.
pub(super) fn flat(text: &str, implied: &str) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let head = &rest[..end];
        if rest[end..].starts_with('=') {
            let (value, after) = value(&rest[end + 1..]);
            pairs.push((head.to_owned(), value));
            rest = after;
            continue;
        }
        let (word, after) = value(rest);
        pairs.push(match word.strip_prefix("no") {
            _ if pairs.is_empty() => (implied.to_owned(), word),
            Some(off) => (off.to_owned(), "off".to_owned()),
            None => (word, "on".to_owned()),
        });
        rest = after;
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(text: &str) -> Result<Value, String> {
        parse(text, Some("driver")).map(|(object, _)| object.into())
    }

    #[test]
    fn dotted_keys_nest_and_numbers_make_lists() {
        let text = "quorum,node-name=q,children.1=b,children.0.driver=file,children.0.filename=a,,b,";
        let expected = json!({
            "driver": "quorum", "node-name": "q", "children": [{ "driver": "file", "filename": "a,b" }, "b"],
        });
        assert_eq!(read(text).unwrap(), expected);
        assert_eq!(read("a=1,a=2").unwrap(), json!({ "a": "2" }));
        assert_eq!(read("").unwrap(), json!({}));
        assert_eq!(read("a=x=y,b=").unwrap(), json!({ "a": "x=y", "b": "" }));
        assert_eq!(read(r#" {"a":1}"#).unwrap(), json!({ "driver": r#" {"a":1}"# }));
        assert_eq!(read(r#"{"a":1}"#).unwrap(), json!({ "a": 1 }));
    }

    #[test]
    fn what_makes_no_sense_is_said_in_qemus_words() {
        for (text, expected) in [
            ("null-co,bla", "Expected '=' after parameter 'bla'"),
            ("null-co,=4", "Invalid parameter ''"),
            ("null-co,a..b=4", "Invalid parameter 'a..b'"),
            ("null-co,x.y=4,x=3", "Parameters 'x.*' used inconsistently"),
            ("null-co,x=4,x.y=3", "Parameters 'x.*' used inconsistently"),
            ("quorum,c.0=a,c.2=b", "Parameter 'c.1' missing"),
            ("quorum,c.0=a,c.x=b", "Parameters 'c.*' used inconsistently"),
            ("help", "Help is not available for this option"),
            (r#"{"a":1"#, "JSON parse error, premature EOI"),
            (r#"{"a":1} x"#, "Expecting at most one JSON value"),
        ] {
            assert_eq!(read(text).unwrap_err(), expected, "{text}");
        }
    }

    #[test]
    fn flat_lists_know_switches() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let read = flat("socket,path=a,,b,server,nowait,id=m", "backend");
        let expected =
            [("backend", "socket"), ("path", "a,b"), ("server", "on"), ("wait", "off"), ("id", "m")];
        assert_eq!(read, expected.map(|(key, value)| pair(key, value)));
    }
}
