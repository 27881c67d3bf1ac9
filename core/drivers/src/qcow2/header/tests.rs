use super::*;
use proptest::prelude::*;

fn header() -> Header {
    Header {
        version: 3,
        cluster_bits: 16,
        size_bytes: 10 << 30,
        l1_entries: 20,
        l1_offset: 0x30000,
        reftable_offset: 0x10000,
        reftable_clusters: 1,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: 1,
        autoclear: 0,
        refcount_order: 4,
        compression: Compression::Zlib,
        further: vec![0; 8],
        extensions: vec![feature_names(), Extension { kind: 0x1234_5678, data: b"kept".to_vec() }],
        backing: Some("base.img".into()),
        backing_format: Some("raw".into()),
    }
}

fn cluster(header: &Header) -> Vec<u8> {
    let mut bytes = header.encode().unwrap();
    bytes.resize(1 << header.cluster_bits, 0);
    bytes
}

/// Changes bytes of a good header; returns what is said about it.
fn refusal(at: usize, bytes: &[u8]) -> (Kind, String) {
    let mut cluster = cluster(&header());
    cluster[at..at + bytes.len()].copy_from_slice(bytes);
    let error = Header::parse(&cluster).expect_err("it is refused");
    (error.kind(), error.to_string())
}

#[test]
fn what_is_written_reads_back() {
    let v3 = header();
    let v2 = Header { version: 2, compatible: 0, further: vec![], ..header() };
    let plain = Header { backing: None, backing_format: None, extensions: vec![], ..header() };
    let zstd = Header {
        incompatible: incompatible::COMPRESSION,
        compression: Compression::Zstd,
        further: vec![1, 0, 0, 0, 0, 0, 0, 0],
        ..header()
    };
    for header in [v3, v2, plain, zstd] {
        assert_eq!(Header::parse(&cluster(&header)).unwrap(), header);
    }
}

#[test]
fn each_wrong_field_is_named_with_what_was_found_and_expected() {
    for (at, bytes, kind, found, expected) in [
        (0, &b"QFI\0"[..], Kind::Invalid, "51 46 49 00", "51 46 49 fb"),
        (4, &4u32.to_be_bytes()[..], Kind::NotSupported, "version 4", "2 and 3"),
        (8, &70u64.to_be_bytes(), Kind::Corrupt, "name is at 70", "112..65536"),
        (8, &u64::MAX.to_be_bytes(), Kind::Corrupt, "name is at 18446744073709551615", "112..65536"),
        (16, &1024u32.to_be_bytes(), Kind::Corrupt, "1024 bytes", "1023 at most"),
        (20, &8u32.to_be_bytes(), Kind::NotSupported, "2^8", "2^9 to 2^21"),
        (20, &22u32.to_be_bytes(), Kind::NotSupported, "2^22", "2^9 to 2^21"),
        (24, &(1u64 << 63).to_be_bytes(), Kind::Corrupt, "9223372036854775808", "less than 2^63"),
        (24, &(11u64 << 30).to_be_bytes(), Kind::Corrupt, "20 entries", "22"),
        (32, &1u32.to_be_bytes(), Kind::NotSupported, "AES", "not supported"),
        (32, &2u32.to_be_bytes(), Kind::NotSupported, "LUKS", "not supported"),
        (32, &7u32.to_be_bytes(), Kind::Corrupt, "method 7", "0 (none)"),
        (36, &0x40_0001u32.to_be_bytes(), Kind::NotSupported, "L1 table of 33554440", "33554432"),
        (40, &0x30200u64.to_be_bytes(), Kind::Corrupt, "L1 table is at 0x30200", "multiple of 65536"),
        (40, &0u64.to_be_bytes(), Kind::Corrupt, "L1 table is at 0x0", "after the header"),
        (40, &(1u64 << 60).to_be_bytes(), Kind::Corrupt, "0x1000000000000000", "2^56"),
        (48, &u64::MAX.to_be_bytes(), Kind::Corrupt, "0xffffffffffffffff", "2^56"),
        (48, &0x10001u64.to_be_bytes(), Kind::Corrupt, "refcount table is at 0x10001", "multiple"),
        (56, &0u32.to_be_bytes(), Kind::Corrupt, "0 clusters", "at least 1"),
        (56, &129u32.to_be_bytes(), Kind::NotSupported, "8454144 bytes", "8388608"),
        (60, &65537u32.to_be_bytes(), Kind::Corrupt, "65537 snapshots", "65536 at most"),
        (60, &1u32.to_be_bytes(), Kind::Corrupt, "snapshot table is at 0x0", "after the header"),
        (72, &(1u64 << 40).to_be_bytes(), Kind::NotSupported, "bit 40 (without a name)", "not known"),
        (72, &8u64.to_be_bytes(), Kind::Corrupt, "bit is set", "0 (zlib)"),
        (96, &7u32.to_be_bytes(), Kind::Corrupt, "2^7 bits", "2^6"),
        (100, &103u32.to_be_bytes(), Kind::Corrupt, "length 103", "from 104 to 65536"),
        (100, &108u32.to_be_bytes(), Kind::Corrupt, "length 108", "multiple of 8"),
        (100, &u32::MAX.to_be_bytes(), Kind::Corrupt, "length 4294967295", "to 65536"),
        (104, &[1], Kind::Corrupt, "compression type 1", "without"),
        (116, &u32::MAX.to_be_bytes(), Kind::Corrupt, "4294967295 bytes", "left"),
    ] {
        let (found_kind, text) = refusal(at, bytes);
        assert_eq!(found_kind, kind, "{text}");
        assert!(
            text.contains(found) && text.contains(expected),
            "at {at}: '{text}' lacks '{found}' or '{expected}'"
        );
    }
}

#[test]
fn unknown_features_are_refused_by_the_name_that_the_image_gives() {
    let mut named = header();
    let mut data = vec![0, 33];
    data.extend(b"time travel");
    data.resize(48, 0);
    named.extensions = vec![Extension { kind: EXT_FEATURES, data }];
    let mut bytes = cluster(&named);
    bytes[72..80].copy_from_slice(&(1u64 << 33 | 1 << 50).to_be_bytes());
    let text = Header::parse(&bytes).unwrap_err().to_string();
    assert!(text.contains("bit 33 (time travel), bit 50 (without a name)"), "{text}");
}

#[test]
fn only_writing_is_refused_for_corrupt() {
    let corrupt = Header { incompatible: incompatible::CORRUPT, ..header() };
    let text = Header::parse(&cluster(&corrupt)).unwrap().check_writable().unwrap_err().to_string();
    assert!(text.contains("corrupt") && text.contains("read-only"), "{text}");
    // What is wrong with bitmaps is wrong with bitmaps only.
    let bitmaps = Extension { kind: EXT_BITMAPS, data: vec![0xff; 7] };
    let damaged = Header { autoclear: AUTOCLEAR_BITMAPS, extensions: vec![bitmaps], ..header() };
    Header::parse(&cluster(&damaged)).unwrap().check_writable().unwrap();
}

#[test]
fn what_does_not_fit_the_first_cluster_is_not_written() {
    let long = Header { cluster_bits: 9, backing: Some("x".repeat(600)), extensions: vec![], ..header() };
    assert!(long.encode().unwrap_err().to_string().contains("512"));
}

proptest! {
    #[test]
    fn any_bytes_are_a_header_or_an_error(
        changes in prop::collection::vec((0usize..700, any::<u8>()), 0..12), cluster_bits in 9u32..=12
    ) {
        let small = Header { cluster_bits, l1_entries: 4000, extensions: vec![], ..header() };
        let small = Header { size_bytes: 1 << 20, l1_offset: 1 << 20, reftable_offset: 1 << 16, ..small };
        let mut bytes = cluster(&small);
        for (at, byte) in changes {
            let length = bytes.len();
            bytes[at % length] = byte;
        }
        if let Ok(read) = Header::parse(&bytes) {
            let mut again = read.encode().unwrap();
            again.resize(1 << read.cluster_bits, 0);
            prop_assert_eq!(Header::parse(&again).unwrap(), read);
        }
    }
}
