//! A qcow2 image as a shelf, with what a killed program left beside it.

use super::{
    Result,
    shelf::{Home, Shelf, in_use, lock, prefixed},
};
use crate::{
    drivers, logging,
    stores::{Look, Seen, Stores, beside, put},
};
use driveline_bitmap::{Bitmap, Granularity};
use driveline_graph::{Graph, GraphOptions, Kind, Root, RootOptions};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

/// The image's node, in a graph of its own.
const NODE: &str = "offline-image";

/// An open image. Its locks keep others away as long as it is open.
pub(super) struct Image {
    graph: Graph,
    /// Keeps the image locked for a reader.
    root: Root,
    /// Files beside it that are of no use once the image has its bitmaps, locked.
    left: Vec<(PathBuf, File)>,
    /// One of them is past reading, so it is kept.
    damaged: bool,
    broken: Vec<(String, String)>,
    unreadable: Option<String>,
}

impl Image {
    /// Opens an image, alone, without the images below it. Read-only: to open it for writing would by itself take from what
    /// lies beside it the proof that nobody else wrote. `alone`: nobody else may look at that.
    pub(super) async fn open(path: &Path, alone: bool) -> Result<Shelf> {
        let refused = |error: driveline_graph::Error| match error.kind() {
            // It names the file.
            Kind::Busy => told(error),
            _ => prefixed(path, told(error)),
        };
        let file = find(path).map_err(|error| prefixed(path, error))?;
        let (graph, stores, root) = patiently(async || open(&file).await).await.map_err(refused)?;
        let look = stores.look(NODE).await.map_err(refused)?;
        let size = graph.size_bytes(NODE).map_err(refused)?;
        let left: Result<_> = look.left.iter().map(|path| Ok((path.clone(), lock(path, alone)?))).collect();
        let (notes, damaged) = (notes(path, &look), look.damaged.is_some());
        let Look { mut seen, broken, unreadable, .. } = look;
        for seen in seen.iter_mut().filter(|seen| seen.file == file) {
            seen.file = path.to_owned();
        }
        let image = Image { graph, root, left: left?, damaged, broken, unreadable };
        Ok(Shelf { path: path.to_owned(), size, seen, notes, home: Home::Image(image) })
    }

    /// The granularity of a bitmap for which nobody said one, as QEMU chooses it.
    pub(super) fn granularity(&self) -> Granularity {
        let cluster_bytes = self.graph.node(NODE).map(|node| node.info().cluster_bytes).unwrap_or_default();
        Granularity::default_for((cluster_bytes > 0).then_some(cluster_bytes.into()))
    }

    /// Lets go of an entry that is no bitmap. Says whether there was one of that name.
    pub(super) fn forget_broken(&mut self, name: &str) -> bool {
        let before = self.broken.len();
        self.broken.retain(|(broken, _)| broken != name);
        self.broken.len() < before
    }

    /// Makes these the image's bitmaps, in one step. What was left beside it goes then.
    pub(super) async fn put_away(
        self,
        path: &Path,
        seen: &mut [Seen],
        notes: &mut Vec<String>,
    ) -> Result<()> {
        let stored = match (&self.unreadable, self.broken.first()) {
            (Some(why), _) => Err(format!("its bitmaps cannot be told, so that they would be lost: {why}")),
            (None, Some((name, why))) => {
                Err(format!("what it calls bitmap '{name}' would be lost ({why}); remove that first"))
            }
            (None, None) => {
                let bitmaps: Vec<Arc<Bitmap>> = seen.iter().map(|seen| seen.bitmap.clone()).collect();
                patiently(async || put(&self.graph, NODE, &bitmaps).await).await.map_err(told)
            }
        };
        let mut left = Vec::new();
        if stored.is_ok() {
            // What there was to say of the file that was left is over.
            notes.clear();
            for (at, (file, _lock)) in self.left.iter().enumerate() {
                let aside = file.with_extension("dlbitmaps.damaged");
                let cleared = match self.damaged && at == 0 {
                    true => fs::rename(file, &aside).map(|()| {
                        let (file, aside) = (file.display(), aside.display());
                        notes.push(format!("{file}, which cannot be read, is kept as {aside}"));
                    }),
                    false => fs::remove_file(file),
                };
                if let Err(error) = cleared {
                    left.push(format!("{}: {error}", file.display()));
                }
            }
            for seen in seen.iter_mut().filter(|seen| seen.file != path) {
                let (name, file) = (seen.bitmap.name(), seen.file.display());
                let note = format!(
                    "bitmap '{name}', which a program that was killed left in {file}, is in the image again"
                );
                notes.push(prefixed(path, note));
                (seen.file, seen.durability) = (path.to_owned(), None);
            }
        }
        let closed = self.leave().await;
        stored?;
        closed?;
        match &left[..] {
            [] => Ok(()),
            // They have nothing that the image has not, and whoever opens both knows that.
            left => Err(format!(
                "the image is changed, but a file that was left beside it stays: {}",
                left.join(", ")
            )),
        }
    }

    /// Closes it.
    pub(super) async fn leave(self) -> Result<()> {
        let Image { graph, root, .. } = self;
        drop(root);
        graph.close().await.map_err(told)
    }
}

/// An error without the name of a node that nobody gave.
fn told(error: driveline_graph::Error) -> String {
    match error.kind() {
        // It says who.
        Kind::Busy => in_use(error.message()),
        _ => error.message().to_owned(),
    }
}

/// Opens the image at an absolute path for a reader.
async fn open(file: &Path) -> driveline_graph::Result<(Graph, Arc<Stores>, Root)> {
    let graph = Graph::new(GraphOptions { trace: logging::traces_requests() });
    drivers::register_builtin(&graph);
    let stores = Stores::new(&graph)?;
    let definition = serde_json::json!({
        "driver": "qcow2",
        "node-name": NODE,
        "read-only": true,
        "backing": null,
        "file": { "driver": "file", "path": file },
    });
    let serde_json::Value::Object(definition) = definition else { unreachable!("it is an object") };
    let definition = graph.parse(definition.into_iter().collect(), &[])?;
    let mut change = graph.change().await;
    change.add_nodes(vec![definition]).await?;
    change.commit().await?;
    let root = graph.open_root(NODE, RootOptions::reader("driveline bitmap")).await?;
    Ok((graph, stores, root))
}

/// Tries for a second what locks keep from being done: the kernel may give up those of a program that was killed only some
/// time after it.
async fn patiently<T>(work: impl AsyncFn() -> driveline_graph::Result<T>) -> driveline_graph::Result<T> {
    const PATIENCE: Duration = Duration::from_secs(1);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match work().await {
            Err(error) if error.kind() == Kind::Busy && Instant::now() < deadline => {
                driveline_engine::sleep(PATIENCE / 50).await;
            }
            done => return done,
        }
    }
}

/// The image's path as the program has it that left a file beside it: of a link either the link's or the file's own.
fn find(path: &Path) -> io::Result<PathBuf> {
    let given = std::path::absolute(path)?;
    let own = fs::canonicalize(path)?;
    Ok(if !beside(&given).exists() && beside(&own).exists() { own } else { given })
}

/// What its user should know besides the list.
fn notes(path: &Path, look: &Look) -> Vec<String> {
    let mut notes = look.notes.clone();
    if let Some(left) = look.left.first() {
        notes.push(format!(
            "{} has bitmaps of it: the program that used it was killed, or could not put them into it; the next \
             start, or a change by this tool, brings them home",
            left.display()
        ));
    }
    if let Some(why) = &look.damaged {
        notes.push(format!("they cannot be told from it: {why}"));
    }
    if let Some(why) = &look.unreadable {
        notes.push(format!("the bitmaps in the image cannot be told: {why}"));
    }
    for (name, why) in &look.broken {
        notes.push(format!("what the image calls bitmap '{name}' is none ({why}); it can be removed"));
    }
    notes.iter().map(|note| prefixed(path, note)).collect()
}
