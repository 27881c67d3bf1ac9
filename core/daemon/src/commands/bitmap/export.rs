//! The contents of a bitmap, for other programs.

use super::{Result, shelf::prefixed, show};
use crate::cli::ExportFormat;
use driveline_bitmap::{Bitmap, Bits};
use serde_json::json;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write},
    path::Path,
};

/// Granules that are written at once.
const PART: u64 = 1 << 19;

/// Writes a bitmap to a new file, a pipe, or stdout. Returns what there is to say.
///
/// Errors: a regular file is there already, which stays as it is; what was written of a new one is removed.
pub(super) fn export(bitmap: &Bitmap, output: &Path, format: ExportFormat) -> Result<String> {
    if output == Path::new("-") {
        return to_stdout(|out| write(bitmap, format, out));
    }
    let there = fs::metadata(output).is_ok_and(|there| !there.is_file());
    let mut how = OpenOptions::new();
    how.write(true).create_new(!there);
    let file = how.open(output).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => prefixed(output, "it is there already; expected a new file"),
        _ => prefixed(output, error),
    })?;
    let written = write_file(bitmap, format, &file, !there);
    if written.is_err() && !there {
        drop(fs::remove_file(output));
    }
    written.map_err(|error| prefixed(output, error))?;
    Ok(format!("{}: bitmap '{}', {}\n", output.display(), bitmap.name(), show::amount(bitmap)))
}

/// Writes to stdout what may be long. There is nothing else to say then.
pub(super) fn to_stdout(
    work: impl FnOnce(&mut BufWriter<io::StdoutLock<'static>>) -> io::Result<()>,
) -> Result<String> {
    let mut out = BufWriter::new(io::stdout().lock());
    match work(&mut out).and_then(|()| out.flush()) {
        // A reader that has gone, as in `| head`, is no failure.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(format!("cannot write to stdout: {error}"))
        }
        _ => Ok(String::new()),
    }
}

fn write_file(bitmap: &Bitmap, format: ExportFormat, file: &File, sync: bool) -> io::Result<()> {
    let mut out = BufWriter::new(file);
    write(bitmap, format, &mut out)?;
    out.flush()?;
    if sync { file.sync_all() } else { Ok(()) }
}

fn write(bitmap: &Bitmap, format: ExportFormat, out: &mut impl Write) -> io::Result<()> {
    match format {
        ExportFormat::Raw => write_raw(bitmap.bits(), out),
        ExportFormat::Json => {
            let (name, granularity) = (json!(&*bitmap.name()), bitmap.granularity().bytes());
            let size = bitmap.length();
            write!(out, "{{\"name\":{name},\"granularity\":{granularity},\"size\":{size},\"dirty\":")?;
            show::write_areas(bitmap.bits(), out)?;
            out.write_all(b"}\n")
        }
    }?;
    out.flush()
}

/// One bit for each granule, the lowest bit of a byte first.
fn write_raw(bits: &Bits, out: &mut impl Write) -> io::Result<()> {
    let (granules, shift) = (bits.granules(), bits.granularity().shift());
    let mut part = 0;
    while part < granules {
        let end = granules.min(part + PART);
        let mut bytes = vec![0u8; (end - part).div_ceil(8) as usize];
        let range = part << shift..bits.length().min(end << shift);
        for extent in bits.extents(range).filter(|extent| extent.dirty) {
            let (first, last) = (extent.range.start >> shift, (extent.range.end - 1) >> shift);
            for granule in first - part..=last - part {
                bytes[(granule / 8) as usize] |= 1 << (granule % 8);
            }
        }
        out.write_all(&bytes)?;
        part = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use driveline_bitmap::Granularity;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    #[test]
    fn raw_bits_are_those_of_the_bitmap_granule_by_granule() {
        let seed: u64 = rand::rng().random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        for _ in 0..50 {
            let granularity = Granularity::new(512 << rng.random_range(0..4)).unwrap();
            // Sometimes longer than a part, and mostly no multiple of anything.
            let granules =
                if rng.random_bool(0.2) { PART + rng.random_range(0..70) } else { rng.random_range(1..300) };
            let length = granules * granularity.bytes() - rng.random_range(0..granularity.bytes());
            let bits = Bits::new(granularity, length);
            for _ in 0..rng.random_range(0..40) {
                let start = rng.random_range(0..length);
                bits.mark(start..start + rng.random_range(1..100_000));
            }
            let mut bytes = Vec::new();
            write_raw(&bits, &mut bytes).unwrap();
            assert_eq!(bytes.len() as u64, granules.div_ceil(8));
            for granule in 0..bytes.len() as u64 * 8 {
                let bit = bytes[(granule / 8) as usize] >> (granule % 8) & 1 == 1;
                assert_eq!(
                    bit,
                    bits.is_dirty(granule << granularity.shift()),
                    "granule {granule} of {granules}"
                );
            }
        }
    }
}
