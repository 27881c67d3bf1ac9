//! Passwords and keys.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{fmt, fs};

/// A `secret`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    /// What it says, decoded.
    pub bytes: Vec<u8>,
    pub(super) given: SecretArguments,
}

impl fmt::Debug for Secret {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").field("file", &self.given.file).finish_non_exhaustive()
    }
}

pub(super) const PROPERTIES: &[(&str, &str)] = &[
    ("data", "string"),
    ("file", "string"),
    ("format", "QCryptoSecretFormat"),
    ("iv", "string"),
    ("keyid", "string"),
];

/// QAPI's `QCryptoSecretFormat`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum SecretFormat {
    #[default]
    Raw,
    Base64,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct SecretArguments {
    data: Option<String>,
    file: Option<String>,
    format: Option<SecretFormat>,
    keyid: Option<String>,
    iv: Option<String>,
}

impl SecretArguments {
    pub(super) fn read(mut self) -> Result<Secret> {
        if self.keyid.is_some() || self.iv.is_some() {
            let text =
                "Parameters 'keyid' and 'iv' are not supported: a secret is given in the clear or in a file";
            return Err(Error::generic(text));
        }
        let bytes = match (&self.data, &self.file) {
            (Some(_), Some(_)) => return Err(Error::generic("'file' and 'data' are mutually exclusive")),
            (None, None) => return Err(Error::generic("Either 'file' or 'data' must be provided")),
            (Some(data), None) => data.clone().into_bytes(),
            (None, Some(file)) => fs::read(file)
                .map_err(|error| Error::generic(format_args!("Unable to read {file}: {error}")))?,
        };
        let format = *self.format.get_or_insert_default();
        let bytes = match format {
            SecretFormat::Raw => bytes,
            SecretFormat::Base64 => decode_base64(&bytes)
                .ok_or_else(|| Error::generic("Base64 data contains invalid characters"))?,
        };
        Ok(Secret { bytes, given: self })
    }
}

/// Lines are allowed, as tools write them. `None`: something else is in it, or its end is missing.
pub(super) fn decode_base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut digits: Vec<u8> = text.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    if !digits.len().is_multiple_of(4) {
        return None;
    }
    let padding = digits.iter().rev().take(2).take_while(|byte| **byte == b'=').count();
    digits.truncate(digits.len() - padding);
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    for group in digits.chunks(4) {
        let mut bits = 0u32;
        for digit in group {
            let value = match digit {
                b'A'..=b'Z' => digit - b'A',
                b'a'..=b'z' => digit - b'a' + 26,
                b'0'..=b'9' => digit - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        bits <<= 6 * (4 - group.len());
        bytes.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Some(bytes)
}
