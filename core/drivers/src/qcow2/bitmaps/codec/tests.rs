use super::*;
use proptest::prelude::*;

fn geometry(cluster_bits: u32) -> Geometry {
    Geometry { version: 3, cluster_bits, refcount_order: 4, extended_l2: false, data_file: false }
}

fn entry() -> Entry {
    let granularity = Granularity::new(65536).unwrap();
    Entry { table_offset: 0x50000, table_entries: 1, ..Entry::new("daily", granularity, flags::AUTO) }
}

#[test]
fn an_entry_is_laid_out_as_the_format_says() {
    let bytes = encode_directory([entry()].iter());
    let expected = [
        &[0, 0, 0, 0, 0, 5, 0, 0][..],
        &[0, 0, 0, 1],
        &[0, 0, 0, 2],
        &[1, 16],
        &[0, 5],
        &[0, 0, 0, 0],
        b"daily\0\0\0",
    ];
    assert_eq!(bytes, expected.concat());
    assert_eq!(bytes[FLAGS_AT], flags::AUTO as u8);
}

#[test]
fn what_is_wrong_with_an_entry_is_said_with_what_was_found() {
    let good = entry();
    assert_eq!(good.fault(), None);
    for (entry, word) in [
        (Entry { name: vec![], ..good.clone() }, "empty"),
        (Entry { name: vec![b'x'; 1024], ..good.clone() }, "1024 bytes"),
        (Entry { name: vec![0xff], ..good.clone() }, "UTF-8"),
        (Entry { name: b"a\0b".to_vec(), ..good.clone() }, "zero byte"),
        (Entry { kind: 2, ..good.clone() }, "type 2"),
        (Entry { granularity_bits: 8, ..good.clone() }, "2^8"),
        (Entry { granularity_bits: 32, ..good.clone() }, "2^32"),
        (Entry { granularity_bits: 255, ..good.clone() }, "2^255"),
        (Entry { flags: 1 << 31, ..good.clone() }, "0x80000000"),
        (Entry { extra: vec![0; 9], ..good.clone() }, "9 bytes"),
    ] {
        let fault = entry.fault().expect("it is refused");
        assert!(fault.contains(word), "'{fault}' lacks '{word}'");
    }
    let kept = Entry { extra: vec![0; 9], flags: flags::EXTRA_COMPATIBLE, ..good.clone() };
    assert_eq!(kept.fault(), None);
    for (entry, word) in [
        (Entry { table_offset: 0, ..good.clone() }, "0x0"),
        (Entry { table_offset: 0x50200, ..good.clone() }, "0x50200"),
        (Entry { table_offset: 1 << 60, ..good.clone() }, "2^56"),
        (Entry { table_entries: 0, ..good.clone() }, "0 entries"),
        (Entry { table_entries: 8193, ..good.clone() }, "8192"),
    ] {
        let fault = entry.table(&geometry(16)).expect_err("it is refused");
        assert!(fault.contains(word), "'{fault}' lacks '{word}'");
    }
}

#[test]
fn a_place_is_within_the_limits() {
    let good = Place { bitmaps: 65535, bytes: DIRECTORY_BYTES_MAX, offset: 0x30000 };
    assert_eq!(Place::parse(&good.encode(), &geometry(16)), Ok(good.clone()));
    for (place, word) in [
        (Place { bitmaps: 0, ..good.clone() }, "0 bitmaps"),
        (Place { bitmaps: 65536, ..good.clone() }, "65536"),
        (Place { bytes: 0, ..good.clone() }, "0 bytes"),
        (Place { bytes: DIRECTORY_BYTES_MAX + 1, ..good.clone() }, "67107841"),
        (Place { offset: 0, ..good.clone() }, "0x0"),
        (Place { offset: 0x30200, ..good.clone() }, "0x30200"),
    ] {
        let fault = Place::parse(&place.encode(), &geometry(16)).expect_err("it is refused");
        assert!(fault.contains(word), "'{fault}' lacks '{word}'");
    }
    let mut reserved = good.encode();
    reserved[5] = 1;
    assert!(Place::parse(&reserved, &geometry(16)).unwrap_err().contains("reserved"));
    assert!(Place::parse(&[0; 23], &geometry(16)).unwrap_err().contains("23 bytes"));
}

#[test]
fn a_table_entry_is_zeroes_ones_or_a_cluster() {
    let geometry = geometry(16);
    assert_eq!(cluster(0, &geometry), Ok(None));
    assert_eq!(cluster(ONES, &geometry), Ok(None));
    assert_eq!(cluster(0x70000, &geometry), Ok(Some(0x70000)));
    for word in [0x70001, 0x70200, 2, 1 << 56, 1 << 63, 0x100] {
        let fault = cluster(word, &geometry).expect_err("it is refused");
        assert!(fault.contains(&format!("{word:#x}")), "{fault}");
    }
}

fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let bytes = |max| prop::collection::vec(any::<u8>(), 0..max);
    let entry = (any::<u64>(), any::<u32>(), any::<u32>(), any::<u8>(), any::<u8>(), bytes(20), bytes(1100));
    let entry =
        entry.prop_map(|(table_offset, table_entries, flags, kind, granularity_bits, extra, name)| Entry {
            table_offset,
            table_entries,
            flags,
            kind,
            granularity_bits,
            extra,
            name,
        });
    prop::collection::vec(entry, 1..6)
}

proptest! {
    #[test]
    fn a_directory_reads_as_it_was_written(entries in entries()) {
        let bytes = encode_directory(entries.iter());
        prop_assert_eq!(bytes.len(), entries.iter().map(Entry::bytes).sum::<usize>());
        let count = entries.len() as u32;
        prop_assert_eq!(parse_directory(&bytes, count), Ok(entries));
        prop_assert!(parse_directory(&bytes, count + 1).is_err());
        prop_assert!(parse_directory(&bytes, count - 1).is_err());
        prop_assert!(parse_directory(&bytes[..bytes.len() - 1], count).is_err());
    }

    #[test]
    fn any_bytes_are_a_directory_or_a_reason(
        entries in entries(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cluster_bits in 9u32..=21,
    ) {
        let mut bytes = encode_directory(entries.iter());
        for (at, byte) in changes {
            let length = bytes.len();
            bytes[at.index(length)] = byte;
        }
        for entry in parse_directory(&bytes, entries.len() as u32).unwrap_or_default() {
            let _ = (entry.fault(), entry.size_fault(&geometry(cluster_bits), u64::MAX >> 1));
            if let Ok(table) = entry.table(&geometry(cluster_bits)) {
                prop_assert!(table.start < table.end && table.end < 1 << 57);
            }
        }
    }

    #[test]
    fn bits_are_a_line_from_the_lowest_bit_on(
        granules in 1u64..9000, shift in 9u32..12, less in 0u64..512,
        dirty in prop::collection::vec((any::<prop::sample::Index>(), 1u64..3000), 0..12),
    ) {
        let (granularity, geometry) = (Granularity::new(1 << shift).unwrap(), geometry(9));
        let size = (granules << shift) - less;
        let bits = Bits::new(granularity, size);
        let mut model = vec![false; granules as usize];
        for (first, length) in dirty {
            let first = first.index(granules as usize) as u64;
            let end = (first + length).min(granules);
            bits.mark(first << shift..end << shift);
            model[first as usize..end as usize].fill(true);
        }
        let read = Bits::new(granularity, size);
        let covered = coverage(&geometry, granularity);
        let clusters = table_entries(&geometry, size, granularity);
        prop_assert_eq!(clusters, granules.div_ceil(4096));
        for i in 0..clusters {
            let range = i * covered..((i + 1) * covered).min(size);
            let whole = range.end == (i + 1) * covered;
            let part: Vec<bool> = (0..4096).map(|b| model.get(i as usize * 4096 + b) == Some(&true)).collect();
            let mut bytes = [0; 512];
            encode_bits(&bits, range.clone(), &mut bytes);
            let bit = |b: usize| bytes[b / 8] >> (b % 8) & 1 == 1;
            prop_assert!((0..4096).all(|b| bit(b) == part[b]), "cluster {}", i);
            match uniform(&bits, range.clone(), whole) {
                Some(0) => prop_assert!(!part.contains(&true)),
                Some(_) => prop_assert!(!part.contains(&false)),
                None => prop_assert!(part.contains(&true)),
            }
            decode_bits(&bytes, range.start, &read);
        }
        prop_assert_eq!(read, bits);
    }
}
