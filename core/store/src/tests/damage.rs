//! Files that are not as they were left.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::model::*;
use crate::header::{COPIES, COPY_BYTES, REST};
use crate::{Durability, Error, OpenOptions, Store, Verdict};

/// A store that was not closed: two bitmaps with granules 1 and 3 dirty.
fn left() -> Vec<u8> {
    let (disk, store) = create();
    for (name, durability) in [("w", Durability::Power), ("p", Durability::Process)] {
        let spec = spec(name, durability, 100 * GRANULE);
        let mut model = Model::new(store.add(&spec).unwrap(), &spec);
        for granule in [1, 3] {
            let bytes = granule * GRANULE..(granule + 1) * GRANULE;
            model.mark(bytes.clone());
            if poll(&*model.ledger, bytes).is_pending() {
                commit(&store);
            }
        }
    }
    disk.memory.bytes()
}

/// What is found, with how the bits of both bitmaps came out: never less than what was marked.
fn check(bytes: &[u8], boot: crate::BootId, what: &str) -> Result<crate::Opened, Error> {
    let opened = open_bytes(bytes, boot)?;
    assert_eq!(opened.bitmaps.len(), 2, "{what}");
    for found in &opened.bitmaps {
        let dirty = dirty(found);
        assert!(dirty.contains(&1) && dirty.contains(&3), "{what}: {:?}", found.verdict);
        match &found.verdict {
            Verdict::AllDirty { .. } => assert_eq!(dirty.len(), 100, "{what}"),
            Verdict::Superset { .. } => assert!(dirty.len() < 100, "{what}"),
            Verdict::Exact => assert_eq!(dirty, [1, 3], "{what}"),
        }
    }
    Ok(opened)
}

#[test]
fn no_flipped_bit_of_one_header_copy_takes_anything_back() {
    let bytes = left();
    let used = u32::from_le_bytes(bytes[16..20].try_into().unwrap()) as usize;
    assert!((300..2000).contains(&used));
    for at in (0..used).step_by(3) {
        for copy in COPIES {
            let mut damaged = bytes.clone();
            damaged[copy as usize + at] ^= 1 << (at % 8);
            let opened = check(&damaged, BOOT, &format!("byte {at} of the copy at {copy}"));
            let opened = opened.unwrap();
            assert!(opened.bitmaps.iter().all(|found| found.verdict == Verdict::Exact), "byte {at}");
        }
    }
}

#[test]
fn of_two_damaged_copies_the_bitmaps_are_told_and_all_dirty_or_the_error_says_that_they_are_lost() {
    let bytes = left();
    let used = u32::from_le_bytes(bytes[16..20].try_into().unwrap()) as usize;
    let mut random = SmallRng::seed_from_u64(0);
    for at in 0..used / 4 {
        let mut damaged = bytes.clone();
        damaged[at * 4] ^= 0x10;
        // The same sections of the other copy are sound, whatever it is.
        damaged[COPY_BYTES as usize + random.random_range(8..32)] ^= 0x10;
        let opened = check(&damaged, BOOT, &format!("byte {}", at * 4)).unwrap();
        let reason = opened.damage.unwrap_or_default();
        // What is not sealed in the first 32 bytes may be flipped back by chance, nothing else.
        assert!(reason.contains("both headers are damaged"), "byte {}: {reason}", at * 4);
        assert!(matches!(opened.bitmaps[0].verdict, Verdict::AllDirty { .. }));
    }
    let mut lost = bytes.clone();
    for copy in COPIES {
        lost[copy as usize + 100..copy as usize + used].fill(0xaa);
    }
    assert!(matches!(open_bytes(&lost, BOOT), Err(Error::NamesLost { .. })));
    for garbage in [vec![], vec![0; 4096], b"QFI\xfb and so on".to_vec()] {
        let error = open_bytes(&garbage, BOOT).unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{error}");
    }
}

#[test]
fn a_damaged_log_makes_everything_dirty_but_only_after_a_power_cut() {
    let bytes = left();
    let rings = REST as usize..REST as usize + crate::log::rings_bytes(LOG) as usize;
    // Two rings of 18 blocks, and the first epoch uses the second one.
    let ring = rings.start + 18 * 4096..rings.start + 36 * 4096;
    assert!(ring.end <= rings.end && bytes[rings.start..ring.start].iter().all(|&byte| byte == 0));
    for at in ring.clone().step_by(997) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 4;
        let opened = check(&damaged, BOOT, &format!("byte {at}")).unwrap();
        assert_eq!(opened.bitmaps[0].verdict, Verdict::Exact);
        let opened = check(&damaged, OTHER_BOOT, &format!("byte {at}")).unwrap();
        let Verdict::AllDirty { reason } = &opened.bitmaps[0].verdict else { panic!("byte {at}") };
        assert!(reason.contains("of the log is damaged"), "{reason}");
    }
    let mut zeroed = bytes.clone();
    zeroed[ring].fill(0);
    let opened = check(&zeroed, OTHER_BOOT, "zeroed").unwrap();
    assert!(matches!(opened.bitmaps[0].verdict, Verdict::AllDirty { .. }));
    // And the sound one says little more than what was marked.
    let opened = check(&bytes, OTHER_BOOT, "sound").unwrap();
    assert!(
        matches!(opened.bitmaps[0].verdict, Verdict::Superset { extents: 1, .. }),
        "{:?}",
        opened.bitmaps[0]
    );
}

#[test]
fn a_file_that_was_cut_off_is_found_all_dirty() {
    let bytes = left();
    let mut told = 0;
    for length in (0..bytes.len()).step_by(16 << 10).chain([bytes.len() - 1]) {
        match check(&bytes[..length], BOOT, &format!("{length} bytes")) {
            Ok(opened) => {
                told += usize::from(opened.bitmaps.iter().any(|found| found.verdict != Verdict::Exact))
            }
            Err(error) => assert!(length == 0 && matches!(error, Error::Foreign { .. }), "{length}: {error}"),
        }
    }
    assert!(told > 5);
}

#[test]
fn damaged_bits_of_a_closed_store_are_told_by_their_checksum() {
    let (disk, store) = create();
    let spec = spec("daily", Durability::Process, 100 * GRANULE);
    let mut daily = Model::new(store.add(&spec).unwrap(), &spec);
    daily.mark(0..GRANULE);
    let region = disk.memory.bytes().len() - crate::region::ALIGN as usize;
    store.close_clean().unwrap();
    let bytes = disk.memory.bytes();
    assert_eq!(bytes[region], 1);
    let verdict = |bytes: &[u8]| open_bytes(bytes, OTHER_BOOT).unwrap().bitmaps[0].verdict.clone();
    assert_eq!(verdict(&bytes), Verdict::Exact);
    for flipped in [0, 5] {
        let mut damaged = bytes.clone();
        damaged[region + flipped] ^= 1;
        assert!(matches!(verdict(&damaged), Verdict::AllDirty { reason } if reason.contains("checksum")));
    }
}

#[test]
fn another_store_and_an_older_generation_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vda.bitmaps");
    let uuid = Store::create(&path, &options()).unwrap().uuid();
    let other = Store::create(&folder.path().join("vdb.bitmaps"), &options()).unwrap().uuid();
    let open =
        |uuid, generation| Store::open(&path, &OpenOptions { uuid, generation, ..OpenOptions::new(BOOT) });
    let error = open(Some(other), None).unwrap_err().to_string();
    assert!(error.contains(&uuid.to_string()) && error.contains(&other.to_string()), "{error}");
    let error = open(Some(uuid), Some(2)).unwrap_err().to_string();
    assert!(error.contains("generation 1") && error.contains("at least 2"), "{error}");
    assert!(open(Some(uuid), Some(1)).is_ok());
}
