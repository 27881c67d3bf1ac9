//! Names of a file against each other: what drives, exports and the monitor refer to.

use super::{
    Config,
    mistake::{Mistake, Mistakes},
    sections::{Address, DriveSection, ExportSection, ExportTarget, StorePlace},
    value::{Value, get},
};
use driveline_transport::Endpoint;
use std::collections::BTreeMap;
use toml::Spanned;

/// What protects a socket is known, made for a server, and the same for all exports there.
fn check_tls<'c>(
    config: &'c Config,
    export: &'c ExportSection,
    secured: &mut BTreeMap<&'c Address, &'c ExportSection>,
    mistakes: &mut Mistakes,
) {
    let id = export.id.get_ref();
    let name = |export: &ExportSection| export.tls.as_ref().map(|name| name.get_ref().clone());
    let first = *secured.entry(export.address.get_ref()).or_insert(export);
    if name(first) != name(export) {
        let message =
            format_args!("exports '{}' and '{id}' share a socket, but not 'tls'", first.id.get_ref());
        mistakes.add(Mistake::new(export.address.span(), message));
    }
    let Some(tls) = &export.tls else { return };
    match config.tls.iter().find(|section| section.name.get_ref() == tls.get_ref()) {
        Some(found) if found.creds.endpoint == Endpoint::Server => {}
        Some(found) => {
            let message = format_args!("export '{id}' needs credentials for a server");
            let help = format_args!("write endpoint = \"server\" in [tls.{}]", found.name.get_ref());
            mistakes.add(Mistake::new(tls.span(), message).help(help));
        }
        None => {
            let message =
                format_args!("export '{id}' has TLS credentials '{}' that there are not", tls.get_ref());
            let known = config.tls.iter().map(|section| section.name.get_ref().as_str());
            mistakes.add(Mistake::new(tls.span(), message).nearest(tls.get_ref(), known));
        }
    }
}

/// Checks drives, exports and the monitor.
pub(super) fn check(config: &Config, mistakes: &mut Mistakes) {
    let nodes = config.nodes.iter().map(|node| node.name.get_ref().as_str());
    let drives = config.drives.iter().map(|drive| drive.name.get_ref().as_str());
    for drive in &config.drives {
        let (name, root) = (&drive.name, &drive.root);
        if nodes.clone().any(|node| node == name.get_ref()) {
            let message =
                format_args!("there is a node '{}' too; nodes and drives share their names", name.get_ref());
            mistakes.add(Mistake::new(name.span(), message).label("a second one"));
        }
        if !nodes.clone().any(|node| node == root.get_ref()) {
            let message = format_args!(
                "drive '{}' leads to a node '{}' that there is not",
                name.get_ref(),
                root.get_ref()
            );
            mistakes.add(Mistake::new(root.span(), message).nearest(root.get_ref(), nodes.clone()));
        }
        check_store(drive, nodes.clone(), mistakes);
    }
    check_same_store(config, mistakes);
    check_same_disk(config, mistakes);
    check_same_image(config, mistakes);
    let mut taken: BTreeMap<(&Address, &str), &str> = BTreeMap::new();
    let mut secured: BTreeMap<&Address, &ExportSection> = BTreeMap::new();
    for export in &config.exports {
        let id = export.id.get_ref();
        check_tls(config, export, &mut secured, mistakes);
        let (known, kind, name): (Vec<&str>, _, _) = match &export.target {
            ExportTarget::Drive(name) => (drives.clone().collect(), "drive", name),
            ExportTarget::Node(name) => (nodes.clone().collect(), "node", name),
        };
        if known.contains(&name.get_ref().as_str()) {
            check_bitmaps(config, export, mistakes);
            check_writable(config, export, mistakes);
        } else {
            let message =
                format_args!("export '{id}' serves a {kind} '{}' that there is not", name.get_ref());
            mistakes.add(Mistake::new(name.span(), message).nearest(name.get_ref(), known.into_iter()));
        }
        if let Some(other) = taken.insert((export.address.get_ref(), export.name.get_ref()), id) {
            let message = format_args!(
                "export '{id}' has the socket of export '{other}', and the same name '{}'",
                export.name.get_ref()
            );
            let mistake = Mistake::new(export.address.span(), message);
            mistakes.add(mistake.help("give one of them another 'name' or another socket"));
        }
    }
    if let Some(monitor) = &config.monitor
        && let Some(export) =
            config.exports.iter().find(|export| export.address.get_ref() == monitor.get_ref())
    {
        let message = format_args!("the monitor listens where export '{}' does", export.id.get_ref());
        mistakes.add(Mistake::new(monitor.span(), message));
    }
}

/// The image that a drive's bitmaps are kept in is a node.
fn check_store<'a>(
    drive: &DriveSection,
    nodes: impl Iterator<Item = &'a str> + Clone,
    mistakes: &mut Mistakes,
) {
    let Some(store) = &drive.store else { return };
    if let StorePlace::Qcow2(node) = store.get_ref()
        && !nodes.clone().any(|name| name == node)
    {
        let name = drive.name.get_ref();
        let message = format_args!("bitmaps of drive '{name}' are kept in a node '{node}' that there is not");
        mistakes.add(Mistake::new(store.span(), message).nearest(node, nodes));
    }
}

/// A place has the bitmaps of one drive.
fn check_same_store(config: &Config, mistakes: &mut Mistakes) {
    for (at, drive) in config.drives.iter().enumerate() {
        let Some(store) = &drive.store else { continue };
        let same = |other: &&DriveSection| {
            other.store.as_ref().is_some_and(|other| other.get_ref() == store.get_ref())
        };
        if let Some(other) = config.drives[..at].iter().find(same) {
            let message =
                format_args!("{} has the bitmaps of drive '{}'", store.get_ref(), other.name.get_ref());
            mistakes.add(Mistake::new(store.span(), message).label("the second drive"));
        }
    }
}

/// A disk has one drive: the bitmaps on its way would be both drives', and would not see what comes in by the other.
fn check_same_disk(config: &Config, mistakes: &mut Mistakes) {
    for (at, drive) in config.drives.iter().enumerate() {
        let shown = shown_by(config, drive);
        if let Some(other) = config.drives[..at].iter().find(|other| shown_by(config, other) == shown) {
            let (name, other) = (drive.name.get_ref(), other.name.get_ref());
            let message = format_args!("drive '{name}' is the same disk as drive '{other}', node '{shown}'");
            let help = format_args!(
                "a disk has one drive, and as many exports as are wanted: export drive '{other}' once more"
            );
            mistakes.add(Mistake::new(drive.root.span(), message).help(help));
        }
    }
}

/// The node whose data a drive shows: below its filters, as far as the file says it.
fn shown_by<'c>(config: &'c Config, drive: &'c DriveSection) -> &'c str {
    let mut name = drive.root.get_ref().as_str();
    // As many steps as there are nodes: the file may have a cycle.
    for _ in &config.nodes {
        let Some(node) = config.nodes.iter().find(|node| node.name.get_ref() == name) else { break };
        let Value::Table(table) = node.value.get_ref() else { break };
        match get(table, "child").map(|(_, value)| value.get_ref()) {
            Some(Value::String(below)) => name = below,
            _ => break,
        }
    }
    name
}

/// An image has room for the bitmaps of one drive. (Other formats have none, and each drive has a file of its name.)
fn check_same_image(config: &Config, mistakes: &mut Mistakes) {
    let keeps = |drive: &&DriveSection| {
        drive.store.is_none() && drive.bitmaps.iter().any(|bitmap| bitmap.durability.is_some())
    };
    let keepers: Vec<&DriveSection> = config.drives.iter().filter(keeps).collect();
    for (at, drive) in keepers.iter().enumerate() {
        let Some(image) = image_of(config, drive.root.get_ref()) else { continue };
        let same = |other: &&&DriveSection| {
            image_of(config, other.root.get_ref()) == Some(image)
                && shown_by(config, other) != shown_by(config, drive)
        };
        if let Some(other) = keepers[..at].iter().find(same) {
            let (name, other) = (drive.name.get_ref(), other.name.get_ref());
            let message = format_args!(
                "drives '{other}' and '{name}' would both keep their bitmaps in the image of node '{image}'"
            );
            let help = format_args!("write bitmap-store = \"file:PATH\" in [drive.{name}]");
            mistakes.add(Mistake::new(drive.name.span(), message).help(help));
        }
    }
}

/// The qcow2 node that a node is or shows, as far as the file says it.
fn image_of<'c>(config: &'c Config, node: &str) -> Option<&'c str> {
    let mut name = node;
    // As many steps as there are nodes: the file may have a cycle.
    for _ in &config.nodes {
        let node = config.nodes.iter().find(|node| node.name.get_ref() == name)?;
        let Value::Table(table) = node.value.get_ref() else { return None };
        let text = |key: &str| match get(table, key).map(|(_, value)| value.get_ref()) {
            Some(Value::String(text)) => Some(text.as_str()),
            _ => None,
        };
        if text("driver") == Some("qcow2") {
            return Some(node.name.get_ref());
        }
        name = text("child").or(text("file"))?;
    }
    None
}

/// An export shows bitmaps of its drive, or of the drives whose root its node is.
fn check_bitmaps(config: &Config, export: &ExportSection, mistakes: &mut Mistakes) {
    let target = export.target.name().get_ref();
    let of_drive = |drive: &&super::DriveSection| match &export.target {
        ExportTarget::Drive(_) => drive.name.get_ref() == target,
        ExportTarget::Node(_) => drive.root.get_ref() == target,
    };
    let known: Vec<&str> = config
        .drives
        .iter()
        .filter(of_drive)
        .flat_map(|drive| drive.bitmaps.iter().map(|bitmap| bitmap.name.get_ref().as_str()))
        .collect();
    for (index, bitmap) in export.bitmaps.iter().enumerate() {
        if !known.contains(&bitmap.get_ref().as_str()) {
            let message = format_args!("'{target}' has no bitmap '{}'", bitmap.get_ref());
            mistakes
                .add(Mistake::new(bitmap.span(), message).nearest(bitmap.get_ref(), known.iter().copied()));
        }
        if export.bitmaps[..index].iter().any(|other| other.get_ref() == bitmap.get_ref()) {
            let message = format_args!("bitmap '{}' is exported twice", bitmap.get_ref());
            mistakes.add(Mistake::new(bitmap.span(), message));
        }
    }
}

/// A writable export of a node that says it is read-only.
fn check_writable(config: &Config, export: &ExportSection, mistakes: &mut Mistakes) {
    let find = |name: &str| config.nodes.iter().find(|node| node.name.get_ref() == name);
    let name = match &export.target {
        ExportTarget::Drive(name) => {
            let drive = config.drives.iter().find(|drive| drive.name.get_ref() == name.get_ref());
            drive.map(|drive| drive.root.get_ref().as_str())
        }
        ExportTarget::Node(name) => Some(name.get_ref().as_str()),
    };
    let Some(node) = name.and_then(find) else { return };
    let Value::Table(table) = node.value.get_ref() else { return };
    let read_only: Option<&Spanned<Value>> = get(table, "read-only").map(|(_, value)| value);
    if let Some(flag) = read_only.filter(|flag| export.writable && *flag.get_ref() == Value::Boolean(true)) {
        let (id, node) = (export.id.get_ref(), node.name.get_ref());
        let message =
            format_args!("export '{id}' is writable, and node '{node}' that it leads to is read-only");
        mistakes.add(Mistake::new(flag.span(), message));
    }
}
