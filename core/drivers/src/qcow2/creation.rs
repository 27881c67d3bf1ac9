//! Making an image as QMP asks for it, in nodes.
//!
//! | option | default | meaning |
//! |---|---|---|
//! | `file` | required | the node that the image is made in |
//! | `data-file` | none | a node that data is kept in; its file's name is noted in the image |
//! | `data-file-raw` | `false` | the data file reads as the disk does |
//! | `size` | required | the size of the disk in bytes |
//! | `version` | `"v3"` | `"v2"` or `"v3"` |
//! | `backing-file`, `backing-fmt` | none | name and format of the backing file, as the image notes them |
//! | `cluster-size` | 64 KiB | a power of two, 512 to 2 MiB |
//! | `refcount-bits` | 16 | a power of two, 1 to 64 |
//! | `extended-l2` | `false` | clusters have subclusters |
//! | `preallocation` | `"off"` | `"metadata"`, `"falloc"` or `"full"`: what has its space at once |
//! | `lazy-refcounts` | `false` | others may postpone refcounts |
//! | `compression-type` | `"zlib"` | or `"zstd"` |
//!
//! Source: QEMU qapi/block-core.json, `BlockdevCreateOptionsQcow2`.

use super::create::{CreateOptions, Preallocation, create_in, invalid, plan};
use super::header::Compression;
use driveline_graph::{CreateArgs, Error, Kind, Result, parse_options};
use serde::Deserialize;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Given {
    size: i64,
    #[serde(default)]
    version: Version,
    #[serde(default)]
    data_file_raw: bool,
    #[serde(default)]
    extended_l2: bool,
    backing_file: Option<String>,
    backing_fmt: Option<String>,
    cluster_size: Option<u64>,
    #[serde(default)]
    preallocation: Preallocation,
    #[serde(default)]
    lazy_refcounts: bool,
    refcount_bits: Option<u32>,
    #[serde(default)]
    compression_type: CompressionName,
    encrypt: Option<serde_json::Value>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Version {
    V2,
    #[default]
    V3,
}

/// `compression-type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum CompressionName {
    #[default]
    Zlib,
    Zstd,
}

impl From<CompressionName> for Compression {
    fn from(name: CompressionName) -> Self {
        match name {
            CompressionName::Zlib => Compression::Zlib,
            CompressionName::Zstd => Compression::Zstd,
        }
    }
}

/// Makes an image in its nodes.
pub(super) async fn create(args: CreateArgs<'_>) -> Result<()> {
    let given: Given = parse_options(args.options)?;
    if given.encrypt.is_some() {
        let text = "Encrypted images are not supported: neither AES nor LUKS";
        return Err(Error::new(Kind::NotSupported, text).key("encrypt"));
    }
    let file = args.target("file").ok_or_else(|| invalid("file", "an image is made in a node"))?;
    let data = args.target("data-file");
    let data_file = match data {
        None => None,
        Some(target) => {
            let path = target.filename();
            let name = path.as_deref().and_then(|path| path.to_str()).ok_or_else(|| {
                invalid("data-file", "the image has to name the file, and the node has no name to note")
            })?;
            Some(name.to_owned())
        }
    };
    let size_bytes = u64::try_from(given.size)
        .map_err(|_| invalid("size", "Image size must be a multiple of 512 bytes"))?;
    // An empty name is none, and its format with it.
    let backing_fmt = given.backing_fmt.unwrap_or_default();
    let backing_file = given.backing_file.filter(|name| !name.is_empty());
    if backing_file.is_none() && !backing_fmt.is_empty() {
        return Err(invalid("backing-fmt", "Backing format cannot be used without backing file"));
    }
    let options = CreateOptions {
        version: if given.version == Version::V2 { 2 } else { 3 },
        cluster_bytes: given.cluster_size.unwrap_or(64 << 10),
        refcount_bits: given.refcount_bits.unwrap_or(16),
        backing: backing_file.map(|name| (name, backing_fmt)),
        preallocation: given.preallocation,
        data_file,
        data_file_raw: given.data_file_raw,
        extended_l2: given.extended_l2,
        compression: given.compression_type.into(),
        lazy_refcounts: given.lazy_refcounts,
        ..CreateOptions::new(size_bytes)
    };
    // Nothing is touched before all is known to be right.
    plan(&options)?;
    empty(file).await?;
    if let Some(data) = data {
        empty(data).await?;
        data.resize(size_bytes).await?;
        if matches!(given.preallocation, Preallocation::Falloc | Preallocation::Full) {
            data.preallocate(0..size_bytes, given.preallocation).await?;
        }
    }
    create_in(&file.edge, &options, async |range| file.preallocate(range, given.preallocation).await).await
}

/// What is in a node goes. A device keeps its size, and what it holds is overwritten where that matters.
async fn empty(target: &driveline_graph::CreateTarget) -> Result<()> {
    match target.resize(0).await {
        Err(error) if error.kind() == Kind::NotSupported => Ok(()),
        done => done,
    }
}
