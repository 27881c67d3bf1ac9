//! The options of an `nbd` node.

use driveline_graph::{Error, Kind, Options, Result, parse_options};
use driveline_wire::STRING_LENGTH_MAX;
use serde::Deserialize;
use std::path::{Path, PathBuf};

use super::address::{Address, Inet};

/// Source: QEMU qapi/block-core.json, `BlockdevOptionsNbd`, for names and defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct NbdOptions {
    server: ServerOption,
    #[serde(default)]
    pub(super) export: String,
    pub(super) tls_creds: Option<String>,
    pub(super) tls_hostname: Option<String>,
    pub(super) x_dirty_bitmap: Option<String>,
    /// Seconds.
    #[serde(default)]
    pub(super) reconnect_delay: u32,
    /// Seconds.
    #[serde(default)]
    pub(super) open_timeout: u32,
}

/// Source: QEMU qapi/sockets.json, `SocketAddress`.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
enum ServerOption {
    Unix {
        path: PathBuf,
        #[serde(default, rename = "abstract")]
        abstract_: bool,
        #[serde(default)]
        #[allow(dead_code)] // it says something about abstract sockets only
        tight: Option<bool>,
    },
    Inet {
        host: String,
        port: Port,
        #[serde(default)]
        numeric: bool,
        to: Option<u16>,
        ipv4: Option<bool>,
        ipv6: Option<bool>,
        #[serde(default, rename = "keep-alive")]
        keep_alive: bool,
        #[serde(default)]
        mptcp: bool,
    },
    Vsock {
        #[serde(rename = "cid")]
        _cid: String,
        #[serde(rename = "port")]
        _port: String,
    },
    Fd {
        #[serde(rename = "str")]
        _str: String,
    },
}

/// A port is text to QEMU; people write a number.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Port {
    Number(u16),
    Text(String),
}

impl NbdOptions {
    pub(super) fn parse(options: &Options) -> Result<NbdOptions> {
        if !options.contains_key("server") {
            return Err(Error::new(Kind::Invalid, "NBD server address missing").key("server"));
        }
        let parsed: NbdOptions = parse_options(options)?;
        for (key, text, what) in [
            ("export", Some(&parsed.export), "export name"),
            ("x-dirty-bitmap", parsed.x_dirty_bitmap.as_ref(), "x-dirty-bitmap query"),
        ] {
            if text.is_some_and(|text| text.len() > STRING_LENGTH_MAX || text.contains('\0')) {
                return Err(
                    Error::new(Kind::Invalid, format_args!("{what} too long to send to server")).key(key)
                );
            }
        }
        if parsed.tls_hostname.is_some() && parsed.tls_creds.is_none() {
            return Err(Error::new(Kind::Invalid, "it means nothing without 'tls-creds'").key("tls-hostname"));
        }
        parsed.address(Path::new(""))?;
        Ok(parsed)
    }

    /// Where the server is; a relative path of a socket starts in `directory`.
    pub(super) fn address(&self, directory: &Path) -> Result<Address> {
        let refused =
            |key: &str, why: &str| Err(Error::new(Kind::NotSupported, why).key(&format!("server.{key}")));
        match &self.server {
            ServerOption::Unix { abstract_: true, .. } => {
                refused("abstract", "abstract sockets are not supported")
            }
            ServerOption::Unix { path, .. } => Ok(Address::Unix(directory.join(path))),
            ServerOption::Inet { to: Some(_), .. } => refused("to", "a client connects to one port"),
            ServerOption::Inet { mptcp: true, .. } => refused("mptcp", "multipath TCP is not supported"),
            ServerOption::Inet { host, port, numeric, ipv4, ipv6, keep_alive, .. } => {
                let port = port.number()?;
                let inet = Inet { host: host.clone(), port, numeric: *numeric, ipv4: *ipv4, ipv6: *ipv6 };
                if inet.numeric && inet.host.parse::<std::net::IpAddr>().is_err() {
                    let text = format_args!("'{host}' is no address, and 'numeric' forbids to look it up");
                    return Err(Error::new(Kind::Invalid, text).key("server.host"));
                }
                if *ipv4 == Some(false) && *ipv6 == Some(false) {
                    let text = "IPv4 and IPv6 cannot both be ruled out";
                    return Err(Error::new(Kind::Invalid, text).key("server.ipv4"));
                }
                Ok(Address::Inet(inet, *keep_alive))
            }
            ServerOption::Vsock { .. } => refused("type", "servers behind vsock are not supported"),
            ServerOption::Fd { .. } => refused("type", "servers behind a descriptor are not supported"),
        }
    }
}

impl Port {
    fn number(&self) -> Result<u16> {
        match self {
            Port::Number(number) => Ok(*number),
            Port::Text(text) => text.parse().map_err(|_| {
                let text = format_args!("'{text}' is no port: expected a number from 0 to 65535");
                Error::new(Kind::Invalid, text).key("server.port")
            }),
        }
    }
}
