//! Bitmaps for people, and as JSON.

use super::shelf::Shown;
use crate::stores::{Seen, Trust};
use driveline_bitmap::{Bitmap, Bits};
use driveline_drivers::Bytes;
use serde_json::{Value, json};
use std::{fmt::Write as _, io};

/// Says what is worth knowing to who watches, not to who reads the output.
pub(super) fn say(notes: &[String]) {
    for note in notes {
        crate::commands::say(note);
    }
}

/// All bitmaps of a file, one a line.
pub(super) fn list(shown: &Shown) -> String {
    let mut out = String::new();
    let count = match shown.seen.len() {
        0 => "no bitmaps".to_owned(),
        1 => "1 bitmap".to_owned(),
        count => format!("{count} bitmaps"),
    };
    let what = if shown.kind == "qcow2" { "qcow2 image" } else { "file of bitmaps" };
    let _ = writeln!(out, "{}: {what} of a drive of {}, {count}", shown.path.display(), Bytes(shown.size));
    for note in &shown.notes {
        let _ = writeln!(out, "{note}");
    }
    if shown.seen.is_empty() {
        return out;
    }
    let mut rows = vec![["name", "granularity", "dirty", "state", "in", "contents"].map(str::to_owned)];
    rows.extend(shown.seen.iter().map(row));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..5).map(width).collect();
    for row in &rows {
        out.push(' ');
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(out, " {cell:width$} ");
        }
        let _ = writeln!(out, " {}", row[5]);
    }
    out
}

fn row(seen: &Seen) -> [String; 6] {
    let bitmap = &seen.bitmap;
    let name = bitmap.name().escape_debug().to_string();
    let dirty = if bitmap.is_inconsistent() { "?".to_owned() } else { amount(bitmap) };
    let mut state = if bitmap.is_recording() { "enabled" } else { "disabled" }.to_owned();
    if let Some(durability) = seen.durability {
        let _ = write!(state, ", {durability}");
    }
    let file = seen.file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let contents = match &seen.trust {
        Trust::Exact => "exact".to_owned(),
        Trust::Superset { extents, bytes } => {
            format!("at most {} too much, from {extents} areas that were being written", Bytes(*bytes))
        }
        Trust::AllDirty { reason } => format!("all dirty: {reason}"),
        Trust::Lost { reason } => format!("lost: {reason}; adopt it as all dirty, or remove it"),
    };
    [name, bitmap.granularity().to_string(), dirty, state, file, contents]
}

/// How much is dirty.
pub(super) fn amount(bitmap: &Bitmap) -> String {
    Bytes(bitmap.bits().dirty_bytes()).to_string()
}

/// The same for programs.
pub(super) fn json(shown: &Shown) -> String {
    let bitmaps: Vec<Value> = shown.seen.iter().map(entry).collect();
    let object = json!({
        "file": shown.path,
        "format": shown.kind,
        "size": shown.size,
        "bitmaps": bitmaps,
        "notes": shown.notes,
    });
    format!("{object:#}\n")
}

fn entry(seen: &Seen) -> Value {
    let bitmap = &seen.bitmap;
    let lost = bitmap.is_inconsistent();
    let mut object = json!({
        "name": &*bitmap.name(),
        "granularity": bitmap.granularity().bytes(),
        "count": (!lost).then(|| bitmap.bits().dirty_bytes()),
        "recording": bitmap.is_recording(),
        "in": seen.file,
        "verdict": seen.trust.word(),
    });
    if let Some(durability) = seen.durability {
        object["durability"] = durability.to_string().into();
    }
    if let Some(reason) = seen.trust.reason() {
        object["reason"] = reason.into();
    }
    if let Trust::Superset { extents, bytes } = seen.trust {
        object["extents"] = extents.into();
        object["bytes"] = bytes.into();
    }
    object
}

/// The dirty areas as objects in an array, one a line. There may be more of them than fit into memory.
pub(super) fn write_areas(bits: &Bits, out: &mut impl io::Write) -> io::Result<()> {
    out.write_all(b"[")?;
    for (at, range) in bits.iter_dirty().enumerate() {
        let before = if at == 0 { "" } else { ",\n " };
        write!(out, "{before}{{\"offset\":{},\"length\":{}}}", range.start, range.end - range.start)?;
    }
    out.write_all(b"]")
}

/// The same as a table.
pub(super) fn write_table(bits: &Bits, out: &mut impl io::Write) -> io::Result<()> {
    let width = bits.length().to_string().len().max(6);
    writeln!(out, "{:>width$}  {:>width$}", "offset", "length")?;
    for range in bits.iter_dirty() {
        writeln!(out, "{:>width$}  {:>width$}", range.start, range.end - range.start)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use driveline_bitmap::{BitmapName, Durability, Granularity};
    use std::sync::Arc;

    fn seen(name: &str, trust: Trust, durability: Option<Durability>) -> Seen {
        let bitmap = Bitmap::new(BitmapName::new(name).unwrap(), Granularity::default(), 1 << 20);
        bitmap.mark_unconditionally(65535..65537);
        let bitmap = if trust.word() == "lost" { bitmap.with_lost_contents() } else { bitmap };
        Seen { bitmap: Arc::new(bitmap), trust, durability, file: "a/disk.qcow2".into() }
    }

    fn shown() -> Shown {
        let lost = Trust::Lost { reason: "it was in use".to_owned() };
        let superset = Trust::Superset { extents: 2, bytes: 4096 };
        Shown {
            path: "a/disk.qcow2".into(),
            kind: "qcow2",
            size: 1 << 20,
            seen: vec![
                seen("daily", Trust::Exact, None),
                seen("old\n", lost, None),
                seen("p", superset, Some(Durability::Power)),
            ],
            notes: Vec::new(),
        }
    }

    #[test]
    fn a_list_is_one_line_a_bitmap_in_columns() {
        let expected = "\
a/disk.qcow2: qcow2 image of a drive of 1MiB, 3 bitmaps
  name   granularity  dirty   state           in          contents
  daily  64KiB        128KiB  enabled         disk.qcow2  exact
  old\\n  64KiB        ?       disabled        disk.qcow2  lost: it was in use; adopt it as all dirty, or remove it
  p      64KiB        128KiB  enabled, power  disk.qcow2  at most 4KiB too much, from 2 areas that were being written
";
        assert_eq!(list(&shown()), expected);
    }

    #[test]
    fn json_says_the_same_in_the_words_of_the_monitor() {
        let object: Value = serde_json::from_str(&json(&shown())).unwrap();
        assert_eq!((&object["format"], &object["size"]), (&json!("qcow2"), &json!(1 << 20)));
        let bitmaps = object["bitmaps"].as_array().unwrap();
        let exact = json!({
            "name": "daily", "granularity": 65536, "count": 131072, "recording": true, "in": "a/disk.qcow2",
            "verdict": "exact",
        });
        assert_eq!(bitmaps[0], exact);
        assert_eq!((&bitmaps[1]["count"], &bitmaps[1]["reason"]), (&Value::Null, &json!("it was in use")));
        assert_eq!((&bitmaps[2]["durability"], &bitmaps[2]["bytes"]), (&json!("power"), &json!(4096)));
    }

    #[test]
    fn a_map_is_a_table_or_an_array() {
        let bits = Bits::new(Granularity::default(), 1 << 20);
        let table = |bits: &Bits| {
            let mut out = Vec::new();
            write_table(bits, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        let array = |bits: &Bits| {
            let mut out = Vec::new();
            write_areas(bits, &mut out).unwrap();
            serde_json::from_slice::<Value>(&out).unwrap()
        };
        assert_eq!((array(&bits), &*table(&bits)), (json!([]), " offset   length\n"));
        bits.mark(0..1);
        bits.mark(131072..131073);
        assert_eq!(table(&bits), " offset   length\n      0    65536\n 131072    65536\n");
        let area = |offset: u64| json!({ "offset": offset, "length": 65536 });
        assert_eq!(array(&bits), json!([area(0), area(131072)]));
    }
}
