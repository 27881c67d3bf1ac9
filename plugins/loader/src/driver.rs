//! A filter of a plugin, as a driver of the graph.

use abi_stable::std_types::{RNone, RSlice, RStr};
use driveline_abi::{
    ChildArg, FfiError, FilterDescRef, FilterOpsRef, FilterPtr, OpVt, OpenArgs as AbiOpenArgs, default,
    effect,
};
use driveline_graph::{
    BoxFuture, ChildSpec, Description, Driver, DriverKind, Error, Kind, Missing, OpenArgs, OpenChild,
    OpenNode, Options, Result, Role,
};
use driveline_op::{Info, Instance, info, op};
use std::{any::Any, fmt, path::Path, sync::Arc};

/// A filter of a plugin.
pub struct PluginDriver {
    path: Arc<Path>,
    description: Description,
    filter: FilterDescRef,
    slots: Slots,
}

type Slots = [Option<&'static OpVt>; op::COUNT];

impl fmt::Debug for PluginDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PluginDriver")
            .field("name", &self.name())
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// Operation state larger than this is a mistake, or a corrupt table.
const STATE_BYTES_MAX: usize = 1 << 20;
/// No known effect is beyond these bits.
const EFFECTS: u64 = effect::CHANGES_DATA | effect::CHANGES_OFFSETS | effect::OWN_WRITES | effect::NOT_LIVE;

/// The operations that this program knows. What an older plugin lacks is absent.
fn slots(ops: FilterOpsRef) -> Slots {
    [
        ops.read(),
        ops.write(),
        ops.flush(),
        ops.discard(),
        ops.write_zeroes(),
        ops.block_status(),
        ops.cache().flatten(),
    ]
}

fn valid_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.len() <= 64
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

impl PluginDriver {
    /// Looks at a filter's description. The error says what is wrong with it.
    pub(crate) fn new(path: Arc<Path>, filter: FilterDescRef) -> std::result::Result<Self, String> {
        let name = filter.name().as_str();
        if !valid_name(name) {
            return Err("expected a name of lower-case letters, digits and '-', 64 at most".into());
        }
        let missing = match filter.default() {
            default::PASS => Missing::Pass,
            default::DENY => Missing::Deny,
            other => return Err(format!("expected default 0 (pass) or 1 (deny), found {other}")),
        };
        let known = filter.operations_known();
        let slots = slots(filter.ops());
        for (slot, name) in slots.iter().zip(op::NAMES) {
            let Some(vt) = slot else { continue };
            if !vt.align.is_power_of_two() || vt.align > 4096 || vt.size > STATE_BYTES_MAX {
                return Err(format!("operation {name} wants {} bytes aligned to {}", vt.size, vt.align));
            }
        }
        if let Some((_, name)) =
            (known as usize..).zip(op::NAMES.iter().skip(known as usize)).find(|(at, _)| slots[*at].is_some())
        {
            return Err(format!("it says that it knows {known} operations, yet it has {name}"));
        }
        let mut children = vec![ChildSpec::required("child", Role::Filtered)];
        for child in filter.children() {
            let child = child.as_str();
            if !valid_name(child) || children.iter().any(|other| other.name == child) {
                return Err(format!(
                    "expected valid and different names of children, found '{}'",
                    child.escape_debug()
                ));
            }
            children.push(ChildSpec { name: child.to_owned().into(), role: Role::Data, required: true });
        }
        let mut effects = filter.effects();
        if effects & !EFFECTS != 0 {
            // Of a newer version: it may mean anything, so all is assumed.
            effects |= EFFECTS;
        }
        let description = Description {
            name: name.to_owned().into(),
            kind: DriverKind::Filter,
            version: filter.version().to_string().into(),
            summary: filter.summary().to_string().into(),
            children,
            options: (filter.options())().iter().map(|option| option.to_string().into()).collect(),
            operations_known: known,
            missing,
            effects,
            flags_known: u32::MAX,
            child_words: Vec::new(),
            objects: Vec::new(),
        };
        Ok(Self { path, description, filter, slots })
    }

    /// The driver's name in a graph.
    pub fn name(&self) -> &str {
        &self.description.name
    }

    /// The file that it comes from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of the operations that its author wrote, of those that this program knows.
    pub fn operations(&self) -> impl Iterator<Item = &'static str> {
        op::NAMES.into_iter().zip(self.slots).filter(|(_, slot)| slot.is_some()).map(|(name, _)| name)
    }

    fn open_filter(&self, args: &OpenArgs<'_>) -> Result<PluginNode> {
        let children = self.children(&args.children)?;
        let json = json(args.options);
        let arguments = AbiOpenArgs {
            node_name: args.node_name.into(),
            options_json: json.as_str().into(),
            children: RSlice::from_slice(&children),
            cookie: args.cookie,
            saved_state: RNone,
            reserved: [0; 4],
        };
        let filter = (self.filter.open())(&arguments).into_result().map_err(|error| error_of(&error))?;
        let opened = Arc::new(Opened { filter, ops: self.filter.ops() });
        Ok(PluginNode {
            driver: self.name().to_owned(),
            version: self.description.version.to_string(),
            path: self.path.clone(),
            slots: self.slots,
            lacks: self.lacks(),
            opened,
        })
    }

    /// The children by number, as the filter declared them.
    fn children<'a>(&self, given: &'a [OpenChild]) -> Result<Vec<ChildArg<'a>>> {
        let declared = self.description.children.iter();
        if declared.len() != given.len() {
            let names: Vec<_> = declared.map(|child| &*child.name).collect();
            let text = format!("expected the children {}, found {}", names.join(", "), given.len());
            return Err(Error::new(Kind::Invalid, text));
        }
        let pairs = declared.zip(given).map(|(declared, given)| {
            if declared.name == given.name {
                Ok(ChildArg { name: RStr::from_str(&given.name), info: *given.edge.info() })
            } else {
                Err(Error::new(Kind::Invalid, "this child is needed").key(&declared.name))
            }
        });
        pairs.collect()
    }

    /// Bits of `info` that do not hold above the filter, because the operation would not reach the child.
    fn lacks(&self) -> u32 {
        let reaches = |operation: u32| {
            self.slots[operation as usize].is_some()
                || self.description.missing == Missing::Pass && operation < self.description.operations_known
        };
        let mut lacks = 0;
        if !reaches(op::WRITE_ZEROES) {
            lacks |= info::FAST_ZERO;
        }
        if !reaches(op::DISCARD) {
            lacks |= info::DISCARD;
        }
        lacks
    }
}

fn json(options: &Options) -> String {
    serde_json::to_string(options).expect("a JSON object can be written")
}

fn error_of(error: &FfiError) -> Error {
    let kind = Kind::of_errno(error.errno);
    let error_text = error.message.as_str();
    Error::new(kind, error_text).key(error.key.as_str())
}

impl Driver for PluginDriver {
    fn description(&self) -> &Description {
        &self.description
    }

    fn check(&self, options: &Options) -> Result<()> {
        (self.filter.check())(json(options).as_str().into()).into_result().map_err(|error| error_of(&error))
    }

    fn open<'a>(&'a self, args: OpenArgs<'a>) -> BoxFuture<'a, Result<Arc<dyn OpenNode>>> {
        Box::pin(async move { Ok(Arc::new(self.open_filter(&args)?) as Arc<dyn OpenNode>) })
    }
}

/// A filter's state; closed when the last edge to it, and its node, are gone.
struct Opened {
    filter: FilterPtr,
    ops: FilterOpsRef,
}

// SAFETY: the SDK requires filters to be Send + Sync, and the pointer is to one.
unsafe impl Send for Opened {}
// SAFETY: as above.
unsafe impl Sync for Opened {}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: the pointer came from this filter's `open`; who could call it held this, so nobody can.
        unsafe { (self.ops.close())(self.filter) };
    }
}

/// An open node of a plugin's filter.
struct PluginNode {
    driver: String,
    version: String,
    path: Arc<Path>,
    slots: Slots,
    lacks: u32,
    opened: Arc<Opened>,
}

impl OpenNode for PluginNode {
    fn instance(&self) -> Instance {
        let keep: Arc<dyn Any + Send + Sync> = self.opened.clone();
        // SAFETY: the operations are those of the filter that the pointer is to, which `keep` keeps open.
        unsafe { Instance::foreign(self.opened.filter.0, self.slots, keep) }
    }

    fn info(&self, children: &[Info]) -> Info {
        let mut info = children[0];
        if let Some(size) = self.opened.ops.size() {
            // SAFETY: the filter is open.
            info.size_bytes = unsafe { size(self.opened.filter, info.size_bytes) };
        }
        info.flags &= !self.lacks;
        info
    }

    fn details(&self) -> serde_json::Value {
        serde_json::json!({ "filter": self.driver, "version": self.version, "plugin": self.path.to_string_lossy() })
    }
}

pub(crate) fn announce(path: &Path, drivers: &[Arc<PluginDriver>]) {
    let names: Vec<_> = drivers.iter().map(|driver| driver.name()).collect();
    tracing::debug!(path = %path.display(), filters = names.join(", "), "plugin loaded");
}
