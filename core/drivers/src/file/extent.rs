//! Which ranges are holes, as the file system says.

use super::data::File;
use driveline_op::{BlockStatus, BlockStatusRequest, Next, Result, status};
use parking_lot::Mutex;
use std::{io, ops::Range};

/// The last extent of data that was found. Some file systems take long to find the end of one (tmpfs looks at each page).
///
/// Holes are not remembered: another program may fill them. To call data what was punched meanwhile is no lie.
#[derive(Debug, Default)]
pub(super) struct Extents(Mutex<Range<u64>>);

impl Extents {
    /// Forgets what is known, after something was punched or cut off.
    pub(super) fn forget(&self) {
        *self.0.lock() = 0..0;
    }

    fn data_until(&self, offset: u64) -> Option<u64> {
        let known = self.0.lock();
        known.contains(&offset).then_some(known.end)
    }
}

/// Answers on this thread: the file system has what it needs in memory nearly always, and a change of threads would take
/// longer than the answer does.
pub(super) async fn block_status(
    file: &File,
    _: &mut Next<'_>,
    request: &BlockStatusRequest<'_>,
) -> Result<()> {
    file.check(request.offset(), request.length())?;
    let (data, end) = file.extent_at(request.range());
    let flags = if data { status::DATA | status::MAPPED } else { status::ZERO };
    let length = end - request.offset();
    request.answer(BlockStatus { flags, depth: 1, length, map: request.offset(), reserved: 0 });
    Ok(())
}

impl File {
    /// Is there data at the beginning of the range, and where does that end?
    fn extent_at(&self, range: Range<u64>) -> (bool, u64) {
        if range.is_empty() || self.file.is_block_device() {
            return (true, range.end);
        }
        if let Some(end) = self.extents.data_until(range.start) {
            return (true, end.min(range.end));
        }
        // A file system that does not know its holes has none.
        self.look(&range).unwrap_or((true, range.end))
    }

    fn look(&self, range: &Range<u64>) -> io::Result<(bool, u64)> {
        let align = u64::from(self.alignment.offset);
        let Some(data) = self.file.seek_data(range.start)? else { return Ok((false, range.end)) };
        if data / align * align > range.start {
            return Ok((false, (data / align * align).min(range.end)));
        }
        let hole = self.file.seek_hole(data)?.unwrap_or(range.end).next_multiple_of(align);
        *self.extents.0.lock() = range.start..hole;
        Ok((true, hole.min(range.end)))
    }
}
