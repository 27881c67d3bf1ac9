//! The names of bitmaps.

use core::borrow::Borrow;
use core::fmt;
use core::ops::Deref;
use core::str::FromStr;
use std::sync::Arc;

use crate::{Error, Result};

/// A bitmap's name: 1 to 1023 bytes, the limit of QEMU and of the qcow2 format. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitmapName(Arc<str>);

impl BitmapName {
    /// The longest name, in bytes.
    pub const BYTES_MAX: usize = 1023;

    /// Takes `name` if it may name a bitmap.
    ///
    /// Errors: [`Error::NameEmpty`], [`Error::NameTooLong`].
    pub fn new(name: &str) -> Result<Self> {
        match name.len() {
            0 => Err(Error::NameEmpty),
            1..=Self::BYTES_MAX => Ok(BitmapName(name.into())),
            length => Err(Error::NameTooLong { start: name.chars().take(32).collect(), length }),
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Deref for BitmapName {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for BitmapName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl PartialEq<str> for BitmapName {
    fn eq(&self, other: &str) -> bool {
        *self.0 == *other
    }
}

impl PartialEq<&str> for BitmapName {
    fn eq(&self, other: &&str) -> bool {
        *self.0 == **other
    }
}

impl FromStr for BitmapName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        BitmapName::new(name)
    }
}

impl TryFrom<&str> for BitmapName {
    type Error = Error;

    fn try_from(name: &str) -> Result<Self> {
        BitmapName::new(name)
    }
}

impl fmt::Display for BitmapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BitmapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_1_to_1023_bytes() {
        assert_eq!(BitmapName::new(""), Err(Error::NameEmpty));
        assert_eq!(BitmapName::new("daily").unwrap(), "daily");
        assert!(BitmapName::new(&"x".repeat(1023)).is_ok());
        // Bytes count, not characters.
        let long = BitmapName::new(&"ä".repeat(512)).unwrap_err().to_string();
        assert!(long.contains("1024 bytes") && long.contains("expected 1 to 1023"), "{long}");
    }
}
