//! What there is to say about a plugin, for people and programs.

use crate::{LoadError, Plugin, PluginDriver, load};
use driveline_abi::effect;
use driveline_graph::{Driver, Missing};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A plugin and its filters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PluginReport {
    /// The file.
    pub path: PathBuf,
    /// The version of the ABI that it was built for.
    pub abi_version: String,
    /// Its filters.
    pub filters: Vec<FilterReport>,
}

/// A filter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FilterReport {
    /// The driver's name in a graph.
    pub name: String,
    /// Its version.
    pub version: String,
    /// One line.
    pub summary: String,
    /// The options that it accepts.
    pub options: Vec<String>,
    /// Its children.
    pub children: Vec<String>,
    /// The operations that its author wrote.
    pub operations: Vec<String>,
    /// How many operations its SDK knew.
    pub operations_known: u32,
    /// What becomes of known ones that it leaves out: `pass` or `deny`.
    pub default: String,
    /// Its declared effects.
    pub effects: Vec<String>,
}

impl PluginReport {
    /// What there is to say about a plugin.
    pub fn of(plugin: &Plugin) -> Self {
        Self {
            path: plugin.path.clone(),
            abi_version: plugin.abi_version.clone(),
            filters: plugin.drivers().iter().map(|driver| FilterReport::of(driver)).collect(),
        }
    }
}

impl FilterReport {
    /// What there is to say about a filter.
    pub fn of(driver: &PluginDriver) -> Self {
        let description = driver.description();
        let effects = [
            (effect::CHANGES_DATA, "changes-data"),
            (effect::CHANGES_OFFSETS, "changes-offsets"),
            (effect::OWN_WRITES, "own-writes"),
            (effect::NOT_LIVE, "not-live"),
        ];
        Self {
            name: description.name.to_string(),
            version: description.version.to_string(),
            summary: description.summary.to_string(),
            options: description.options.iter().map(ToString::to_string).collect(),
            children: description.children.iter().map(|child| child.name.to_string()).collect(),
            operations: driver.operations().map(str::to_owned).collect(),
            operations_known: description.operations_known,
            default: match description.missing {
                Missing::Pass => "pass".to_owned(),
                Missing::Deny => "deny".to_owned(),
            },
            effects: effects
                .iter()
                .filter(|(bit, _)| description.effects & bit != 0)
                .map(|(_, name)| (*name).to_owned())
                .collect(),
        }
    }
}

/// Loads a plugin into this process and tells about it.
pub fn inspect(path: &Path) -> Result<PluginReport, LoadError> {
    load(path).map(PluginReport::of)
}
