//! Making a new image.

use super::{
    header::{
        BACKING_NAME_BYTES_MAX, CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, Compression, Header, L1_BYTES_MAX,
        LAZY_REFCOUNTS, REFTABLE_BYTES_MAX, feature_names,
    },
    io::{File, Io},
    layout::{COPIED, Geometry},
    refcount,
};
use driveline_graph::{Error, Kind, Result};
use driveline_op::Edge;
use std::{ops::Range, os::unix::fs::FileExt, path::Path};

/// What of the image is allocated when it is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// L2 tables, and room for all data: later writes change no metadata. The file stays sparse.
    Metadata,
}

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
    let plan = Plan::new(options)?;
    let edges = [file.clone()];
    let (mut io, file) = (Io::Edges(&edges), File::new(0));
    for (offset, bytes) in plan.pieces() {
        file.write(&mut io, offset, &bytes).await?;
    }
    Ok(io.flush().await?)
}

/// Makes an image in a new file, which must not exist.
pub fn create_file(path: &Path, options: &CreateOptions) -> Result<()> {
    let plan = Plan::new(options)?;
    let doing = |error: std::io::Error| {
        Error::io(error.raw_os_error().unwrap_or(5), format_args!("creating {}", path.display()))
    };
    let file = std::fs::File::options().write(true).create_new(true).open(path).map_err(doing)?;
    for (offset, bytes) in plan.pieces() {
        file.write_all_at(&bytes, offset).map_err(doing)?;
    }
    file.sync_all().map_err(doing)
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
}

fn invalid(key: &str, text: impl std::fmt::Display) -> Error {
    Error::new(Kind::Invalid, text).key(key)
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
            return Err(invalid(
                "cluster-size",
                format_args!("{}; expected a power of two from 512 to 2097152", options.cluster_bytes),
            ));
        }
        if !options.refcount_bits.is_power_of_two() || options.refcount_bits > 64 {
            return Err(invalid(
                "refcount-bits",
                format_args!("{}; expected a power of two from 1 to 64", options.refcount_bits),
            ));
        }
        if options.version == 2 && options.refcount_bits != 16 {
            return Err(invalid("refcount-bits", "version 2 has refcounts of 16 bits only"));
        }
        if options.version == 2 && options.lazy_refcounts {
            return Err(invalid(
                "lazy-refcounts",
                "version 2 has no place to say that refcounts may be stale",
            ));
        }
        if options.backing.as_ref().is_some_and(|(name, _)| name.len() > BACKING_NAME_BYTES_MAX) {
            return Err(invalid(
                "backing-file",
                format_args!("the name is longer than {BACKING_NAME_BYTES_MAX} bytes"),
            ));
        }
        if !options.size_bytes.is_multiple_of(512) {
            return Err(invalid(
                "size",
                format_args!("{} bytes; expected a multiple of 512", options.size_bytes),
            ));
        }
        let refcount_order = options.refcount_bits.trailing_zeros();
        let geometry =
            Geometry { version: options.version, cluster_bits, refcount_order, extended_l2: false };
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
        let metadata = options.preallocation == Preallocation::Metadata;
        let l1_clusters = (l1_entries * 8).div_ceil(cluster_bytes);
        let l2_clusters = if metadata { l1_entries } else { 0 };
        let data_clusters = if metadata { options.size_bytes.div_ceil(cluster_bytes) } else { 0 };
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
        let (l2, data) = (area(l2_clusters), area(data_clusters));
        let (backing, backing_format) = options.backing.clone().unzip();
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
            incompatible: 0,
            compatible: if options.lazy_refcounts { LAZY_REFCOUNTS } else { 0 },
            autoclear: 0,
            refcount_order,
            compression: Compression::Zlib,
            further: if options.version >= 3 { vec![0; 8] } else { Vec::new() },
            extensions: vec![feature_names()],
            backing,
            backing_format: backing_format.filter(|format| !format.is_empty()),
        };
        if options.version < 3 {
            header.extensions.clear();
        }
        let header = header.encode().or_else(|_| {
            // Names are a service; in small clusters there is no room for them.
            header.extensions.clear();
            header.encode()
        })?;
        Ok(Self { geometry, header, reftable, blocks, l1, l1_entries, l2, data })
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
            for i in 0..self.data.end.saturating_sub(first).min(entries) {
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
            table(place, &|i| entry(&self.data, first + i, COPIED))
        });
        // The file reaches as far as what is allocated.
        let end = (!self.data.is_empty()).then(|| (self.data.end * cluster_bytes - 512, vec![0; 512]));
        let mut header = self.header.clone();
        header.resize(cluster_bytes as usize, 0);
        reftable.chain(blocks).chain(l1).chain(l2).chain(end).chain([(0, header)])
    }
}
