//! A TOML file that describes a whole graph: what it says, and everything that is wrong with it.
//!
//! | table | key | default | meaning |
//! |---|---|---|---|
//! | `[plugins]` | `path` | none | directories with filters, or libraries; looked at before other places |
//! | `[engine]` | `threads` | processors, 2 at most | I/O threads |
//! | | `backend` | `"auto"` | `"io_uring"`, `"epoll"`, or the first of them that there is |
//! | `[node.NAME]` | `driver` | required | what makes the node work |
//! | | `read-only` | `false` | nothing may be written |
//! | | *a child* | | the name of a node, or a table that defines one; the file of a format may be a path, and `backing = false` says that there is none |
//! | | *an option* | | see the driver |
//! | `[drive.NAME]` | `root` | required | the node that the drive leads to at first |
//! | | `bitmaps` | none | tables with `name`, `granularity`, `view` (`"drive"` or `"node"`), `recording`, `persistent`, `durability` (`"volatile"`, `"process"` or `"power"`: what a persistent one survives) |
//! | | `bitmap-store` | see below | where persistent bitmaps are kept: `"qcow2:NODE"` or `"file:PATH"` |
//! | | `holder` | `"when-needed"` | `"permanent"`: its bitmaps stay on a holder of its own |
//! | | `on-restart` | `"resume"` | what becomes of its jobs when the program is killed and started again: `"drop"` gives them up |
//! | `[export.NAME]` | `type` | required | `"nbd"` |
//! | | `drive` or `node` | required | what is served |
//! | | `socket` or `listen` | required | a unix socket, or `"host:port"`; several exports may share one |
//! | | `name` | NAME | the name that clients ask for |
//! | | `writable` | `false` | clients may write |
//! | | `bitmaps` | none | names of the drive's bitmaps that clients may look at |
//! | | `allocation-depth` | `false` | clients may ask in which layer data is |
//! | | `description` | none | a text that clients show |
//! | | `tls` | none | the socket is for clients of TLS, with these credentials; the same for all exports of a socket |
//! | `[tls.NAME]` | `dir` | required | a directory of certificates, with the names of files that QEMU has |
//! | | `endpoint` | `"client"` | `"server"`: for exports; `"client"`: for nodes (`tls-creds`) |
//! | | `verify-peer` | `true` | the other side has to show a certificate of the authority |
//! | | `sanity-check` | `true` | the certificates are checked when they are loaded |
//! | `[monitor]` | `qmp` or `listen` | required | a unix socket, or `"host:port"`, where QMP is spoken |
//!
//! Persistent bitmaps are kept in the top image of their drive if that is a writable qcow2 image of version 3, else in a file
//! `NAME.dlbitmaps` beside the lowest image, where NAME is the drive's.
//!
//! Paths are relative to the file.
//!
//! Reading has two steps, because drivers come from plugins that the file names: [`Config::parse`] reads what needs no
//! driver, and [`Config::check`] holds the nodes against the drivers and names against each other. Both put what they
//! find into one list of [`Mistakes`], so that all of them are seen at once.

mod cycles;
mod links;
mod mistake;
mod nodes;
mod section;
mod sections;
mod value;

pub use mistake::{Mistake, Mistakes, Span};
pub use sections::{
    Address, BitmapSection, DriveSection, EngineSection, ExportSection, ExportTarget, NodeSection,
    StorePlace, TlsSection,
};
pub use toml::Spanned;
pub use value::{Table, Value};

use driveline_graph::{Definition, Graph, Options};
use section::Section;
use std::path::{Path, PathBuf};

/// What a file says. Parts that are wrong are left out; then there are [`Mistakes`], and it is not to be run.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The file.
    pub file: PathBuf,
    /// Its directory, absolute: where its relative paths start.
    pub directory: PathBuf,
    /// Where filters are looked for: directories or libraries.
    pub plugins: Vec<Spanned<PathBuf>>,
    /// The I/O threads.
    pub engine: EngineSection,
    /// The nodes, in the order of the file.
    pub nodes: Vec<NodeSection>,
    /// The drives.
    pub drives: Vec<DriveSection>,
    /// The exports.
    pub exports: Vec<ExportSection>,
    /// Credentials for TLS.
    pub tls: Vec<TlsSection>,
    /// Where QMP is spoken.
    pub monitor: Option<Spanned<Address>>,
}

impl Config {
    /// Reads a file. Errors: it cannot be read; mistakes in it are no error here.
    pub fn read(file: &Path) -> std::io::Result<(Self, Mistakes)> {
        let text = std::fs::read_to_string(file)?;
        Ok(Self::parse(file, &text))
    }

    /// Reads the text of a file.
    pub fn parse(file: &Path, text: &str) -> (Self, Mistakes) {
        let mut mistakes = Mistakes::new(file, text);
        let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
        let directory = file.parent().unwrap_or(Path::new("/")).to_owned();
        let mut config = Self { file, directory, ..Self::default() };
        let root = Value::Table(value::parse(text, &mut mistakes));
        let root = Spanned::new(0..0, root);
        let mut top = Section::new("the file", 0..0, &root, &mut mistakes);
        let parts =
            ["plugins", "engine", "tls", "node", "drive", "export", "monitor"].map(|name| top.take(name));
        top.finish();
        for (key, value) in parts.into_iter().flatten() {
            config.read_part(key, value, &mut mistakes);
        }
        (config, mistakes)
    }

    /// Holds the nodes against the drivers that `graph` knows, and all names against each other.
    pub fn check(&self, graph: &Graph, mistakes: &mut Mistakes) {
        nodes::check(self, graph, mistakes);
        links::check(self, mistakes);
    }

    /// The nodes, as the graph takes them. Errors: what [`Config::check`] would have found.
    pub fn definitions(&self, graph: &Graph) -> driveline_graph::Result<Vec<Definition>> {
        let names: Vec<&str> = self.nodes.iter().map(|node| node.name.get_ref().as_str()).collect();
        self.nodes.iter().map(|node| graph.parse(node.options(), &names)).collect()
    }

    /// A path of the file, made absolute.
    pub fn path(&self, path: &Path) -> PathBuf {
        self.directory.join(path)
    }
}

impl NodeSection {
    /// The node as a JSON object, its name included.
    pub fn options(&self) -> Options {
        let Value::Table(table) = self.value.get_ref() else { return Options::new() };
        let mut options = Options::new();
        options.insert("node-name".into(), self.name.get_ref().as_str().into());
        options.extend(nodes::to_options(table));
        options
    }
}

impl Config {
    /// The place in the file that an error of the graph is about, if it names a node of the file.
    pub fn locate(&self, error: &driveline_graph::Error) -> Option<Mistake> {
        let name = error.node()?;
        let node = self.nodes.iter().find(|node| node.name.get_ref() == name)?;
        let mut span = node.name.span();
        let (mut table, keys) = (&node.value, error.option().unwrap_or_default());
        for key in keys.split('.') {
            let Value::Table(inner) = table.get_ref() else { break };
            let Some((_, value)) = value::get(inner, key) else { break };
            span = value.span();
            table = value;
        }
        let message = match keys {
            "" => format!("node '{name}': {}", error.message()),
            keys => format!("'{keys}' of node '{name}': {}", error.message()),
        };
        Some(Mistake::new(span, message))
    }
}
