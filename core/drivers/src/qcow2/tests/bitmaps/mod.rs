//! Persistent bitmaps: against QEMU, against crashes, failures and damage.

mod beside;
mod crash;
mod damage;
mod flags;
mod qemu;
mod witness;

use super::harness::*;
use crate::qcow2::{CreateOptions, create};
use driveline_bitmap::{Bits, Granularity};
use driveline_graph::{BitmapToStore, Error, Result, StoredBitmap, StoredBitmaps};
use futures::executor::block_on;
use rand::{Rng, rngs::StdRng};
use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

/// A bitmap of a test, by value.
#[derive(Clone, Debug, PartialEq)]
struct Kept {
    name: String,
    recording: bool,
    bits: Bits,
}

fn granularity(bytes: u64) -> Granularity {
    Granularity::new(bytes).unwrap()
}

fn kept(name: &str, bits: Bits) -> Kept {
    Kept { name: name.to_owned(), recording: true, bits }
}

impl Kept {
    fn to_store(&self) -> BitmapToStore<'_> {
        BitmapToStore {
            name: &self.name,
            granularity: self.bits.granularity(),
            recording: self.recording,
            in_use: false,
            bits: Some(&self.bits),
        }
    }
}

impl World {
    fn store(&self, bitmaps: &[Kept]) -> Result<()> {
        let bitmaps: Vec<_> = bitmaps.iter().map(Kept::to_store).collect();
        self.store_these(&bitmaps)
    }

    fn store_these(&self, bitmaps: &[BitmapToStore<'_>]) -> Result<()> {
        block_on(self.node.store_bitmaps(&self.children, bitmaps))
    }

    fn list(&self) -> StoredBitmaps {
        block_on(self.node.stored_bitmaps(&self.children)).unwrap()
    }

    fn bitmap(&self, name: &str) -> StoredBitmap {
        let found = self.list().bitmaps.into_iter().find(|bitmap| bitmap.name == name);
        found.unwrap_or_else(|| panic!("no bitmap '{name}': {:?}", self.list()))
    }

    fn load(&self, name: &str) -> Result<Bits> {
        block_on(self.node.load_bitmap(&self.children, name))
    }

    fn set_in_use(&self, names: &[&str], in_use: bool) -> Result<()> {
        block_on(self.node.set_bitmaps_in_use(&self.children, names, in_use))
    }

    /// All bitmaps that can be used, with what they hold.
    fn usable(&self) -> Vec<Kept> {
        let usable = self.list().bitmaps.into_iter().filter(|bitmap| bitmap.inconsistent.is_none());
        let loaded = usable.map(|bitmap| Kept {
            bits: self.load(&bitmap.name).unwrap(),
            recording: bitmap.recording,
            name: bitmap.name,
        });
        loaded.collect()
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let answer = block_on(self.ask(driveline_op::op::WRITE, offset, 0, 0, data.into()));
        answer.result.unwrap();
    }
}

/// An image in memory.
fn image(size_bytes: u64, cluster_bytes: u64) -> Vec<u8> {
    let leaf = leaf(Vec::new());
    let options = CreateOptions { cluster_bytes, ..CreateOptions::new(size_bytes) };
    block_on(create(&file_child(&leaf, None).edge, &options)).unwrap();
    leaf.driver.data.lock().clone()
}

/// An image with these bitmaps, as it is after it was closed.
fn image_with(size_bytes: u64, cluster_bytes: u64, bitmaps: &[Kept]) -> Vec<u8> {
    let world = World::open(image(size_bytes, cluster_bytes), None, false).unwrap();
    world.store(bitmaps).unwrap();
    world.close().unwrap();
    world.bytes()
}

/// Bits with some dirty stretches, most of them short.
fn random_bits(random: &mut StdRng, granularity: Granularity, size_bytes: u64) -> Bits {
    let bits = Bits::new(granularity, size_bytes);
    for _ in 0..random.random_range(0..60) {
        let at = random.random_range(0..size_bytes);
        let length_max = granularity.bytes() * [1, 5, 400][random.random_range(0..3)];
        bits.mark(at..at + random.random_range(1..=length_max));
    }
    bits
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// `qemu-img check` finds nothing at all.
fn check(path: &Path) {
    run("qemu-img", &["check", "-f", "qcow2", text(path)]);
}

/// Reads an image of the host.
fn open_file(path: &Path, read_only: bool) -> World {
    World::open(fs::read(path).unwrap(), None, read_only).unwrap()
}

/// Name, granularity and flags of the bitmaps that `qemu-img info` shows.
fn info(path: &Path) -> Vec<(String, u64, Vec<String>)> {
    let info = run("qemu-img", &["info", "--output=json", text(path)]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let bitmaps = &info["format-specific"]["data"]["bitmaps"];
    let bitmaps = bitmaps.as_array().cloned().unwrap_or_default();
    let strings = |flags: &serde_json::Value| {
        flags.as_array().unwrap().iter().map(|flag| flag.as_str().unwrap().to_owned()).collect()
    };
    let one = |bitmap: &serde_json::Value| {
        let name = bitmap["name"].as_str().unwrap().to_owned();
        (name, bitmap["granularity"].as_u64().unwrap(), strings(&bitmap["flags"]))
    };
    bitmaps.iter().map(one).collect()
}

/// What QEMU finds in bitmaps when it opens the image read-only: the SHA-256 of each one's words.
fn sums_of_qemu(path: &Path, names: &[&str]) -> Vec<String> {
    storage_daemon(path, true, names)
}

fn storage_daemon(path: &Path, read_only: bool, names: &[&str]) -> Vec<String> {
    let read_only = if read_only { "on" } else { "off" };
    let (file, image) =
        (format!("driver=file,node-name=f,filename={}", text(path)), "driver=qcow2,node-name=d,file=f");
    let mut child = Command::new("qemu-storage-daemon")
        .args(["--chardev", "stdio,id=m", "--monitor", "m"])
        .args(["--blockdev", &format!("{file},read-only={read_only}")])
        .args(["--blockdev", &format!("{image},read-only={read_only}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    writeln!(input, r#"{{"execute":"qmp_capabilities"}}"#).unwrap();
    for name in names {
        let arguments = serde_json::json!({ "node": "d", "name": name });
        let command =
            serde_json::json!({ "execute": "x-debug-block-dirty-bitmap-sha256", "arguments": arguments });
        writeln!(input, "{command}").unwrap();
    }
    writeln!(input, r#"{{"execute":"quit"}}"#).unwrap();
    let out = child.wait_with_output().unwrap();
    let out = String::from_utf8(out.stdout).unwrap();
    let answers = out.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let sums: Vec<_> =
        answers.filter_map(|answer| Some(answer["return"]["sha256"].as_str()?.to_owned())).collect();
    assert_eq!(sums.len(), names.len(), "{out}");
    sums
}

/// The same of ours. QEMU hashes little-endian words of 64 granules, one at least.
///
/// Source: QEMU util/hbitmap.c, `hbitmap_sha256`.
fn sum(bits: &Bits) -> String {
    let mut bytes = vec![0; (bits.granules().div_ceil(64).max(1) * 8) as usize];
    let shift = bits.granularity().shift();
    for range in bits.iter_dirty() {
        for granule in range.start >> shift..range.end.div_ceil(1 << shift) {
            bytes[(granule / 8) as usize] |= 1 << (granule % 8);
        }
    }
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let out = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    out.split(' ').next().unwrap().to_owned()
}

fn have_qemu() -> bool {
    have("qemu-img") && have("qemu-io") && have("qemu-storage-daemon") && have("sha256sum")
}

#[track_caller]
fn says(result: std::result::Result<impl std::fmt::Debug, Error>, word: &str) {
    let error = result.expect_err(word);
    assert!(error.to_string().contains(word), "'{error}' lacks '{word}'");
}
