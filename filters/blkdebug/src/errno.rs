//! Errors by name.

use driveline_sdk::serde::{
    Deserialize, Deserializer,
    de::{Error, Unexpected, Visitor},
};
use std::fmt;

/// Those that storage has. Others can be given by number.
const NAMES: [(&str, i32); 24] = [
    ("EPERM", 1),
    ("ENOENT", 2),
    ("EIO", 5),
    ("ENXIO", 6),
    ("EAGAIN", 11),
    ("ENOMEM", 12),
    ("EACCES", 13),
    ("EBUSY", 16),
    ("ENODEV", 19),
    ("EINVAL", 22),
    ("EFBIG", 27),
    ("ENOSPC", 28),
    ("EROFS", 30),
    ("EPIPE", 32),
    ("EOVERFLOW", 75),
    ("ENOTSUP", 95),
    ("EOPNOTSUPP", 95),
    ("ECONNRESET", 104),
    ("ESHUTDOWN", 108),
    ("ETIMEDOUT", 110),
    ("ESTALE", 116),
    ("EREMOTEIO", 121),
    ("EDQUOT", 122),
    ("ENOMEDIUM", 123),
];

/// The largest number that a kernel uses.
const ERRNO_MAX: u64 = 4095;

/// The number of an error, written as its name or number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) i32);

impl Errno {
    /// A number; 0 is no error.
    pub(crate) fn of_number(number: i64) -> Option<Self> {
        i32::try_from(number).ok().filter(|number| (0..=ERRNO_MAX as i32).contains(number)).map(Self)
    }
}

struct Either;

impl Visitor<'_> for Either {
    type Value = Errno;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of an error, such as \"EIO\" or \"ENOSPC\", or its number from 1 to 4095")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Errno, E> {
        match number {
            1..=ERRNO_MAX => Ok(Errno(number as i32)),
            _ => Err(E::invalid_value(Unexpected::Unsigned(number), &self)),
        }
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Errno, E> {
        let known = NAMES.iter().find(|(known, _)| *known == name);
        known.map(|(_, number)| Errno(*number)).ok_or_else(|| E::invalid_value(Unexpected::Str(name), &self))
    }
}

impl<'de> Deserialize<'de> for Errno {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Either)
    }
}
