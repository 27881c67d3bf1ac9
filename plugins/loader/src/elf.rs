//! What the dynamic linker does not look at, and dies of: files that end too early.

use std::{fs::File, io, os::unix::fs::FileExt};

/// The machine's number in an ELF header.
const MACHINE: Option<u16> = match () {
    () if cfg!(target_arch = "x86_64") => Some(62),
    () if cfg!(target_arch = "aarch64") => Some(183),
    () if cfg!(target_arch = "riscv64") => Some(243),
    () => None,
};

const SHARED_OBJECT: u16 = 3;
const LOADED_SEGMENT: u32 = 1;
const PROGRAM_HEADER_BYTES: u64 = 56;
const SECTION_HEADER_BYTES: u64 = 64;

/// Is the file a whole shared library for this machine? It reads the headers only. The error says what the file is.
pub(crate) fn check(file: &File, length: u64) -> Result<(), String> {
    let mut head = [0; 64];
    let got = read_up_to(file, &mut head, 0).map_err(|error| error.to_string())?;
    let u16_at = |at: usize| u16::from_ne_bytes([head[at], head[at + 1]]);
    let u64_at = |at: usize| u64::from_ne_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    match () {
        () if got == 0 => return Err("an empty file".into()),
        () if !head.starts_with(b"\x7fELF") => return Err("a file that is not ELF".into()),
        () if got < head.len() => return Err(format!("a truncated one of {length} bytes")),
        () if head[4] != 2 => return Err("one for 32-bit machines".into()),
        () if head[5] != if cfg!(target_endian = "little") { 1 } else { 2 } => {
            return Err("one of the other byte order".into());
        }
        () if MACHINE.is_some_and(|machine| machine != u16_at(18)) => {
            return Err(format!("one for machine {}", u16_at(18)));
        }
        () if u16_at(16) != SHARED_OBJECT => return Err(format!("an ELF file of type {}", u16_at(16))),
        () => {}
    }
    let (programs, sections) = (u64_at(32), u64_at(40));
    let (program_count, section_count) = (u64::from(u16_at(56)), u64::from(u16_at(60)));
    if u64::from(u16_at(54)) != PROGRAM_HEADER_BYTES {
        return Err(format!("one with program headers of {} bytes", u16_at(54)));
    }
    let truncated = |what: &str, end: Option<u64>| match end {
        Some(end) if end <= length => Ok(()),
        Some(end) => Err(format!("a truncated one: {length} bytes, {what} at {end}")),
        None => Err(format!("a corrupt one: {what} beyond all offsets")),
    };
    truncated("its section headers end", sections.checked_add(section_count * SECTION_HEADER_BYTES))?;
    truncated("its program headers end", programs.checked_add(program_count * PROGRAM_HEADER_BYTES))?;
    for index in 0..program_count {
        let mut header = [0; PROGRAM_HEADER_BYTES as usize];
        file.read_exact_at(&mut header, programs + index * PROGRAM_HEADER_BYTES)
            .map_err(|e| e.to_string())?;
        let kind = u32::from_ne_bytes(header[..4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_ne_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        if kind == LOADED_SEGMENT {
            truncated(&format!("segment {index} ends"), u64_at(8).checked_add(u64_at(32)))?;
        }
    }
    Ok(())
}

fn read_up_to(file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], at + done as u64)? {
            0 => break,
            got => done += got,
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn verdict(bytes: &[u8]) -> Result<(), String> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        check(&file, bytes.len() as u64)
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        // Any shared library does; the C library is in every process.
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let libc = maps.split_whitespace().find(|word| word.contains("libc.so")).expect("dynamically linked");
        let whole = std::fs::read(libc).unwrap();
        assert_eq!(verdict(&whole), Ok(()));
        for cut in [0, 3, 20, 63, 64, 1000, whole.len() / 2, whole.len() - 1] {
            assert!(verdict(&whole[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn other_files_are_named() {
        assert_eq!(verdict(b""), Err("an empty file".into()));
        assert_eq!(verdict(b"#!/bin/sh\n"), Err("a file that is not ELF".into()));
        let mut garbage = vec![0xff; 4096];
        garbage[..6].copy_from_slice(b"\x7fELF\x02\x01");
        assert!(verdict(&garbage).is_err());
    }
}
