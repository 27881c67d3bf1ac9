//! Making a new image.

use super::{
    header::{
        AUTOCLEAR_RAW_EXTERNAL, BACKING_NAME_BYTES_MAX, CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, Compression,
        EXT_DATA_FILE, EXT_FEATURES, EXTENDED_L2_CLUSTER_BITS_MIN, Extension, Header, L1_BYTES_MAX,
        LAZY_REFCOUNTS, REFTABLE_BYTES_MAX, feature_names, incompatible,
    },
    io::{File, Io},
    layout::{COPIED, Geometry},
    refcount,
};
pub use driveline_graph::Preallocation;
use driveline_graph::{Error, Kind, Result};
use driveline_op::Edge;
use std::{ops::Range, os::unix::fs::FileExt, path::Path};

/// What a new image is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// The size of the disk, a multiple of 512 (QEMU cuts off the rest).
    pub size_bytes: u64,
    /// 2 or 3.
    pub version: u32,
    /// A power of two, 512 to 2 MiB.
    pub cluster_bytes: u64,
    /// A power of two, 1 to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// Name and format of the backing file, as they are written into the header.
    pub backing: Option<(String, String)>,
    /// What is allocated at once.
    pub preallocation: Preallocation,
    /// The name of a file that data is kept in, relative to the image; version 3 only. [`create_file`] makes it.
    pub data_file: Option<String>,
    /// The data file reads as the disk does, whoever looks at it. Implies [`Preallocation::Metadata`].
    pub data_file_raw: bool,
    /// How clusters are compressed that are written so: see [`OpenNode::write_compressed`]. Zstandard is of version 3.
    ///
    /// [`OpenNode::write_compressed`]: driveline_graph::OpenNode::write_compressed
    pub compression: Compression,
    /// Clusters have 32 subclusters, which are allocated by themselves; version 3, and clusters of 16 KiB at least.
    pub extended_l2: bool,
    /// Others may postpone refcounts; version 3 only. We do not: see the module.
    pub lazy_refcounts: bool,
}

impl CreateOptions {
    /// An empty image of version 3 with clusters of 64 KiB.
    pub fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            version: 3,
            cluster_bytes: 64 << 10,
            refcount_bits: 16,
            backing: None,
            preallocation: Preallocation::Off,
            data_file: None,
            data_file_raw: false,
            extended_l2: false,
            compression: Compression::Zlib,
            lazy_refcounts: false,
        }
    }
}

/// Makes an image in a child that is empty. What was there is lost.
///
/// ```
/// use driveline_drivers::{MemoryDriver, conformance::open_node, qcow2::{CreateOptions, Qcow2Driver, create}};
///
/// futures::executor::block_on(async {
///     let memory = open_node(&MemoryDriver::default(), serde_json::json!({ "size": "1MiB" }), vec![]).await.unwrap();
///     create(&memory.edge, &CreateOptions::new(10 << 30)).await.unwrap();
///     let image = open_node(&Qcow2Driver::new(), serde_json::json!({}), vec![memory]).await.unwrap();
///     assert_eq!(image.edge.info().size_bytes, 10 << 30);
/// });
/// ```
pub async fn create(file: &Edge, options: &CreateOptions) -> Result<()> {
    create_in(file, options, async |range| {
        let edges = std::slice::from_ref(file);
        Ok(File::empty().zero(&mut Io::Edges(edges), range).await?)
    })
    .await
}

/// The same, where `preallocate` gives a range of the file its space, as zeroes.
pub(super) async fn create_in(
    file: &Edge,
    options: &CreateOptions,
    preallocate: impl AsyncFnOnce(Range<u64>) -> Result<()>,
) -> Result<()> {
    let plan = Plan::new(options)?;
    let edges = [file.clone()];
    let (mut io, file) = (Io::Edges(&edges), File::empty());
    // A device is as long as it is, and what it holds would show.
    let end = edges[0].info().size_bytes;
    let there = plan.data_bytes();
    if there.start < end && there.start < there.end {
        let seen = there.start..there.end.min(end);
        let old = File::of(&io, file.child);
        old.zero_fast(&mut io, seen, driveline_op::flag::MAY_UNMAP, false).await?;
    }
    if matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full) && !there.is_empty() {
        preallocate(there).await?;
    }
    // The header comes last, so that before it the file is no image.
    for (offset, bytes) in plan.pieces() {
        file.write(&mut io, offset, &bytes).await?;
    }
    Ok(io.flush().await?)
}

/// Would an image be made with these options? Says what is wrong.
pub(super) fn plan(options: &CreateOptions) -> Result<()> {
    Plan::new(options).map(drop)
}

/// Makes an image in a new file, and its data file. Neither may exist.
pub fn create_file(path: &Path, options: &CreateOptions) -> Result<()> {
    let plan = Plan::new(options)?;
    let doing = |error: std::io::Error| {
        Error::io(error.raw_os_error().unwrap_or(5), format_args!("creating {}", path.display()))
    };
    let new = |path: &Path| std::fs::File::options().write(true).create_new(true).open(path);
    let file = new(path).map_err(doing)?;
    if let Some(name) = &options.data_file {
        let data = path.parent().unwrap_or(Path::new("")).join(name);
        let made = new(&data).and_then(|file| {
            file.set_len(options.size_bytes)?;
            give_space(&file, 0..options.size_bytes, options.preallocation)?;
            file.sync_all()
        });
        if let Err(error) = made {
            // It is empty, and ours.
            let _ = std::fs::remove_file(path);
            let errno = error.raw_os_error().unwrap_or(5);
            return Err(Error::io(errno, format_args!("creating {}", data.display())).key("data-file"));
        }
    }
    give_space(&file, plan.data_bytes(), options.preallocation).map_err(doing)?;
    for (offset, bytes) in plan.pieces() {
        file.write_all_at(&bytes, offset).map_err(doing)?;
    }
    file.sync_all().map_err(doing)
}

/// Gives a range of a new file its space.
fn give_space(file: &std::fs::File, range: Range<u64>, how: Preallocation) -> std::io::Result<()> {
    if range.is_empty() || matches!(how, Preallocation::Off | Preallocation::Metadata) {
        return Ok(());
    }
    if how == Preallocation::Falloc {
        let none = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(file, none, range.start, range.end - range.start) {
            // The file system cannot; what is written has its space.
            Err(rustix::io::Errno::OPNOTSUPP) => {}
            done => return Ok(done?),
        }
    }
    let zeroes = vec![0; 1 << 20];
    let mut at = range.start;
    while at < range.end {
        let length = (range.end - at).min(zeroes.len() as u64) as usize;
        file.write_all_at(&zeroes[..length], at)?;
        at += length as u64;
    }
    Ok(())
}

/// Where everything of a new image is, in clusters: header, refcount table, refcount blocks, L1 table, L2 tables, data.
struct Plan {
    geometry: Geometry,
    header: Vec<u8>,
    reftable: Range<u64>,
    blocks: Range<u64>,
    l1: Range<u64>,
    l1_entries: u64,
    l2: Range<u64>,
    data: Range<u64>,
    /// Clusters that are used, from the beginning.
    counted: u64,
    /// The data file reads as the disk does.
    raw: bool,
}

pub(super) fn invalid(key: &str, text: impl std::fmt::Display) -> Error {
    Error::new(Kind::Invalid, text).key(key)
}

/// What only version 3 has.
fn needs_v3(key: &str, what: &str, more: &str) -> Error {
    let level = format_args!("compatibility level 1.1 {more} above (use version=v3 or greater)");
    invalid(key, format_args!("{what} {level}"))
}

impl Plan {
    fn new(options: &CreateOptions) -> Result<Self> {
        if !(2..=3).contains(&options.version) {
            return Err(invalid("version", format_args!("{}; expected 2 or 3", options.version)));
        }
        let cluster_bits = options.cluster_bytes.trailing_zeros();
        if !options.cluster_bytes.is_power_of_two()
            || !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&cluster_bits)
        {
            return Err(invalid("cluster-size", "Cluster size must be a power of two between 512 and 2048k"));
        }
        if !options.refcount_bits.is_power_of_two() || options.refcount_bits > 64 {
            return Err(invalid(
                "refcount-bits",
                "Refcount width must be a power of two and may not exceed 64 bits",
            ));
        }
        if options.version == 2 && options.refcount_bits != 16 {
            return Err(needs_v3("refcount-bits", "Different refcount widths than 16 bits require", "or"));
        }
        if options.data_file_raw && options.data_file.is_none() {
            return Err(invalid("data-file-raw", "data-file-raw requires data-file"));
        }
        if options.data_file_raw && options.backing.is_some() {
            let text = "Backing file and data-file-raw cannot be used at the same time";
            return Err(invalid("data-file-raw", text));
        }
        if options.version == 2 && options.data_file.is_some() {
            return Err(needs_v3("data-file", "External data files are only supported with", "and"));
        }
        if options.version == 2 && options.compression != Compression::Zlib {
            let what = "Non-zlib compression type is only supported with";
            return Err(needs_v3("compression-type", what, "and"));
        }
        if options.version == 2 && options.extended_l2 {
            return Err(needs_v3("extended-l2", "Extended L2 entries are only supported with", "and"));
        }
        if options.extended_l2 && cluster_bits < EXTENDED_L2_CLUSTER_BITS_MIN {
            return Err(invalid(
                "extended-l2",
                format_args!(
                    "Extended L2 entries are only supported with cluster sizes of at least {} bytes",
                    1 << EXTENDED_L2_CLUSTER_BITS_MIN
                ),
            ));
        }
        if options.version == 2 && options.lazy_refcounts {
            return Err(needs_v3("lazy-refcounts", "Lazy refcounts only supported with", "and"));
        }
        // Without subclusters, clusters that are allocated would hide what is in the backing file.
        if options.preallocation != Preallocation::Off && options.backing.is_some() && !options.extended_l2 {
            let text =
                "Backing file and preallocation can only be used at the same time if extended_l2 is on";
            return Err(invalid("preallocation", text));
        }
        if options.backing.as_ref().is_some_and(|(name, _)| name.len() > BACKING_NAME_BYTES_MAX) {
            return Err(invalid(
                "backing-file",
                format_args!("the name is longer than {BACKING_NAME_BYTES_MAX} bytes"),
            ));
        }
        if !options.size_bytes.is_multiple_of(512) {
            return Err(invalid("size", "Image size must be a multiple of 512 bytes"));
        }
        let refcount_order = options.refcount_bits.trailing_zeros();
        let geometry = Geometry {
            version: options.version,
            cluster_bits,
            refcount_order,
            extended_l2: options.extended_l2,
            data_file: options.data_file.is_some(),
        };
        let cluster_bytes = geometry.cluster_bytes();
        let l1_entries = geometry.l1_entries(options.size_bytes);
        if options.size_bytes > i64::MAX as u64 || l1_entries * 8 > L1_BYTES_MAX {
            let most = (L1_BYTES_MAX / 8).saturating_mul(1 << geometry.l1_shift()).min(i64::MAX as u64);
            return Err(invalid(
                "size",
                format_args!(
                    "{} bytes; with clusters of {cluster_bytes} the limit is {most}",
                    options.size_bytes
                ),
            ));
        }
        let metadata = options.preallocation != Preallocation::Off || options.data_file_raw;
        let l1_clusters = (l1_entries * 8).div_ceil(cluster_bytes);
        let l2_clusters = if metadata { l1_entries } else { 0 };
        let data_clusters =
            if metadata && !geometry.data_file { options.size_bytes.div_ceil(cluster_bytes) } else { 0 };
        // Tables and blocks count themselves, too: more of them until all is counted.
        let (mut reftable, mut blocks) = (1, 1);
        loop {
            let clusters = 1 + reftable + blocks + l1_clusters + l2_clusters + data_clusters;
            let blocks_needed = clusters.div_ceil(geometry.block_entries());
            let reftable_needed = (blocks_needed * 8).div_ceil(cluster_bytes);
            if reftable_needed * cluster_bytes > REFTABLE_BYTES_MAX {
                return Err(invalid(
                    "preallocation",
                    "so much cannot be counted with clusters and refcounts of that size",
                ));
            }
            if blocks_needed <= blocks && reftable_needed <= reftable {
                break;
            }
            (blocks, reftable) = (blocks.max(blocks_needed), reftable.max(reftable_needed));
        }
        let mut next = 1;
        let mut area = |clusters: u64| {
            next += clusters;
            next - clusters..next
        };
        let (reftable, blocks, l1) = (area(reftable), area(blocks), area(l1_clusters));
        let l2 = area(l2_clusters);
        let counted = l2.end;
        // Where the disk has it, in another file; or here.
        let data = if geometry.data_file && metadata {
            0..options.size_bytes.div_ceil(cluster_bytes)
        } else {
            area(data_clusters)
        };
        let counted = if geometry.data_file { counted } else { data.end };
        let (backing, backing_format) = options.backing.clone().unzip();
        let zstd = options.compression == Compression::Zstd;
        let mut header = Header {
            version: options.version,
            cluster_bits,
            size_bytes: options.size_bytes,
            l1_entries: l1_entries as u32,
            l1_offset: l1.start * cluster_bytes,
            reftable_offset: reftable.start * cluster_bytes,
            reftable_clusters: (reftable.end - reftable.start) as u32,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: [
                (geometry.data_file, incompatible::EXTERNAL_DATA),
                (zstd, incompatible::COMPRESSION),
                (geometry.extended_l2, incompatible::EXTENDED_L2),
            ]
            .into_iter()
            .filter(|(is, _)| *is)
            .fold(0, |bits, (_, bit)| bits | bit),
            compatible: if options.lazy_refcounts { LAZY_REFCOUNTS } else { 0 },
            autoclear: if options.data_file_raw { AUTOCLEAR_RAW_EXTERNAL } else { 0 },
            refcount_order,
            compression: options.compression,
            further: if options.version >= 3 {
                vec![u8::from(zstd), 0, 0, 0, 0, 0, 0, 0]
            } else {
                Vec::new()
            },
            extensions: vec![feature_names()],
            backing,
            backing_format: backing_format.filter(|format| !format.is_empty()),
        };
        if options.version < 3 {
            header.extensions.clear();
        }
        if let Some(name) = &options.data_file {
            header.extensions.insert(0, Extension { kind: EXT_DATA_FILE, data: name.clone().into() });
        }
        let header = header.encode().or_else(|_| {
            // Names are a service; in small clusters there is no room for them.
            header.extensions.retain(|extension| extension.kind != EXT_FEATURES);
            header.encode()
        })?;
        let raw = options.data_file_raw;
        Ok(Self { geometry, header, reftable, blocks, l1, l1_entries, l2, data, counted, raw })
    }

    /// Where data has its place in the image's own file.
    fn data_bytes(&self) -> Range<u64> {
        let bytes = self.geometry.cluster_bytes();
        if self.geometry.data_file { 0..0 } else { self.data.start * bytes..self.data.end * bytes }
    }

    /// What is written where; the header last, so that before it the file is no image.
    fn pieces(&self) -> impl Iterator<Item = (u64, Vec<u8>)> + '_ {
        let cluster_bytes = self.geometry.cluster_bytes();
        let words = cluster_bytes / 8;
        let table = move |place: u64, word: &dyn Fn(u64) -> u64| {
            let bytes = (0..words).flat_map(|i| word(i).to_be_bytes()).collect::<Vec<u8>>();
            (place * cluster_bytes, bytes)
        };
        // The entry with a number, if there are so many, points to the cluster with that number in an area.
        let entry = move |area: &Range<u64>, number: u64, flags: u64| {
            if number < area.end - area.start { ((area.start + number) * cluster_bytes) | flags } else { 0 }
        };
        let reftable = self.reftable.clone().map(move |place| {
            let first = (place - self.reftable.start) * words;
            table(place, &|i| entry(&self.blocks, first + i, 0))
        });
        let blocks = self.blocks.clone().map(move |place| {
            let entries = self.geometry.block_entries();
            let first = (place - self.blocks.start) * entries;
            let mut block = vec![0; cluster_bytes as usize];
            for i in 0..self.counted.saturating_sub(first).min(entries) {
                refcount::set(&mut block, self.geometry.refcount_order, i, 1);
            }
            (place * cluster_bytes, block)
        });
        let l1 = self.l1.clone().map(move |place| {
            let first = (place - self.l1.start) * words;
            table(place, &|i| {
                if first + i < self.l1_entries { entry(&self.l2, first + i, COPIED) } else { 0 }
            })
        });
        let l2 = self.l2.clone().map(move |place| {
            let first = (place - self.l2.start) * words;
            let step = self.geometry.entry_words() as u64;
            table(place, &|i| match entry(&self.data, (first + i) / step, COPIED) {
                // Its subclusters are where the data file has them; else they have a place and are not there yet, so that a
                // backing file is still seen. Source: QEMU docs/interop/qcow2.txt, "Extended L2 Entries".
                1.. if i % step == 1 && self.raw => u64::from(u32::MAX),
                1.. if i % step == 1 => 0,
                word => word,
            })
        });
        // The file reaches as far as what is allocated.
        let end = (!self.data.is_empty() && !self.geometry.data_file)
            .then(|| (self.data.end * cluster_bytes - 512, vec![0; 512]));
        let mut header = self.header.clone();
        header.resize(cluster_bytes as usize, 0);
        reftable.chain(blocks).chain(l1).chain(l2).chain(end).chain([(0, header)])
    }
}
