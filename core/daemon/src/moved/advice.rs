//! What to write into a configuration when its drive went on with another image, so that it shows the same data again.

use std::fmt;

/// What a drive's image and the one that it went on with are to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Relation {
    /// The other is a copy.
    Copy,
    /// The other was below it: it was committed.
    Below,
    /// The other is put on top of it: a snapshot.
    Above,
}

/// What in a configuration names the image of a drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Lead {
    /// The root of the drive.
    Root,
    /// The lowest filter of the drive: its node, and the option.
    Filter(String, String),
}

/// The image that a drive went on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) driver: String,
    /// Its file.
    pub(crate) file: String,
    /// Driver and file of what backs it.
    pub(crate) backing: Option<(String, String)>,
}

/// What is to be written; it displays itself.
#[derive(Debug)]
pub(crate) struct Advice<'a> {
    pub(crate) drive: &'a str,
    pub(crate) lead: &'a Lead,
    /// The node of the image that the drive left.
    pub(crate) old: &'a str,
    pub(crate) relation: Relation,
    pub(crate) image: &'a Image,
    /// The node that the configuration has of it already.
    pub(crate) known: Option<&'a str>,
    /// The node that the configuration has of what backs it.
    pub(crate) backing_known: Option<&'a str>,
}

impl Advice<'_> {
    /// `root = "NAME" in [drive.vda]`.
    fn leads_to(&self, name: &str) -> String {
        match self.lead {
            Lead::Root => format!("root = {name:?} in [drive.{}]", self.drive),
            Lead::Filter(node, option) => format!("{option} = {name:?} in [node.{node}]"),
        }
    }

    /// All that says what the image is. An image that has no backing must not be given one: it would show that where it has nothing.
    fn definition(&self) -> String {
        let Image { driver, file, backing } = self.image;
        let below = match (backing, self.backing_known) {
            _ if self.relation == Relation::Above => format!(", backing = {:?}", self.old),
            (Some(_), Some(node)) => format!(", backing = {node:?}"),
            (Some((driver, file)), None) => {
                format!(", backing = {{ driver = {driver:?}, file = {file:?}, read-only = true }}")
            }
            (None, _) if driver == "qcow2" => ", backing = false".to_owned(),
            (None, _) => String::new(),
        };
        format!("driver = {driver:?}, file = {file:?}{below}")
    }
}

impl fmt::Display for Advice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.known, self.relation) {
            (Some(node), Relation::Below) => {
                write!(f, "write {}, and let [node.{node}] be no more read-only", self.leads_to(node))
            }
            (Some(node), _) => write!(f, "write {}", self.leads_to(node)),
            // What was above a base that was committed to must not open that once more.
            (None, Relation::Copy | Relation::Below) => {
                write!(f, "write {} and nothing else in [node.{}]", self.definition(), self.old)
            }
            (None, _) => {
                write!(f, "write [node.NAME] with {}, and {}", self.definition(), self.leads_to("NAME"))
            }
        }
    }
}
