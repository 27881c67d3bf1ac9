//! Names of exports as one text: URIs, and the older form of QEMU.
//!
//! Source: QEMU block/nbd.c, `nbd_parse_filename`; the NBD project's doc/uri.md.

use driveline_graph::{Error, Kind, Options, Result};
use driveline_wire::PORT;
use serde_json::json;

/// Is this text the name of an export, for [`parse_filename`]?
pub fn is_filename(text: &str) -> bool {
    text.starts_with("nbd:") || text.starts_with("nbd+tcp:") || text.starts_with("nbd+unix:")
}

/// Reads the name of an export: the options of an `nbd` node, `driver` included.
///
/// | form | |
/// |---|---|
/// | `nbd://HOST[:PORT]/[EXPORT]`, `nbd+tcp://...` | TCP |
/// | `nbd+unix:///[EXPORT]?socket=PATH` | a unix socket |
/// | `nbd:HOST:PORT[:exportname=EXPORT]` | TCP, as QEMU wrote it before there were URIs |
/// | `nbd:unix:PATH[:exportname=EXPORT]` | a unix socket, the same |
///
/// In a URI, `%XX` stands for a byte.
pub fn parse_filename(text: &str) -> Result<Options> {
    let (server, export) = match text.split_once("://") {
        Some((scheme, rest)) => uri(scheme, rest).ok_or_else(|| invalid("No valid URL specified", text))?,
        None => legacy(text)?,
    };
    let mut options = Options::new();
    options.insert("driver".into(), "nbd".into());
    options.insert("server".into(), server);
    if let Some(export) = export {
        options.insert("export".into(), export.into());
    }
    Ok(options)
}

fn invalid(why: &str, text: &str) -> Error {
    Error::new(Kind::Invalid, format_args!("{why}: '{text}'"))
}

type Parts = (serde_json::Value, Option<String>);

fn uri(scheme: &str, rest: &str) -> Option<Parts> {
    if rest.contains('#') {
        return None;
    }
    let (place, query) = rest.split_once('?').map_or((rest, None), |(place, query)| (place, Some(query)));
    let (authority, path) = place.split_once('/').unwrap_or((place, ""));
    let export = if path.is_empty() { None } else { Some(decode(path)?) };
    let server = match (scheme, query) {
        ("nbd+unix", Some(query)) if authority.is_empty() => {
            let socket = decode(query.strip_prefix("socket=")?)?;
            if query.contains('&') || socket.is_empty() {
                return None;
            }
            json!({ "type": "unix", "path": socket })
        }
        ("nbd" | "nbd+tcp", None | Some("")) => {
            let (host, port) = match authority.strip_prefix('[') {
                Some(literal) => {
                    let (host, after) = literal.split_once(']')?;
                    (host.to_owned(), if after.is_empty() { None } else { Some(after.strip_prefix(':')?) })
                }
                None => match authority.split_once(':') {
                    Some((host, port)) => (decode(host)?, Some(port)),
                    None => (decode(authority)?, None),
                },
            };
            let port = match port {
                None | Some("") => PORT,
                Some(port) => port.parse().ok()?,
            };
            if host.is_empty() || host.contains('@') {
                return None;
            }
            json!({ "type": "inet", "host": host, "port": port.to_string() })
        }
        _ => return None,
    };
    Some((server, export))
}

fn legacy(text: &str) -> Result<Parts> {
    let (place, export) = match text.split_once(":exportname=") {
        Some((place, export)) => (place, Some(export.to_owned()).filter(|export| !export.is_empty())),
        None => (text, None),
    };
    let Some(place) = place.strip_prefix("nbd:") else {
        return Err(invalid("File name string for NBD must start with 'nbd:'", text));
    };
    let server = match place.strip_prefix("unix:") {
        Some("") => return Err(invalid("the socket has no path", text)),
        Some(path) => json!({ "type": "unix", "path": path }),
        None => {
            let (host, port) = place
                .rsplit_once(':')
                .filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
                .ok_or_else(|| invalid("expected nbd:HOST:PORT or nbd:unix:PATH", text))?;
            let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
            json!({ "type": "inet", "host": host, "port": port })
        }
    };
    Ok((server, export))
}

/// `None`: a `%` without two digits, or bytes that are no text.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digit = |byte: &u8| char::from(*byte).to_digit(16);
        let [high, low, after @ ..] = rest else { return None };
        bytes.push((digit(high)? << 4 | digit(low)?) as u8);
        rest = after;
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn parsed(text: &str) -> Value {
        let mut options = parse_filename(text).unwrap();
        assert!(is_filename(text));
        assert_eq!(options.remove("driver"), Some("nbd".into()));
        super::super::options::NbdOptions::parse(&options).unwrap();
        Value::Object(options)
    }

    #[test]
    fn every_form_of_a_name_is_understood() {
        let inet = |host: &str, port: &str| json!({ "type": "inet", "host": host, "port": port });
        let unix = |path: &str| json!({ "type": "unix", "path": path });
        assert_eq!(parsed("nbd://host"), json!({ "server": inet("host", "10809") }));
        assert_eq!(parsed("nbd://host:1/"), json!({ "server": inet("host", "1") }));
        assert_eq!(parsed("nbd+tcp://[::1]:2/a/b"), json!({ "server": inet("::1", "2"), "export": "a/b" }));
        assert_eq!(parsed("nbd://h/%2Fa%20b"), json!({ "server": inet("h", "10809"), "export": "/a b" }));
        assert_eq!(parsed("nbd+unix:///?socket=/x"), json!({ "server": unix("/x") }));
        assert_eq!(parsed("nbd+unix:///e?socket=%2Fx"), json!({ "server": unix("/x"), "export": "e" }));
        assert_eq!(parsed("nbd+unix://?socket=/x"), json!({ "server": unix("/x") }));
        assert_eq!(parsed("nbd:h:3"), json!({ "server": inet("h", "3") }));
        assert_eq!(parsed("nbd:[::1]:3:exportname=e"), json!({ "server": inet("::1", "3"), "export": "e" }));
        assert_eq!(parsed("nbd:unix:/x:exportname=a:b"), json!({ "server": unix("/x"), "export": "a:b" }));
    }

    #[test]
    fn what_is_no_name_is_refused_with_the_text() {
        for text in [
            "nbd://",
            "nbd:///export",
            "nbd://h:port/",
            "nbd://h?socket=/x",
            "nbd://[::1",
            "nbd+unix:///e",
            "nbd+unix://host/e?socket=/x",
            "nbd+unix:///e?socket=",
            "nbd+unix:///e?socket=/x&tls=1",
            "nbd+unix:///%2?socket=/x",
            "nbds://h/",
            "nbd:",
            "nbd:h",
            "nbd:unix:",
            "/some/file",
        ] {
            let error = parse_filename(text).unwrap_err();
            assert!(error.to_string().contains(&format!("'{text}'")), "{error}");
        }
    }
}
