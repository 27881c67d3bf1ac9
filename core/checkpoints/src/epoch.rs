//! The names of the bitmaps of epochs, which say all that has to be known after a restart.

use std::{fmt, str::FromStr};

/// What the name of an epoch's bitmap says: `checkpoint:NUMBER:AFTER:CREATED:NAME`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch {
    /// Later epochs of a drive have greater ones, from 1 on.
    pub number: u64,
    /// The number of the epoch before it; 0: it is the first.
    pub after: u64,
    /// When it began, in seconds since 1970.
    pub created_s: u64,
    /// The checkpoint that it begins with.
    pub checkpoint: String,
}

const PREFIX: &str = "checkpoint:";

impl Epoch {
    /// Is it the name of an epoch's bitmap? Nobody else should change such a bitmap.
    pub fn is_name(bitmap: &str) -> bool {
        bitmap.parse::<Self>().is_ok()
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, after, created_s, checkpoint } = self;
        write!(f, "{PREFIX}{number}:{after}:{created_s}:{checkpoint}")
    }
}

/// It is the name of some other bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoEpoch;

impl FromStr for Epoch {
    type Err = NoEpoch;

    fn from_str(name: &str) -> Result<Self, NoEpoch> {
        let mut parts = name.strip_prefix(PREFIX).ok_or(NoEpoch)?.splitn(4, ':');
        let mut number = || parts.next().and_then(|part| part.parse().ok()).ok_or(NoEpoch);
        let (number, after, created_s) = (number()?, number()?, number()?);
        match parts.next() {
            Some(checkpoint) if !checkpoint.is_empty() && number > after => {
                Ok(Self { number, after, created_s, checkpoint: checkpoint.to_owned() })
            }
            _ => Err(NoEpoch),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_it_was_written_and_others_are_not() {
        let epoch = Epoch { number: 12, after: 7, created_s: 1_700_000_000, checkpoint: "a:b c".into() };
        assert_eq!(epoch.to_string(), "checkpoint:12:7:1700000000:a:b c");
        assert_eq!(epoch.to_string().parse(), Ok(epoch));
        for other in
            ["daily", "checkpoint:1:0:5:", "checkpoint:1:1:5:x", "checkpoint:x:0:5:x", "checkpoint:1:0:x"]
        {
            assert!(!Epoch::is_name(other), "{other}");
        }
    }
}
