//! Metadata contexts: what block status can tell about an export.

use std::fmt;
use std::sync::Arc;

use driveline_bitmap::Bitmap;

use crate::export::Export;
use driveline_wire::ContextId;

/// The number of the first bitmap; those before are the contexts that every export may have.
const FIRST_BITMAP: u32 = 2;
const ALLOCATION: &str = "base:allocation";
const DEPTH: &str = "qemu:allocation-depth";
const BITMAP: &str = "qemu:dirty-bitmap:";
const BACKUP: &str = "driveline:backup:";

/// One context of an export.
#[derive(Clone)]
pub(crate) enum Context {
    /// `base:allocation`: holes and zeroes.
    Allocation,
    /// `qemu:allocation-depth`: 0 unallocated, 1 the top layer, 2 the next, ...
    Depth,
    /// `qemu:dirty-bitmap:NAME`: 1 is dirty.
    Bitmap(Arc<Bitmap>),
    /// `driveline:backup:NAME`: 1 is dirty and has to be copied, 2 is dirty and reads as zeroes, so that nothing has to be.
    Backup(Arc<Bitmap>),
}

impl Context {
    pub(crate) fn name(&self) -> String {
        match self {
            Context::Allocation => ALLOCATION.to_owned(),
            Context::Depth => DEPTH.to_owned(),
            Context::Bitmap(bitmap) => format!("{BITMAP}{}", bitmap.name()),
            Context::Backup(bitmap) => format!("{BACKUP}{}", bitmap.name()),
        }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// A context that a client selected, and the number it goes by.
#[derive(Clone, Debug)]
pub(crate) struct Selected {
    pub(crate) id: ContextId,
    pub(crate) context: Context,
}

/// What a client wants to do with the contexts that match its queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// See what there is: a name that ends in a colon means all that begin with it, and no query means all.
    List,
    /// Select them: only whole names count.
    Select,
}

/// All contexts of an export.
fn all<S>(export: &Export<S>) -> impl Iterator<Item = Selected> + '_ {
    let depth = export.allocation_depth.then_some((ContextId(1), Context::Depth));
    let bitmaps = export.bitmaps.iter().map(|bitmap| Context::Bitmap(Arc::clone(bitmap)));
    let backups = export.bitmaps.iter().map(|bitmap| Context::Backup(Arc::clone(bitmap)));
    let of_bitmaps = (FIRST_BITMAP..).map(ContextId).zip(bitmaps.chain(backups));
    std::iter::once((ContextId(0), Context::Allocation))
        .chain(depth)
        .chain(of_bitmaps)
        .map(|(id, context)| Selected { id, context })
}

/// The contexts that match at least one query, each once. Queries that mean nothing here match nothing.
pub(crate) fn matching<S>(export: &Export<S>, queries: &[&str], purpose: Purpose) -> Vec<Selected> {
    let everything = purpose == Purpose::List && queries.is_empty();
    all(export)
        .filter(|selected| {
            let name = selected.context.name();
            everything || queries.iter().any(|query| matches(&name, query, purpose))
        })
        .collect()
}

fn matches(name: &str, query: &str, purpose: Purpose) -> bool {
    let wildcard =
        purpose == Purpose::List && ["base:", "qemu:", BITMAP, "driveline:", BACKUP].contains(&query);
    if wildcard { name.starts_with(query) } else { name == query }
}

#[cfg(test)]
mod tests {
    use driveline_bitmap::{BitmapName, Granularity};

    use super::*;

    fn export() -> Export<()> {
        let bitmap = |name: &str| {
            let name = BitmapName::new(name).unwrap();
            Arc::new(Bitmap::new(name, "64KiB".parse::<Granularity>().unwrap(), 1 << 20))
        };
        Export {
            storage: (),
            writable: true,
            description: String::new(),
            bitmaps: vec![bitmap("daily"), bitmap("a:b")],
            allocation_depth: true,
            thread: None,
        }
    }

    fn names(queries: &[&str], purpose: Purpose) -> Vec<String> {
        matching(&export(), queries, purpose).iter().map(|selected| selected.context.name()).collect()
    }

    const EVERYTHING: [&str; 6] = [
        "base:allocation",
        "qemu:allocation-depth",
        "qemu:dirty-bitmap:daily",
        "qemu:dirty-bitmap:a:b",
        "driveline:backup:daily",
        "driveline:backup:a:b",
    ];

    #[test]
    fn wildcards_list_and_do_not_select() {
        assert_eq!(names(&[], Purpose::List), EVERYTHING);
        assert_eq!(names(&["base:"], Purpose::List), EVERYTHING[..1]);
        assert_eq!(names(&["qemu:"], Purpose::List), EVERYTHING[1..4]);
        assert_eq!(names(&["qemu:dirty-bitmap:"], Purpose::List), EVERYTHING[2..4]);
        assert_eq!(names(&["driveline:"], Purpose::List), EVERYTHING[4..]);
        for query in ["base:", "qemu:", "qemu:dirty-bitmap:", "driveline:", "driveline:backup:"] {
            assert_eq!(names(&[query], Purpose::Select), [""; 0]);
        }
        assert_eq!(names(&[], Purpose::Select), [""; 0]);
    }

    #[test]
    fn whole_names_select_each_context_once() {
        let queries = ["qemu:dirty-bitmap:a:b", "base:allocation", "base:allocation", "x-y:z", "qemu:other"];
        assert_eq!(names(&queries, Purpose::Select), [EVERYTHING[0], EVERYTHING[3]]);
        assert_eq!(matching(&export(), &queries, Purpose::Select)[1].id, ContextId(3));
    }

    #[test]
    fn depth_can_be_withheld() {
        let export = Export { allocation_depth: false, ..export() };
        assert!(matching(&export, &["qemu:allocation-depth"], Purpose::Select).is_empty());
    }
}
