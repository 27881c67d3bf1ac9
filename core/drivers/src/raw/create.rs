//! Making a raw image: its file gets the size that is asked for, and nothing is in it.
//!
//! | option | default | meaning |
//! |---|---|---|
//! | `file` | required | the node that becomes the image |
//! | `size` | required | the size in bytes |
//! | `preallocation` | `"off"` | `"falloc"` or `"full"`: what has its space at once |

use driveline_graph::{CreateArgs, Created, Error, Kind, Preallocation, Result, parse_options};
use serde::Deserialize;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Given {
    size: u64,
    #[serde(default)]
    preallocation: Preallocation,
    backing_file: Option<String>,
    backing_fmt: Option<String>,
}

pub(super) async fn create(args: CreateArgs<'_>) -> Result<Created> {
    let given: Given = parse_options(args.options)?;
    if given.backing_file.is_some() || given.backing_fmt.is_some() {
        let text = "Backing file not supported for file format 'raw'";
        return Err(Error::new(Kind::Invalid, text).key("backing-file"));
    }
    if given.preallocation == Preallocation::Metadata {
        let text = "Unsupported preallocation mode: metadata";
        return Err(Error::new(Kind::NotSupported, text).key("preallocation"));
    }
    let file = args
        .target("file")
        .ok_or_else(|| Error::new(Kind::Invalid, "an image is made in a node").key("file"))?;
    let there = file.edge.info().size_bytes;
    match file.resize(0).await {
        Err(error) if error.kind() == Kind::NotSupported && there >= given.size => {
            // A device has its size and its space; what it holds stays, as it does with QEMU.
            return Ok(Created::Overwritten);
        }
        done => done?,
    }
    file.resize(given.size).await?;
    if given.preallocation != Preallocation::Off && given.size > 0 {
        file.preallocate(0..given.size, given.preallocation).await?;
    }
    Ok(Created::Overwritten)
}
