//! Does nothing. It is a node that bitmaps can be on while the nodes below it change; the graph does the recording.
use driveline_sdk::prelude::*;

/// Has no state, as it changes no operation.
#[derive(Debug)]
pub struct BitmapHolder;

#[filter(name = "bitmap-holder", default = "pass", summary = "does nothing; bitmaps can be kept on it")]
impl Filter for BitmapHolder {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(BitmapHolder)
    }
}

export_filters![BitmapHolder];

#[cfg(test)]
mod tests;
