//! `driveline bitmap` and `driveline map`: bitmaps between two runs of the program.

mod export;
mod image;
mod shelf;
mod show;
mod sidecar;
mod source;

use self::{
    shelf::{Shelf, Shown, same_file},
    source::Source,
};
use super::{fail, print};
use crate::{
    cli::{Bitmap as Command, Map},
    stores::Trust,
};
use driveline_bitmap::{Bitmap, Durability, Granularity};
use driveline_engine::{Config, Engine};
use std::{io::Write, path::Path, process::ExitCode, sync::Arc};

/// What is printed when something fails: the file, what was found, what was expected.
type Result<T> = std::result::Result<T, String>;

/// Looks at the bitmaps of a file, or changes them.
pub fn bitmap(command: Command) -> ExitCode {
    on_engine(|| work(command))
}

/// Prints what is dirty.
pub fn map(map: &Map) -> ExitCode {
    let map = map.clone();
    on_engine(|| async move {
        let shelf = Shelf::look(&map.file).await?;
        let (shown, bitmap) = shelf.leave_with(|shelf| shelf.valid(&map.bitmap)).await?;
        show::say(&shown.notes);
        export::to_stdout(|out| match map.json {
            true => show::write_areas(bitmap.bits(), out).and_then(|()| writeln!(out)),
            false => show::write_table(bitmap.bits(), out),
        })
    })
}

/// Runs a command where images can be opened, and prints what it returns.
fn on_engine<F>(command: impl FnOnce() -> F + Send) -> ExitCode
where
    F: Future<Output = Result<String>>,
{
    let engine = match Engine::start(Config { threads: 1, ..Config::default() }) {
        Ok(engine) => engine,
        Err(error) => return fail(format_args!("the engine does not start: {error}")),
    };
    let done = engine.block_on_local(command);
    engine.shutdown();
    match done {
        Ok(text) => print(&text),
        Err(message) => fail(message),
    }
}

async fn work(command: Command) -> Result<String> {
    match command {
        Command::List { shelf } => {
            let shown = Shelf::look(&shelf.file).await?.leave().await?;
            Ok(match shelf.json {
                true => show::json(&shown),
                false => show::list(&shown),
            })
        }
        Command::Add { one, granularity, disabled, durability } => {
            let new = New { granularity, disabled, durability };
            change(&one.shelf, |shelf| add(shelf, &one.name, &new)).await
        }
        Command::Remove { one } => {
            let done = format!("bitmap '{}' is removed", one.name);
            change(&one.shelf, |shelf| shelf.remove(&one.name).map(|()| done)).await
        }
        Command::Clear { one } => on_bitmap(&one, "clean", Bitmap::clear).await,
        Command::Enable { one } => on_bitmap(&one, "enabled", Bitmap::enable).await,
        Command::Disable { one } => on_bitmap(&one, "disabled", Bitmap::disable).await,
        Command::Adopt { one } => change(&one.shelf, |shelf| adopt(shelf, &one.name)).await,
        Command::Merge { shelf, sources, into } => {
            let others = read_sources(&shelf.file, &sources).await?;
            change(&shelf, |shelf| merge(shelf, &others, &into)).await
        }
        Command::Move { one, to } => move_to(&one.shelf, &one.name, &to).await,
        Command::Export { file, name, output, format } => {
            let shelf = Shelf::look(&file).await?;
            let (shown, bitmap) = shelf.leave_with(|shelf| shelf.valid(&name)).await?;
            show::say(&shown.notes);
            export::export(&bitmap, &output, format)
        }
    }
}

/// Opens a file, changes it, and puts it away; what fails leaves it as it was.
async fn change(to: &crate::cli::Shelf, work: impl FnOnce(&mut Shelf) -> Result<String>) -> Result<String> {
    let mut shelf = Shelf::open(&to.file).await?;
    let doubts = shelf.doubts();
    let done = match work(&mut shelf) {
        Ok(done) => done,
        Err(message) => {
            shelf.leave().await?;
            return Err(message);
        }
    };
    let shown = shelf.put_away().await?;
    Ok(report(&shown, &doubts, &done, to.json))
}

/// What is printed after a change.
fn report(shown: &Shown, doubts: &[String], done: &str, json: bool) -> String {
    if json {
        return show::json(shown);
    }
    show::say(doubts);
    show::say(&shown.notes);
    format!("{}: {done}\n", shown.path.display())
}

async fn on_bitmap(
    one: &crate::cli::One,
    becomes: &str,
    work: impl FnOnce(&Bitmap) -> driveline_bitmap::Result<()>,
) -> Result<String> {
    change(&one.shelf, |shelf| {
        let bitmap = shelf.valid(&one.name)?;
        work(&bitmap).map_err(|error| shelf.error(error))?;
        if bitmap.bits().is_clean() {
            shelf.trust(&one.name, &Trust::Exact);
        }
        Ok(format!("bitmap '{}' is {becomes}", one.name))
    })
    .await
}

/// What a new bitmap is to be.
struct New {
    granularity: Option<Granularity>,
    disabled: bool,
    durability: Option<Durability>,
}

fn add(shelf: &mut Shelf, name: &str, new: &New) -> Result<String> {
    let bitmap = shelf.new_bitmap(name, new.granularity)?.with_recording(!new.disabled);
    let done = format!("bitmap '{name}' is added, with a granularity of {}", bitmap.granularity());
    shelf.add(bitmap, new.durability)?;
    Ok(done)
}

fn adopt(shelf: &mut Shelf, name: &str) -> Result<String> {
    let bitmap = shelf.find(name)?.bitmap.clone();
    if !bitmap.is_inconsistent() {
        let expected = "expected one whose contents are lost";
        return Err(shelf.error(format_args!("the contents of bitmap '{name}' are valid; {expected}")));
    }
    bitmap.adopt().map_err(|error| shelf.error(error))?;
    shelf.trust(name, &Trust::AllDirty { reason: "its contents were lost, and it was adopted".to_owned() });
    Ok(format!("bitmap '{name}' is all dirty, and records"))
}

/// Looks at the sources of a merge that are not of the file itself. None: it is.
async fn read_sources(own: &Path, sources: &[String]) -> Result<Vec<(String, Option<Arc<Bitmap>>)>> {
    let mut read = Vec::new();
    let shelf = Shelf::look(own).await?.leave().await?;
    let is_own = |name: &str| shelf.seen.iter().any(|seen| seen.bitmap.name() == *name);
    for source in sources {
        read.push(match Source::parse(source, is_own, |path| path.is_file()) {
            Source::Own(name) => (name, None),
            Source::Other(file, name) if same_file(&file, own) => (name, None),
            Source::Other(file, name) => {
                let other = Shelf::look(&file).await?;
                let (shown, bitmap) = other.leave_with(|other| other.valid(&name)).await?;
                show::say(&shown.notes);
                (source.clone(), Some(bitmap))
            }
        });
    }
    Ok(read)
}

fn merge(shelf: &mut Shelf, sources: &[(String, Option<Arc<Bitmap>>)], into: &str) -> Result<String> {
    let target = shelf.valid(into)?;
    let mut bitmaps = Vec::new();
    for (name, other) in sources {
        let bitmap = match other {
            Some(other) => other.clone(),
            None => shelf.valid(name)?,
        };
        target.check_merge(&bitmap).map_err(|error| shelf.error(error))?;
        bitmaps.push(bitmap);
    }
    for bitmap in bitmaps.iter().filter(|bitmap| bitmap.id() != target.id()) {
        target.merge_from(bitmap).map_err(|error| shelf.error(error))?;
    }
    let names: Vec<String> = sources.iter().map(|(name, _)| format!("'{name}'")).collect();
    Ok(format!("bitmap '{into}' has what is dirty in {}, too", names.join(", ")))
}

/// Moves a bitmap: it is durable there before it goes here.
async fn move_to(from: &crate::cli::Shelf, name: &str, to: &Path) -> Result<String> {
    if same_file(&from.file, to) {
        return Err(shelf::prefixed(to, "bitmaps are moved to another file, and this is the same one"));
    }
    let mut source = Shelf::open(&from.file).await?;
    let doubts = source.doubts();
    if let Err(message) = copy_to(&source, name, to).await {
        source.leave().await?;
        return Err(message);
    }
    let gone = source.remove(name);
    let both =
        |message: String| format!("bitmap '{name}' is in {} now, but here too: {message}", to.display());
    if let Err(message) = gone {
        source.leave().await?;
        return Err(both(message));
    }
    let shown = source.put_away().await.map_err(both)?;
    Ok(report(&shown, &doubts, &format!("bitmap '{name}' is in {}", to.display()), from.json))
}

async fn copy_to(source: &Shelf, name: &str, to: &Path) -> Result<()> {
    let bitmap = source.valid(name)?;
    let durability = source.find(name)?.durability;
    let mut target = Shelf::open_or_create(to, source.size).await?;
    let copied = target.new_bitmap(name, Some(bitmap.granularity())).and_then(|copy| {
        let copy = copy.with_recording(bitmap.is_recording());
        bitmap.bits().iter_dirty().for_each(|range| copy.mark_unconditionally(range));
        if bitmap.length() != target.size {
            return Err(target.wrong_size(&bitmap));
        }
        target.add(copy, durability.filter(|_| target.keeps_durability()))
    });
    match copied {
        Ok(()) => {
            let shown = target.put_away().await?;
            show::say(&shown.notes);
            Ok(())
        }
        Err(message) => {
            target.leave().await?;
            Err(message)
        }
    }
}
