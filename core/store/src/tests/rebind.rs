//! Moving to another file: exactly one of the two counts, whenever the process ends.

use core::task::Poll;
use std::fs;
use std::path::Path;

use driveline_bitmap::StoreBinding;

use super::model::*;
use crate::{Durability, Error, OpenOptions, Standing, Store, Verdict};

fn reopen(path: &Path) -> crate::Result<crate::Opened> {
    Store::open(path, &OpenOptions::new(BOOT))
}

/// Does the first `steps` of a move, with marks in between, and drops all.
fn moved(folder: &Path, steps: usize) {
    let store = Store::create(&folder.join("old"), &options()).unwrap();
    let mut models = Vec::new();
    for (name, durability) in
        [("p", Durability::Process), ("w", Durability::Power), ("v", Durability::Volatile)]
    {
        let spec = spec(name, durability, 100 * GRANULE);
        models.push(Model::new(store.add(&spec).unwrap(), &spec));
    }
    let mark = |models: &mut Vec<Model>, granule: u64| {
        models.iter_mut().for_each(|model| model.mark(granule * GRANULE..(granule + 1) * GRANULE));
        let ledger = &models[1].ledger;
        futures::executor::block_on(core::future::poll_fn(|context| {
            ledger.poll_safe(granule * GRANULE..(granule + 1) * GRANULE, context.waker())
        }))
        .unwrap();
    };
    mark(&mut models, 1);
    models[0].freeze().unwrap();
    mark(&mut models, 2);
    store.heartbeat(std::time::UNIX_EPOCH + std::time::Duration::from_secs(77));
    if steps == 0 {
        return;
    }
    let mut incoming = store.copy_to(&folder.join("new")).unwrap();
    mark(&mut models, 3);
    models[1].clear().unwrap();
    mark(&mut models, 4);
    if steps == 1 {
        return;
    }
    store.supersede(&mut incoming).unwrap();
    if steps == 2 {
        return;
    }
    incoming.activate(&store).unwrap();
    assert_eq!(models[0].ledger.binding(), StoreBinding::Sidecar { path: folder.join("new") });
    mark(&mut models, 5);
    models[0].reclaim().unwrap();
    assert_eq!(store.generation(), 2);
    if steps == 4 {
        drop(models);
        store.close_clean().unwrap();
    }
}

#[test]
fn exactly_one_of_the_two_files_counts_and_has_all_marks() {
    for steps in 0..5 {
        let folder = tempfile::tempdir().unwrap();
        moved(folder.path(), steps);
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        let counting = match steps {
            0 | 1 => {
                if steps == 1 {
                    let error = reopen(&new).unwrap_err();
                    assert!(matches!(error, Error::Incoming { .. }), "{error}");
                    assert!(error.to_string().ends_with("which still counts"), "{error}");
                }
                reopen(&old).unwrap()
            }
            _ => {
                let error = reopen(&old).unwrap_err();
                assert!(matches!(&error, Error::Superseded { by_path, .. } if *by_path == new), "{error}");
                let standing = Store::inspect(&old, BOOT).unwrap().standing;
                assert!(matches!(standing, Standing::Superseded { .. }));
                reopen(&new).unwrap()
            }
        };
        let expected: [&[u64]; 3] = match steps {
            0 => [&[1, 2], &[1, 2], &[1, 2]],
            1 | 2 => [&[1, 2, 3, 4], &[4], &[1, 2, 3, 4]],
            _ => [&[1, 2, 3, 4, 5], &[4, 5], &[1, 2, 3, 4, 5]],
        };
        assert_eq!(counting.heartbeat.unwrap().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs(), 77);
        assert_eq!(counting.owner.unwrap(), b"vda");
        for (found, expected) in counting.bitmaps.iter().zip(expected) {
            if found.durability == Durability::Volatile && steps < 4 {
                assert!(matches!(found.verdict, Verdict::AllDirty { .. }));
            } else {
                assert_eq!(dirty(found), expected, "{steps} steps, {}", found.record.name);
                assert_eq!(found.verdict, Verdict::Exact);
            }
        }
    }
}

#[test]
fn a_copy_whose_original_is_gone_counts_with_everything_dirty() {
    let folder = tempfile::tempdir().unwrap();
    moved(folder.path(), 1);
    fs::remove_file(folder.path().join("old")).unwrap();
    let opened = reopen(&folder.path().join("new")).unwrap();
    let Verdict::AllDirty { reason } = &opened.bitmaps[0].verdict else { panic!() };
    assert!(reason.contains("never came to count"), "{reason}");
    assert_eq!(dirty(&opened.bitmaps[0]).len(), 100);
}

#[test]
fn a_copy_of_another_store_supersedes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| Store::create(&folder.path().join(name), &options()).unwrap());
    let mut incoming = one.copy_to(&folder.path().join("copy")).unwrap();
    assert!(two.supersede(&mut incoming).is_err());
    assert!(incoming.activate(&one).is_err(), "it was not superseded");
    assert!(one.copy_to(&folder.path().join("two")).is_err(), "that file exists");
    let daily = one.add(&spec("daily", Durability::Power, GRANULE)).unwrap();
    assert!(matches!(poll(&*daily, 0..0), Poll::Ready(Ok(()))));
}
