//! What values on the command line are: there all are text, and commands want booleans and numbers.
//!
//! QEMU's schema says which of its options are neither text nor objects; here that is by name, and no name is of two types.
//! Options that QEMU does not know are those of filters: `on` and `off` are booleans there, and digits numbers. JSON says it exactly.
//! Source: QEMU's qapi/*.json, `BlockdevOptions`, `BlockExportOptions`, `NbdServerOptions`, `MonitorOptions`, `ObjectOptions`.

use serde_json::{Map, Value};

const BOOLEANS: &str = " abstract active allocation-depth allow-inactive auto-read-only bitmap-directory blkverify direct \
    discard-no-unref drop-cache fixed-iothread force-share immediately ipv4 ipv6 keep-alive lazy-refcounts log-append mptcp \
    no-flush numeric once pass-discard-other pass-discard-request pass-discard-snapshot pretty read-only read-zeroes \
    refresh rewrite-corrupted sanity-check snapshot-table sslverify tight verify-peer writable writethrough x-check-cache-dropped ";

const INTEGERS: &str = " aio-max-batch align bps-read bps-read-max bps-read-max-length bps-total bps-total-max \
    bps-total-max-length bps-write bps-write-max bps-write-max-length cache-clean-interval cache-size cbw-timeout errno \
    handshake-max-seconds iops-read iops-read-max iops-read-max-length iops-size iops-total iops-total-max \
    iops-total-max-length iops-write iops-write-max iops-write-max-length l2-cache-entry-size l2-cache-size latency-ns \
    log-sector-size log-super-update-interval max-connections max-discard max-transfer max-write-zero min-cluster-size \
    new_state offset open-timeout opt-discard opt-write-zero page-cache-size poll-grow poll-max-ns poll-shrink prealloc-align \
    prealloc-size reconnect-delay refcount-cache-size sector size state tcp-syn-count thread-pool-max thread-pool-min to \
    vote-threshold x-bps-read x-bps-read-max x-bps-read-max-length x-bps-total x-bps-total-max x-bps-total-max-length \
    x-bps-write x-bps-write-max x-bps-write-max-length x-iops-read x-iops-read-max x-iops-read-max-length x-iops-size \
    x-iops-total x-iops-total-max x-iops-total-max-length x-iops-write x-iops-write-max x-iops-write-max-length ";

const TEXTS: &str = " addr aio backing bitmap bottom chardev config data data-file description detect-zeroes dir discard driver \
    endpoint event export file filename format fullscreen host id image iothread iotype iv keyid locking log mode name node \
    node-name on-cbw-error passwordid path policy port preallocate priority qom-type raw read-pattern server snapshot str target \
    test throttle-group tls-authz tls-creds tls-hostname top-id type x-dirty-bitmap cache overlap-check template ";

/// Gives values their types. `guess`: options that QEMU does not know may be a filter's.
///
/// Errors: a value that is none of its type, in QEMU's words.
pub(super) fn typed(object: Map<String, Value>, guess: bool) -> Result<Map<String, Value>, String> {
    members(object, "", guess)
}

fn members(object: Map<String, Value>, at: &str, guess: bool) -> Result<Map<String, Value>, String> {
    let member = |(key, value): (String, Value)| {
        let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
        let value = convert(&key, value, &path, guess)?;
        Ok((key, value))
    };
    object.into_iter().map(member).collect()
}

fn convert(key: &str, value: Value, path: &str, guess: bool) -> Result<Value, String> {
    match value {
        Value::Object(inner) => members(inner, path, guess).map(Value::Object),
        Value::Array(elements) => {
            let element =
                |(index, value)| convert(key, value, &format!("{path}[{index}]"), guess && !text(key));
            elements.into_iter().enumerate().map(element).collect::<Result<_, _>>().map(Value::Array)
        }
        Value::String(text) => scalar(key, text, path, guess),
        other => Ok(other),
    }
}

fn scalar(key: &str, text: String, path: &str, guess: bool) -> Result<Value, String> {
    if among(BOOLEANS, key) {
        return match &*text {
            "on" | "yes" | "true" | "y" => Ok(true.into()),
            "off" | "no" | "false" | "n" => Ok(false.into()),
            _ => Err(format!("Parameter '{path}' expects 'on' or 'off'")),
        };
    }
    if among(INTEGERS, key) {
        return integer(&text).map(Value::from).ok_or(format!("Parameter '{path}' expects integer"));
    }
    if !guess || self::text(key) {
        return Ok(text.into());
    }
    let canonical = text.parse::<i64>().ok().filter(|number| number.to_string() == text);
    Ok(match (&*text, canonical) {
        ("on" | "true", _) => true.into(),
        ("off" | "false", _) => false.into(),
        (_, Some(number)) => number.into(),
        _ => text.into(),
    })
}

fn text(key: &str) -> bool {
    among(TEXTS, key)
}

fn among(names: &str, key: &str) -> bool {
    names.split_ascii_whitespace().any(|name| name == key)
}

/// As C reads it: decimal, hexadecimal or octal.
fn integer(text: &str) -> Option<i64> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    if digits.starts_with(['-', '+']) {
        return None;
    }
    let (radix, digits) = match (digits.strip_prefix("0x").or(digits.strip_prefix("0X")), digits) {
        (Some(hex), _) => (16, hex),
        (None, octal) if octal.len() > 1 && octal.starts_with('0') => (8, octal),
        (None, decimal) => (10, decimal),
    };
    i64::from_str_radix(&format!("{sign}{digits}"), radix).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value, guess: bool) -> Result<Value, String> {
        let Value::Object(object) = value else { panic!("{value} is no object") };
        typed(object, guess).map(Value::Object)
    }

    #[test]
    fn values_get_the_type_of_their_name() {
        let given = json!({ "driver": "raw", "size": "0x10", "read-only": "on", "file": { "size": "010", "filename": "7" } });
        let expected =
            json!({ "driver": "raw", "size": 16, "read-only": true, "file": { "size": 8, "filename": "7" } });
        assert_eq!(read(given, true).unwrap(), expected);
    }

    #[test]
    fn a_filters_own_options_are_what_they_look_like_and_only_those() {
        let given = json!({ "percent": "5", "keep": "off", "tag": "05", "bitmaps": ["7"], "node-name": "7" });
        let expected = json!({ "percent": 5, "keep": false, "tag": "05", "bitmaps": [7], "node-name": "7" });
        assert_eq!(read(given.clone(), true).unwrap(), expected);
        assert_eq!(read(given.clone(), false).unwrap(), given);
    }

    #[test]
    fn a_value_that_is_none_of_its_type_is_named_with_its_path() {
        let wrong = |value| read(value, true).unwrap_err();
        assert_eq!(wrong(json!({ "size": "1G" })), "Parameter 'size' expects integer");
        assert_eq!(wrong(json!({ "size": "" })), "Parameter 'size' expects integer");
        let nested = json!({ "cache": { "direct": "maybe" } });
        assert_eq!(wrong(nested), "Parameter 'cache.direct' expects 'on' or 'off'");
    }
}
