//! Checking an image: is each host cluster counted as often as it is used, and does every entry make sense?
//!
//! What is used follows from the header: the L1 tables (the active one, and those of snapshots), their L2 tables, and
//! the data they point to; the snapshot table; persistent bitmaps, unless somebody wrote who does not know them; and the
//! refcounts themselves. A cluster that is counted less often than it is used is a *corruption*: it may be written over.
//! One that is counted more often is a *leak*: it is lost space and nothing else.
//!
//! # Repair
//!
//! Leaks are taken back in place. Corruptions are repaired in this order, each step durable before the next:
//!
//! 1. entries that make no sense: reserved bits are cleared; what points past the end of the file or beside
//!    clusters becomes zeroes (version 2: unallocated), because there was nothing that could be read; a table that
//!    is also something else is copied, or given up if it is no table; what is used more often than can be counted
//!    is copied;
//! 2. the refcounts: in place, or, if blocks are missing or damaged, a new table with new blocks in free clusters,
//!    which the header then points to;
//! 3. the flags that say which clusters may be written in place;
//! 4. the bits in the header that say that the image is dirty or corrupt.
//!
//! Data that is used twice stays used twice: each user gets a copy when he writes.
//!
//! Source: QEMU docs/interop/qcow2.txt; docs/tools/qemu-img.rst, `check`.

mod bitmaps;
mod compare;
mod counts;
mod fix;
mod rebuild;
mod walk;

pub(super) use self::counts::{Counts, Use};
use super::{
    header::{Header, incompatible},
    io::{FILE, File, Io},
    layout::{Geometry, decode_words, encode_words},
    open::read_header,
    snapshot::{self, Snapshot},
};
use driveline_graph::{Error, Kind, Result};
use driveline_op::Edge;

/// Findings that are kept as text; more are counted only.
const FINDINGS_MAX: usize = 1000;
/// Rounds of repair after which it is given up: each one removes contradictions, and may bring others to light.
const ROUNDS_MAX: usize = 8;

/// What a check repairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: the image is not written to.
    #[default]
    Nothing,
    /// Leaks.
    Leaks,
    /// Leaks and corruptions.
    All,
}

/// What a check says in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is wrong.
    Clean,
    /// Something could not be checked.
    Incomplete,
    /// Something is wrong.
    Corrupt,
    /// Space is lost.
    Leaks,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// What is wrong and was not repaired.
    pub corruptions: u64,
    /// Clusters that are lost and were not taken back.
    pub leaks: u64,
    /// What could not be checked, in clusters.
    pub check_errors: u64,
    /// What was wrong and is not any more.
    pub corruptions_fixed: u64,
    /// Clusters that were lost and are not any more.
    pub leaks_fixed: u64,
    /// The clusters of the disk.
    pub total_clusters: u64,
    /// Those that are allocated.
    pub allocated_clusters: u64,
    /// Those of them that are not where the one before ends.
    pub fragmented_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Where the last used cluster ends, in bytes.
    pub image_end_bytes: u64,
    /// What was found, a sentence each, as far as it is not too much.
    pub findings: Vec<String>,
    /// Findings that are left out.
    pub findings_left_out: u64,
}

impl CheckReport {
    /// What it says in the end.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self { check_errors: 1.., .. } => Verdict::Incomplete,
            Self { corruptions: 1.., .. } => Verdict::Corrupt,
            Self { leaks: 1.., .. } => Verdict::Leaks,
            _ => Verdict::Clean,
        }
    }
}

/// Checks the image in a file that nobody else uses, and repairs it as far as asked for. An external data file and the
/// backing file are not looked at.
///
/// After a repair the image is checked again: the report is that of the second check, with what was repaired.
/// The size of the file is taken from the edge.
///
/// Errors: [`Kind::Invalid`] if it is no qcow2 image; what makes the header unusable; the file's own.
///
/// ```
/// use driveline_drivers::{MemoryDriver, conformance::open_node};
/// use driveline_drivers::qcow2::{CreateOptions, Repair, Verdict, check_image, create};
///
/// futures::executor::block_on(async {
///     let memory = open_node(&MemoryDriver::default(), serde_json::json!({ "size": "1MiB" }), vec![]).await.unwrap();
///     create(&memory.edge, &CreateOptions::new(10 << 30)).await.unwrap();
///     let report = check_image(&memory.edge, Repair::Nothing).await.unwrap();
///     assert_eq!(report.verdict(), Verdict::Clean);
/// });
/// ```
pub async fn check_image(file: &Edge, repair: Repair) -> Result<CheckReport> {
    let edges = [file.clone()];
    let mut io = Io::Edges(&edges);
    let file = File::of(&io, FILE);
    check(&mut io, &file, repair).await
}

/// The same for an image that is being opened.
pub(crate) async fn check(io: &mut Io<'_, '_>, file: &File, repair: Repair) -> Result<CheckReport> {
    let mut first = Checker::new(io, file, repair).await?;
    first.run().await?;
    let before = first.report;
    if repair == Repair::Nothing {
        return Ok(before);
    }
    let mut again = Checker::new(io, file, Repair::Nothing).await?;
    again.run().await?;
    if repair == Repair::All && matches!(again.report.verdict(), Verdict::Clean | Verdict::Leaks) {
        again.mark_good().await?;
    }
    let mut report = again.report;
    report.corruptions_fixed = before.corruptions_fixed;
    report.leaks_fixed = before.leaks_fixed;
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        report.findings.splice(0..0, before.findings);
        report.findings_left_out += before.findings_left_out;
    }
    Ok(report)
}

/// A check under way.
struct Checker<'c, 'a, 'n> {
    io: &'c mut Io<'a, 'n>,
    file: &'c File,
    header: Header,
    geometry: Geometry,
    snapshots: Vec<Snapshot>,
    reftable: Vec<u64>,
    repair: Repair,
    report: CheckReport,
    counts: Counts,
    /// Entries that make no sense were found.
    nonsense: bool,
    /// The refcounts cannot be repaired in place.
    rebuild: bool,
    /// The cluster after the last one that is counted or used.
    image_end: u64,
    /// What is found was found before.
    quiet: bool,
    /// Clusters before this one were taken for a repair.
    fresh: u64,
}

impl<'c, 'a, 'n> Checker<'c, 'a, 'n> {
    async fn new(io: &'c mut Io<'a, 'n>, file: &'c File, repair: Repair) -> Result<Self> {
        let header = read_header(io).await?;
        let geometry = header.geometry();
        let snapshots = snapshot::read(io, file, &header).await?;
        let mut checker = Self {
            io,
            file,
            geometry,
            snapshots,
            reftable: Vec::new(),
            repair,
            report: CheckReport::default(),
            counts: Counts::default(),
            nonsense: false,
            rebuild: false,
            image_end: 0,
            quiet: false,
            fresh: 0,
            header,
        };
        let bytes = u64::from(checker.header.reftable_clusters) * geometry.cluster_bytes();
        checker.reftable = checker.words(checker.header.reftable_offset, bytes).await?;
        Ok(checker)
    }

    async fn run(&mut self) -> Result<()> {
        self.report.total_clusters = self.header.size_bytes.div_ceil(self.geometry.cluster_bytes());
        self.walk().await?;
        for _ in 0..ROUNDS_MAX {
            if self.repair != Repair::All || !self.nonsense && !self.counts.any_contradictory() {
                break;
            }
            let found = self.report.corruptions;
            if self.header.autoclear & super::header::AUTOCLEAR_WITNESS != 0 {
                // What led nowhere will read as zeroes, and whoever keeps bitmaps beside the image does not hear of that.
                self.header.autoclear &= !super::header::AUTOCLEAR_WITNESS;
                self.write_header().await?;
            }
            self.fix().await?;
            self.io.flush().await?;
            self.report.corruptions = 0;
            self.quiet = true;
            self.walk().await?;
            self.report.corruptions_fixed += found.saturating_sub(self.report.corruptions);
        }
        self.quiet = false;
        let entries = self.report.corruptions;
        self.compare(false).await?;
        let found = (self.report.corruptions - entries, self.report.leaks);
        match self.repair {
            Repair::Nothing => {}
            Repair::Leaks if self.rebuild => {
                self.note(|| {
                    "the refcounts must be made anew, which a repair of leaks does not do".to_owned()
                });
            }
            repair => {
                self.quiet = true;
                (self.report.corruptions, self.report.leaks) = (entries, 0);
                if self.rebuild && repair == Repair::All {
                    self.rebuild().await?;
                    self.report.check_errors = 0;
                } else {
                    self.compare(true).await?;
                }
                self.report.corruptions_fixed += found.0 - (self.report.corruptions - entries);
                self.report.leaks_fixed += found.1 - self.report.leaks;
                self.quiet = false;
            }
        }
        self.check_copied().await?;
        if self.repair != Repair::Nothing {
            self.io.flush().await?;
        }
        self.report.image_end_bytes = self.image_end * self.geometry.cluster_bytes();
        Ok(())
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        if self.quiet {
            return;
        }
        if self.report.findings.len() < FINDINGS_MAX {
            self.report.findings.push(text());
        } else {
            self.report.findings_left_out += 1;
        }
    }

    fn corruption(&mut self, text: impl FnOnce() -> String) {
        self.report.corruptions += 1;
        self.note(text);
    }

    async fn words(&mut self, offset: u64, bytes: u64) -> Result<Vec<u64>> {
        let mut buffer = vec![0; bytes as usize];
        self.file.read(self.io, offset, &mut buffer).await?;
        let mut words = vec![0; buffer.len() / 8];
        decode_words(&buffer, &mut words);
        Ok(words)
    }

    async fn write_words(&mut self, offset: u64, words: &[u64]) -> Result<()> {
        let mut bytes = vec![0; words.len() * 8];
        encode_words(words, &mut bytes);
        Ok(self.file.write(self.io, offset, &bytes).await?)
    }

    async fn write_header(&mut self) -> Result<()> {
        // Whoever understands an unknown feature must be able to see that it was not kept up.
        self.header.autoclear &= super::header::AUTOCLEAR_KNOWN;
        let bytes = self.header.encode()?;
        self.io.flush().await?;
        self.file.write(self.io, 0, &bytes).await?;
        Ok(self.io.flush().await?)
    }

    /// Takes the marks of an image that is not in order away.
    async fn mark_good(&mut self) -> Result<()> {
        let marks = incompatible::DIRTY | incompatible::CORRUPT;
        if self.header.incompatible & marks != 0 {
            self.header.incompatible &= !marks;
            self.write_header().await?;
        }
        Ok(())
    }

    /// Clusters that the file has, the last one perhaps in part.
    fn file_clusters(&self) -> u64 {
        self.file.end().div_ceil(self.geometry.cluster_bytes())
    }

    /// A cluster that nothing uses or used, behind all others.
    fn fresh_clusters(&mut self, count: u64) -> Result<u64> {
        let first = self.fresh.max(self.counts.end());
        self.fresh = first + count;
        if self.fresh << self.geometry.cluster_bits > 1 << 56 {
            return Err(Error::new(
                Kind::NoSpace,
                "there is no room for a repair before the image's limit of 2^56 bytes",
            ));
        }
        Ok(first * self.geometry.cluster_bytes())
    }
}
