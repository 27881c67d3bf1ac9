//! Exports one name twice.
use driveline_sdk::prelude::*;

struct One;

#[filter(name = "twice", default = "pass")]
impl Filter for One {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(One)
    }
}

struct Two;

#[filter(name = "twice", default = "pass")]
impl Filter for Two {
    type Options = NoOptions;

    fn open(_: NoOptions, _: &OpenCx<'_>) -> Result<Self> {
        Ok(Two)
    }
}

export_filters![One, Two];
