//! Which state of which image files the bitmaps speak of.

use core::fmt;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// One image file at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFile {
    /// Where it is.
    pub path: PathBuf,
    /// The device that it is on.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// When its content last changed, in nanoseconds since 1970.
    pub mtime_ns: i64,
}

impl ImageFile {
    /// A file as it was when it was looked at.
    pub fn of(path: &Path, found: &std::fs::Metadata) -> Self {
        let mtime_ns = found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec());
        let (device, inode, size) = (found.dev(), found.ino(), found.size());
        ImageFile { path: path.to_owned(), device, inode, size, mtime_ns }
    }
}

/// The image files of a drive at one moment: who changes one of them without the bitmaps' knowledge leaves a trace.
///
/// ```
/// use driveline_store::Fingerprint;
///
/// let folder = tempfile::tempdir()?;
/// let image = folder.path().join("active.qcow2");
/// std::fs::write(&image, "data")?;
/// let before = Fingerprint::take(&[&image])?;
/// assert_eq!(Fingerprint::decode(&before.encode()), Some(before.clone()));
/// std::fs::write(&image, "other data")?;
/// let differences = before.differences(&Fingerprint::take(&[&image])?);
/// assert!(differences.iter().any(|text| text.contains("active.qcow2 has 10 bytes, and had 4")));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprint {
    /// The files, in the order in which they were named.
    pub files: Vec<ImageFile>,
}

const MAGIC: &[u8; 8] = b"DRVLFIN1";

impl Fingerprint {
    /// Looks at files.
    ///
    /// Errors: the first file that cannot be looked at, with its path.
    pub fn take<P: AsRef<Path>>(paths: &[P]) -> io::Result<Self> {
        let look = |path: &P| {
            let path = path.as_ref();
            let found = std::fs::metadata(path)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
            Ok(ImageFile::of(path, &found))
        };
        Ok(Fingerprint { files: paths.iter().map(look).collect::<io::Result<_>>()? })
    }

    /// The same as bytes, for the owner section of a store.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend((self.files.len() as u32).to_le_bytes());
        for file in &self.files {
            let path = file.path.as_os_str().as_bytes();
            out.extend((path.len() as u32).to_le_bytes());
            out.extend(path);
            for number in [file.device, file.inode, file.size] {
                out.extend(number.to_le_bytes());
            }
            out.extend(file.mtime_ns.to_le_bytes());
        }
        out
    }

    /// Reads what [`encode`](Fingerprint::encode) wrote; none if it is something else.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes.strip_prefix(MAGIC)?;
        let mut take = |count: usize| {
            let (taken, after) = rest.split_at_checked(count)?;
            rest = after;
            Some(taken)
        };
        let mut files = Vec::new();
        for _ in 0..u32::from_le_bytes(take(4)?.try_into().ok()?) {
            let length = u32::from_le_bytes(take(4)?.try_into().ok()?);
            let path = PathBuf::from(OsStr::from_bytes(take(length as usize)?));
            let mut number = || Some(u64::from_le_bytes(take(8)?.try_into().ok()?));
            let (device, inode, size) = (number()?, number()?, number()?);
            files.push(ImageFile { path, device, inode, size, mtime_ns: number()? as i64 });
        }
        rest.is_empty().then_some(Fingerprint { files })
    }

    /// What is not as it was, each in words. Empty if `now` is what this one was.
    pub fn differences(&self, now: &Fingerprint) -> Vec<String> {
        let mut differences = Vec::new();
        for before in &self.files {
            let name = before.path.display();
            let Some(now) = now.files.iter().find(|now| now.path == before.path) else {
                differences.push(format!("{name} is not an image of the drive any more"));
                continue;
            };
            if (now.device, now.inode) != (before.device, before.inode) {
                differences.push(format!(
                    "{name} is another file: inode {} of device {}, and was {} of {}",
                    now.inode, now.device, before.inode, before.device
                ));
            }
            if now.size != before.size {
                differences.push(format!("{name} has {} bytes, and had {}", now.size, before.size));
            }
            if now.mtime_ns != before.mtime_ns {
                let (changed, known) = (Time(now.mtime_ns), Time(before.mtime_ns));
                let order = if now.mtime_ns > before.mtime_ns { "after" } else { "before" };
                differences.push(format!("{name} was changed at {changed}, {order} {known}"));
            }
        }
        let known = |file: &&ImageFile| self.files.iter().all(|before| before.path != file.path);
        let new = now.files.iter().filter(known);
        differences.extend(new.map(|file| format!("{} is new among the images", file.path.display())));
        differences
    }

    /// The files that changed later than `when`, each in words: when the store's process was last known to live.
    pub fn changed_after(&self, when: SystemTime) -> Vec<String> {
        let since = when.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let when = i64::try_from(since.as_nanos()).unwrap_or(i64::MAX);
        let later = self.files.iter().filter(|file| file.mtime_ns > when);
        later
            .map(|file| {
                let (path, changed) = (file.path.display(), Time(file.mtime_ns));
                format!("{path} was changed at {changed}, after {}", Time(when))
            })
            .collect()
    }
}

/// Nanoseconds since 1970 as a date and a time, UTC.
struct Time(i64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanoseconds) = (self.0.div_euclid(1_000_000_000), self.0.rem_euclid(1_000_000_000));
        let (days, second) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
        // Source: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days: years begin in March, so that
        // the leap day is the last of one.
        let days = days + 719_468;
        let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        let year = year + era * 400 + i64::from(month <= 2);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        write!(f, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{nanoseconds:09} UTC")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_shown_as_date_does() {
        let shown = |seconds: i64| Time(seconds * 1_000_000_000).to_string();
        assert_eq!(shown(0), "1970-01-01 00:00:00.000000000 UTC");
        assert_eq!(shown(951_782_400), "2000-02-29 00:00:00.000000000 UTC");
        assert_eq!(shown(1_735_689_599), "2024-12-31 23:59:59.000000000 UTC");
        assert_eq!(Time(-1).to_string(), "1969-12-31 23:59:59.999999999 UTC");
    }

    #[test]
    fn every_kind_of_change_is_told_in_words() {
        let file = |path: &str, inode, size, mtime_ns| ImageFile {
            path: path.into(),
            device: 1,
            inode,
            size,
            mtime_ns,
        };
        let before = Fingerprint { files: vec![file("a", 1, 1, 1), file("b", 2, 2, 2)] };
        assert!(before.differences(&before).is_empty());
        let now = Fingerprint { files: vec![file("a", 9, 8, 7), file("c", 2, 2, 2)] };
        let told = before.differences(&now);
        assert_eq!(told.len(), 5, "{told:?}");
        assert_eq!(told[0], "a is another file: inode 9 of device 1, and was 1 of 1");
        assert_eq!(
            told[2],
            "a was changed at 1970-01-01 00:00:00.000000007 UTC, after 1970-01-01 00:00:00.000000001 UTC"
        );
        let bytes = before.encode();
        assert_eq!(Fingerprint::decode(&bytes), Some(before));
        for cut in 0..bytes.len() {
            assert_eq!(Fingerprint::decode(&bytes[..cut]), None);
        }
        assert_eq!(now.changed_after(UNIX_EPOCH + Duration::from_nanos(2)).len(), 1);
    }
}
