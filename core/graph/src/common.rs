//! Options that every node takes, whatever its driver, by the names that they have in QEMU.
//!
//! | option | default | meaning |
//! |---|---|---|
//! | `read-only` | `false` | the node takes no writes |
//! | `auto-read-only` | `false` | what cannot be opened for writing, a file or an NBD export, makes the node read-only, even where `read-only = false` is said; a file is open for writing only while somebody may write |
//! | `force-share` | `false` | others may write to what is read here; only with `read-only` |
//! | `discard` | `"unmap"` | `"unmap"`, `"on"`: discards reach the driver; `"ignore"`, `"off"`: they end here, no bitmap of the node records them, and zeroes are written without giving space back. A filter that is put in front of a node has what that has. Over QMP and on the command line of `storage-daemon` the default is `"ignore"`, as in QEMU, but for nodes that are defined in place |
//! | `detect-zeroes` | `"off"` | `"on"`: a write of nothing but zeroes becomes a write_zeroes; `"unmap"`: one that may give space back (`discard = "unmap"` must be said) |
//! | `cache` | | a table: `direct`, past the host's page cache; `no-flush`, nothing is made durable. Both are those of nodes defined in place below, too |
//! | `active` | `true` | `false`: the node holds no locks and takes no writes until it is activated |
//!
//! Source: QEMU qapi/block-core.json, `BlockdevOptions`.

use crate::{
    driver::{Description, DriverKind, Options},
    error::{Error, Kind, Result},
};
use serde_json::Value;

/// The keys of the options that every node takes.
pub const COMMON_OPTIONS: [&str; 7] =
    ["read-only", "auto-read-only", "force-share", "discard", "detect-zeroes", "cache", "active"];

/// What becomes of writes that are all zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// They are written as they are.
    #[default]
    Off,
    /// They become `write_zeroes`.
    On,
    /// The same, and space may be given back.
    Unmap,
}

impl DetectZeroes {
    /// Its word in options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Unmap => "unmap",
        }
    }
}

/// Options that every node has (but for `read-only`, which is the graph's to change).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeOptions {
    /// `detect-zeroes`.
    pub detect_zeroes: DetectZeroes,
    /// `discard`, if it is said: `true` to unmap.
    pub discard: Option<bool>,
    /// `cache.direct`, if it is said here or above.
    pub direct: Option<bool>,
    /// `cache.no-flush`.
    pub no_flush: bool,
    /// `auto-read-only`.
    pub auto_read_only: bool,
    /// `force-share`.
    pub force_share: bool,
    /// `active`.
    pub active: bool,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self {
            detect_zeroes: DetectZeroes::Off,
            discard: None,
            direct: None,
            no_flush: false,
            auto_read_only: false,
            force_share: false,
            active: true,
        }
    }
}

impl NodeOptions {
    /// Takes them out of the options of a node; what is left is the driver's. A node that is defined in place has some from
    /// the one `above`. Where the driver has an option of the same name it gets its word.
    pub(crate) fn take(options: &mut Options, description: &Description, above: &Self) -> Result<Self> {
        let has = |name: &str| description.options.iter().any(|option| option == name);
        // A filter that has an option of that name means something else by it (a delay of discards).
        let is_another = description.kind == DriverKind::Filter && has("discard");
        let said_direct = take_cache(options)?;
        let (direct, no_flush) = said_direct.unwrap_or_default();
        let common = Self {
            detect_zeroes: match take_word(options, "detect-zeroes", &["off", "on", "unmap"])? {
                Some(1) => DetectZeroes::On,
                Some(2) => DetectZeroes::Unmap,
                _ => DetectZeroes::Off,
            },
            discard: match is_another {
                true => None,
                false => {
                    take_word(options, "discard", &["ignore", "off", "unmap", "on"])?.map(|word| word >= 2)
                }
            },
            direct: direct.or(above.direct),
            no_flush: no_flush.unwrap_or(above.no_flush),
            auto_read_only: take_bool(options, "auto-read-only")?.unwrap_or(above.auto_read_only),
            force_share: take_bool(options, "force-share")?.unwrap_or(above.force_share),
            active: take_bool(options, "active")?.unwrap_or(above.active),
        };
        if common.detect_zeroes == DetectZeroes::Unmap && common.discard != Some(true) {
            let text =
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap";
            return Err(Error::new(Kind::Invalid, text));
        }
        if let (Some(direct), true, false) = (common.direct, has("cache"), options.contains_key("cache")) {
            options.insert("cache".into(), if direct { "none" } else { "writeback" }.into());
        }
        if let (Some(unmap), true) = (common.discard, has("discard")) {
            options.insert("discard".into(), if unmap { "unmap" } else { "ignore" }.into());
        }
        for (name, set) in [("auto-read-only", common.auto_read_only), ("force-share", common.force_share)] {
            if set && has(name) {
                options.insert(name.into(), true.into());
            }
        }
        Ok(common)
    }

    /// As options, those that differ from their defaults.
    pub fn to_options(&self) -> Options {
        let mut options = Options::new();
        if self.detect_zeroes != DetectZeroes::Off {
            options.insert("detect-zeroes".into(), self.detect_zeroes.name().into());
        }
        if let Some(unmap) = self.discard {
            options.insert("discard".into(), if unmap { "unmap" } else { "ignore" }.into());
        }
        let mut cache = Options::new();
        cache.extend(self.direct.map(|direct| ("direct".to_owned(), direct.into())));
        cache.extend(self.no_flush.then(|| ("no-flush".to_owned(), true.into())));
        if !cache.is_empty() {
            options.insert("cache".into(), cache.into());
        }
        for (name, set) in [("auto-read-only", self.auto_read_only), ("force-share", self.force_share)] {
            options.extend(set.then(|| (name.to_owned(), true.into())));
        }
        options.extend((!self.active).then(|| ("active".to_owned(), false.into())));
        options
    }

    /// What a node defined in place has from this one above it.
    pub(crate) fn below(&self) -> Self {
        Self { detect_zeroes: DetectZeroes::Off, discard: None, ..*self }
    }

    /// Options of a filter that is put in front of such a node: what becomes of discards there stays as it is.
    pub(crate) fn in_front(&self) -> Self {
        Self { discard: self.discard.filter(|unmap| !unmap), ..Self::default() }
    }

    /// Do discards come to nothing at this node, here or in its driver?
    pub(crate) fn discards_nothing(&self) -> bool {
        self.discard == Some(false)
    }

    /// Do discards end at a node of this driver, rather than in it?
    pub(crate) fn ignores_discard(&self, description: &Description) -> bool {
        self.discards_nothing() && !description.options.iter().any(|option| option == "discard")
    }

    /// Do flushes end at a node of this driver? Those of a format still reach its file.
    pub(crate) fn ignores_flush(&self, description: &Description) -> bool {
        self.no_flush && description.kind == DriverKind::Protocol
    }
}

/// `cache` as an object: direct, no-flush. A driver's own word for it stays where it is.
fn take_cache(options: &mut Options) -> Result<Option<(Option<bool>, Option<bool>)>> {
    if !options.get("cache").is_some_and(Value::is_object) {
        return Ok(None);
    }
    let Some(Value::Object(mut cache)) = options.shift_remove("cache") else { return Ok(None) };
    let within = |error: Error| {
        let key = format!("cache.{}", error.option().unwrap_or_default());
        error.key(&key)
    };
    let direct = take_bool(&mut cache, "direct").map_err(within)?;
    let no_flush = take_bool(&mut cache, "no-flush").map_err(within)?;
    match cache.keys().next() {
        Some(key) => {
            let text = "unknown; expected 'direct' or 'no-flush'";
            Err(Error::new(Kind::Invalid, text).key(&format!("cache.{key}")))
        }
        None => Ok(Some((direct, no_flush))),
    }
}

fn take_bool(options: &mut Options, key: &str) -> Result<Option<bool>> {
    match options.shift_remove(key) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(value)),
        Some(other) => {
            Err(Error::new(Kind::Invalid, format_args!("expected true or false, found {other}")).key(key))
        }
    }
}

/// Which of the words it is.
fn take_word(options: &mut Options, key: &str, words: &[&str]) -> Result<Option<usize>> {
    let Some(value) = options.shift_remove(key) else { return Ok(None) };
    let found = value.as_str().and_then(|text| words.iter().position(|word| *word == text));
    found.map(Some).ok_or_else(|| {
        let text = format_args!("expected one of {}, found {value}", words.join(", "));
        Error::new(Kind::Invalid, text).key(key)
    })
}
