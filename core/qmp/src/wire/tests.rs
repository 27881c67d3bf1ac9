use super::*;
use proptest::prelude::*;
use serde_json::json;

/// All that comes out of `bytes`, given in portions that end at `cuts`.
fn decode(bytes: &[u8], cuts: &[usize]) -> Vec<Result<Value, String>> {
    let mut decoder = Decoder::default();
    let mut messages = Vec::new();
    let mut cuts: Vec<usize> =
        cuts.iter().map(|cut| cut % (bytes.len() + 1)).chain([0, bytes.len()]).collect();
    cuts.sort_unstable();
    for cut in cuts.windows(2) {
        let mut input = &bytes[cut[0]..cut[1]];
        while let Some(message) = decoder.next(&mut input) {
            messages.push(message.map_err(|error| error.desc));
        }
        assert!(input.is_empty());
    }
    messages
}

fn all(text: &str) -> Vec<Result<Value, String>> {
    decode(text.as_bytes(), &[])
}

const PING: &str = r#"{"execute": "ping"}"#;

fn ping() -> Result<Value, String> {
    Ok(json!({ "execute": "ping" }))
}

#[test]
fn a_message_ends_where_its_braces_do() {
    assert_eq!(all(r#"{"a":{"b":["}]\"{"]}}{} "#), [Ok(json!({"a": {"b": ["}]\"{"]}})), Ok(json!({}))]);
    assert_eq!(all("{\"a\"\n:\t1\r\n}"), [Ok(json!({"a": 1}))]);
    assert!(all(r#"{"a": 1"#).is_empty());
}

#[test]
fn bare_words_and_strings_are_messages_too() {
    assert_eq!(all("17 null\"x\"[1]"), [Ok(json!(17)), Ok(json!(null)), Ok(json!("x")), Ok(json!([1]))]);
    assert_eq!(all("tru "), [Err("JSON parse error, invalid keyword 'tru'".into())]);
}

#[test]
fn single_quotes_are_quotes() {
    assert_eq!(all(r#"{'a': 'it\'s "so"', "b": "it\'s"}"#), [Ok(json!({"a": "it's \"so\"", "b": "it's"}))]);
}

#[test]
fn after_garbage_the_next_message_is_understood() {
    let garbage = [
        "{\"execute\": \"que\n",
        "{]\n",
        "}",
        ",",
        "nonsense ",
        "{\"a\": 1, \"a\": 2}",
        "{\"a\": tru}",
        "{\"a\" 1}",
        "[1,]",
        "{\"a\": \"\\x\"}",
        "{\"a\": \"\\ud800\"}",
        "1e999 ",
    ];
    for garbage in garbage {
        let messages = all(&format!("{garbage}{PING}"));
        assert_eq!(messages.last(), Some(&ping()), "{garbage:?}: {messages:?}");
        let error = messages[0].as_ref().unwrap_err();
        assert!(error.starts_with("JSON parse error, "), "{garbage:?}: {error}");
        assert!(messages.len() <= 3, "{garbage:?}: {messages:?}");
    }
}

#[test]
fn bytes_that_no_text_has_make_the_other_side_forget() {
    let mut bytes = b"{\"execute\": [".to_vec();
    bytes.push(0xFF);
    bytes.extend_from_slice(PING.as_bytes());
    let messages = decode(&bytes, &[]);
    assert_eq!((messages.len(), &messages[1]), (2, &ping()));
    assert_eq!(decode(&[b"\xFF", PING.as_bytes()].concat(), &[]), [ping()]);
    let messages = decode(b"{\"a\": \"\xC3\x28\"}", &[]);
    assert!(messages[0].as_ref().unwrap_err().starts_with("JSON parse error, "), "{messages:?}");
}

#[test]
fn what_is_too_deep_or_too_long_is_refused_at_once_and_skipped() {
    let depth = DEPTH_MAX as usize;
    let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    assert!(all(&deep(depth))[0].is_ok());
    let messages = all(&format!("{}\n{PING}", deep(depth + 1)));
    assert_eq!(messages, [Err("JSON parse error, nested deeper than 100 levels".into()), ping()]);

    let long = format!("\"{}\"\n{PING}", "x".repeat(BYTES_MAX));
    let messages = all(&long);
    assert_eq!(
        messages,
        [Err(format!("JSON parse error, a message is longer than {BYTES_MAX} bytes")), ping()]
    );
}

#[test]
fn an_endless_message_does_not_grow_for_ever() {
    let mut decoder = Decoder::default();
    let chunk = [b' '; 1 << 16];
    assert!(decoder.next(&mut &b"{"[..]).is_none());
    let mut errors = 0;
    for _ in 0..BYTES_MAX / chunk.len() + 2 {
        errors += decoder.next(&mut &chunk[..]).into_iter().count();
        assert!(decoder.message.len() <= BYTES_MAX);
    }
    assert_eq!(errors, 1);
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(any::<String>(), inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_split_of_the_bytes_gives_the_same_messages(
        values in prop::collection::vec(json_value(), 0..4),
        cuts in prop::collection::vec(any::<usize>(), 0..16),
    ) {
        let text: String = values.iter().map(|value| format!("{value}\n")).collect();
        let expected: Vec<_> = values.into_iter().map(Ok).collect();
        prop_assert_eq!(decode(text.as_bytes(), &cuts), expected);
    }

    #[test]
    fn any_bytes_are_survived_and_split_alike(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(b"{}[]\"'\\,: \n1t".to_vec())], 0..200),
        cuts in prop::collection::vec(any::<usize>(), 0..16),
    ) {
        prop_assert_eq!(decode(&bytes, &cuts), decode(&bytes, &[]));
        // Wherever it was left, this begins anew.
        let resync = [&bytes[..], b"\xFF\n\xFF\n", PING.as_bytes()].concat();
        prop_assert_eq!(decode(&resync, &[]).pop(), Some(ping()));
    }
}
