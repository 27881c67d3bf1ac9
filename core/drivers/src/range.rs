//! What ranges and sizes may be.

use driveline_graph::{Error, Kind, Result};
use driveline_op::Error as OpError;

/// The largest size of a node: what the kernel takes as an offset.
pub(crate) const SIZE_BYTES_MAX: u64 = i64::MAX as u64;

/// Refuses sizes that no offset reaches.
pub(crate) fn check_size(size_bytes: u64) -> Result<()> {
    if size_bytes > SIZE_BYTES_MAX {
        let text = format_args!("{size_bytes} is too large: the largest size is {SIZE_BYTES_MAX} bytes");
        return Err(Error::new(Kind::Invalid, text));
    }
    Ok(())
}

/// Refuses a request that is not inside `size_bytes`. The graph has checked those from outside; a format may
/// err when its image is corrupt.
#[inline]
pub(crate) fn inside(offset: u64, length: u64, size_bytes: u64) -> driveline_op::Result<()> {
    if offset <= size_bytes && length <= size_bytes - offset {
        Ok(())
    } else {
        Err(outside(offset, length, size_bytes))
    }
}

#[cold]
fn outside(offset: u64, length: u64, size_bytes: u64) -> OpError {
    OpError::invalid(format_args!("{length} bytes at {offset} are not inside the node's {size_bytes} bytes"))
}
