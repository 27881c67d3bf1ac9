//! What an image names: a file, or a pseudo-filename that says more, turned into a node definition.
//!
//! | name | node |
//! |---|---|
//! | `disk.img`, `file:disk.img` | `file`; a relative one starts at the image's own directory |
//! | `host_device:/dev/sdb` | `host_device` |
//! | `json:{"driver": ...}` | what it says, with dotted keys or without |
//! | `nbd://HOST:PORT/EXPORT`, `nbd+unix:///EXPORT?socket=PATH` | `nbd` |
//!
//! Source: QEMU block.c, `bdrv_parse_filename`, `parse_json_protocol`; NBD doc/uri.md.

use driveline_graph::{Error, Kind, Options, Result};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// NBD's port, where a URI has none.
const NBD_PORT: &str = "10809";

/// The definition of the backing that an image names. `format` is what it says about its format, `image` is where it is itself.
pub(super) fn backing(name: &str, format: Option<&str>, image: Option<&Path>) -> Result<Options> {
    let refused = |why: &str| {
        let text = format_args!("the image's backing file '{name}' {why}");
        Error::new(Kind::NotSupported, text).key("backing")
    };
    let mut definition = if let Some(text) = name.strip_prefix("json:") {
        let Ok(Value::Object(mut object)) = serde_json::from_str(text) else {
            return Err(refused("is no JSON object"));
        };
        match format {
            // What is said beside a format is about the format's node, unless it has no file yet.
            Some(format) if object.keys().any(|key| key == "file" || key.starts_with("file.")) => {
                object.insert("driver".into(), format.into());
                object
            }
            Some(format) if object.get("driver").is_none_or(|driver| driver != format) => {
                object_of(json!({ "driver": format, "file": object }))
            }
            _ => object,
        }
    } else if let Some(server) = nbd(name).map_err(refused)? {
        object_of(json!({ "driver": format.unwrap_or("raw"), "file": server }))
    } else if let Some(path) = name.strip_prefix("host_device:") {
        let file = json!({ "driver": "host_device", "path": path });
        object_of(json!({ "driver": format.unwrap_or("raw"), "file": file }))
    } else {
        let path = path("backing", name, image)?;
        let format = match format {
            Some(format) => format.to_owned(),
            None => probe(&path)?.to_owned(),
        };
        object_of(json!({ "driver": format, "file": { "driver": "file", "path": path } }))
    };
    definition.insert("read-only".into(), true.into());
    Ok(definition)
}

fn object_of(value: Value) -> Options {
    match value {
        Value::Object(object) => object,
        _ => Options::new(),
    }
}

/// The options of driver `nbd` for a URI; `None` if the name is no such URI.
fn nbd(name: &str) -> Result<Option<Options>, &'static str> {
    let Some((scheme, rest)) = name.split_once("://") else { return Ok(None) };
    if !matches!(scheme, "nbd" | "nbd+unix" | "nbds" | "nbds+unix") {
        return Ok(None);
    }
    if scheme.starts_with("nbds") {
        return Err("asks for TLS, and an image cannot name credentials; give the child as an option");
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    let queries: BTreeMap<&str, &str> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
    let server = match (scheme, queries.get("socket")) {
        ("nbd+unix", Some(path)) => json!({ "type": "unix", "path": unescape(path)? }),
        ("nbd+unix", None) => return Err("names no socket"),
        _ => {
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            let (host, port) = match host.rsplit_once(':') {
                Some((host, port)) if !port.contains(']') => (host, port),
                _ => (host, NBD_PORT),
            };
            let host = host.trim_start_matches('[').trim_end_matches(']');
            let host = if host.is_empty() { "localhost" } else { host };
            json!({ "type": "inet", "host": unescape(host)?, "port": port })
        }
    };
    let mut options = object_of(json!({ "driver": "nbd", "server": server }));
    if !export.is_empty() {
        options.insert("export".into(), unescape(export)?.into());
    }
    Ok(Some(options))
}

/// Percent-encoding, taken back.
fn unescape(text: &str) -> Result<String, &'static str> {
    let wrong = "is no URI: a '%' is followed by two hexadecimal digits";
    let mut bytes = Vec::new();
    let mut left = text.as_bytes();
    while let [first, rest @ ..] = left {
        left = rest;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = left.get(..2).and_then(|digits| str::from_utf8(digits).ok()).ok_or(wrong)?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| wrong)?);
        left = &left[2..];
    }
    String::from_utf8(bytes).map_err(|_| "is no UTF-8")
}

/// Where a file is that an image names: relative names start at the image's own directory.
pub(super) fn path(child: &str, name: &str, image: Option<&Path>) -> Result<PathBuf> {
    let what = if child == "backing" { "backing file" } else { "data file" };
    let refused = |why: std::fmt::Arguments<'_>| {
        Error::new(Kind::NotSupported, format_args!("the image's {what} '{name}' {why}")).key(child)
    };
    let name = match name.split_once(':') {
        Some(("file", path)) => path,
        // As in QEMU, a colon before the first slash ends the name of a protocol.
        Some((protocol, _)) if !protocol.contains('/') => {
            return Err(refused(format_args!("is not a file; give the child as an option")));
        }
        _ => name,
    };
    let path = Path::new(name);
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    let image = image.ok_or_else(|| {
        refused(format_args!("is relative, but the image is no file that it could be relative to"))
    })?;
    Ok(image.parent().unwrap_or(Path::new("")).join(path))
}

/// The format of a backing file whose image does not name it.
fn probe(path: &Path) -> Result<&'static str> {
    use std::{io::Read, os::unix::fs::OpenOptionsExt};
    let doing = |error: std::io::Error| {
        Error::io(error.raw_os_error().unwrap_or(5), format_args!("backing file {}", path.display()))
            .key("backing")
    };
    let mut magic = Vec::new();
    // Without O_NONBLOCK a pipe that the image names would be waited for, and all of this thread with it.
    let file = std::fs::File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    file.map_err(doing)?.take(4).read_to_end(&mut magic).map_err(doing)?;
    Ok(if magic == super::header::MAGIC { "qcow2" } else { "raw" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pseudo_filenames_become_the_nodes_that_they_say() {
        let file = json!({ "driver": "file", "filename": "/a" });
        for (name, format, expected) in [
            (r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/a"}}"#, Some("qcow2"), {
                json!({ "driver": "qcow2", "file": file, "read-only": true })
            }),
            (
                r#"json:{"file.filename":"/a","file.driver":"file"}"#,
                Some("raw"),
                json!({ "file.filename": "/a", "file.driver": "file", "driver": "raw", "read-only": true }),
            ),
            (
                r#"json:{"driver":"file","filename":"/a"}"#,
                Some("raw"),
                json!({ "driver": "raw", "file": file, "read-only": true }),
            ),
            (
                "nbd://h:1/a%20b",
                None,
                json!({ "driver": "raw", "read-only": true, "file": { "driver": "nbd", "export": "a b",
                    "server": { "type": "inet", "host": "h", "port": "1" } } }),
            ),
            (
                "nbd+unix:///?socket=/s",
                Some("qcow2"),
                json!({ "driver": "qcow2", "read-only": true, "file": { "driver": "nbd",
                    "server": { "type": "unix", "path": "/s" } } }),
            ),
            (
                "host_device:/dev/x",
                None,
                json!({ "driver": "raw", "read-only": true,
                    "file": { "driver": "host_device", "path": "/dev/x" } }),
            ),
        ] {
            assert_eq!(Value::from(backing(name, format, None).unwrap()), expected, "{name}");
        }
        for name in ["json:[]", "json:", "nbd+unix:///x", "nbds://h/x", "nbd://h/%z", "ssh://h/x", "rel"] {
            assert!(backing(name, Some("raw"), None).unwrap_err().to_string().contains(name), "{name}");
        }
    }
}
