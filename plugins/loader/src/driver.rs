//! A filter of a plugin, as a driver of the graph.

use abi_stable::std_types::{RNone, RSlice, RStr, RString};
use driveline_abi::{
    ChildArg, FfiError, FilterDescRef, FilterOpsRef, FilterPtr, OpVt, OpenArgs as AbiOpenArgs, default,
    effect, object,
};
use driveline_graph::{
    BoxFuture, ChildSpec, Description, Driver, DriverKind, Error, Kind, Missing, ObjectCall, OpenArgs,
    OpenChild, OpenNode, Options, Permissions, Result, Role,
};
use driveline_op::{Ask, Buffer, Call, Edge, Info, Instance, Target, flag, info, op};
use std::{any::Any, borrow::Cow, fmt, path::Path, sync::Arc};

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
        ops.resize().flatten(),
        ops.event().flatten(),
    ]
}

fn names(names: RSlice<'static, RStr<'static>>) -> Vec<Cow<'static, str>> {
    names.iter().map(|name| name.to_string().into()).collect()
}

fn check_table(vt: &OpVt, name: &str) -> std::result::Result<(), String> {
    if !vt.align.is_power_of_two() || vt.align > 4096 || vt.size > STATE_BYTES_MAX {
        return Err(format!("operation {name} wants {} bytes aligned to {}", vt.size, vt.align));
    }
    Ok(())
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
            check_table(vt, name)?;
        }
        for (name, vt) in [("begin", filter.ops().begin()), ("settle", filter.ops().settle())] {
            if let Some(vt) = vt.flatten() {
                check_table(vt, name)?;
            }
        }
        if let Some((_, name)) =
            (known as usize..).zip(op::NAMES.iter().skip(known as usize)).find(|(at, _)| slots[*at].is_some())
        {
            return Err(format!("it says that it knows {known} operations, yet it has {name}"));
        }
        let mut children = vec![ChildSpec::required("child", Role::Filtered)];
        let optional = filter.children_optional().unwrap_or_default();
        let declared = filter.children().into_iter().map(|child| (child, true));
        for (child, required) in declared.chain(optional.into_iter().map(|child| (child, false))) {
            let child = child.as_str();
            if !valid_name(child) || children.iter().any(|other| other.name == child) {
                return Err(format!(
                    "expected valid and different names of children, found '{}'",
                    child.escape_debug()
                ));
            }
            children.push(ChildSpec {
                name: child.to_owned().into(),
                role: Role::Data,
                required,
                list: false,
            });
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
            options: names((filter.options())()),
            operations_known: known,
            missing,
            effects,
            flags_known: filter.flags_known().unwrap_or(flag::KNOWN_BEFORE_1_2),
            child_words: names(filter.child_words().unwrap_or_default()),
            objects: names(filter.objects().unwrap_or_default()),
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
            last_failure: self.filter.last_failure(),
            cookie: args.cookie,
            children: children.len(),
            opened,
        })
    }

    /// The children by number, as the filter declared them. (The graph has them in that order.)
    fn children<'a>(&self, given: &'a [OpenChild]) -> Result<Vec<ChildArg<'a>>> {
        let has = |name: &str| given.iter().any(|child| child.name == name);
        if let Some(missing) = self.description.children.iter().find(|spec| spec.required && !has(&spec.name))
        {
            return Err(Error::new(Kind::Invalid, "this child is needed").key(&missing.name));
        }
        let argument =
            |given: &'a OpenChild| ChildArg { name: RStr::from_str(&given.name), info: *given.edge.info() };
        Ok(given.iter().map(argument).collect())
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
        let flags =
            self.slots[op::WRITE as usize].is_none() || self.description.flags_known & flag::COMPRESSED != 0;
        if !reaches(op::WRITE) || !flags {
            lacks |= info::COMPRESSES;
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
        Box::pin(async move {
            let node = self.open_filter(&args)?;
            node.run_own(self.filter.ops().begin(), "looking at its children", &args.children).await?;
            Ok(Arc::new(node) as Arc<dyn OpenNode>)
        })
    }

    fn object(&self, kind: &str, name: &str, call: ObjectCall<'_>) -> Result<Options> {
        let Some(ask) = self.filter.object() else {
            return Err(Error::new(Kind::NotSupported, "it was built before there were objects"));
        };
        let (call, properties) = match call {
            ObjectCall::Check(properties) => (object::CHECK, Some(properties)),
            ObjectCall::Create(properties) => (object::CREATE, Some(properties)),
            ObjectCall::Set(properties) => (object::SET, Some(properties)),
            ObjectCall::Get => (object::GET, None),
            ObjectCall::Delete => (object::DELETE, None),
        };
        let properties = properties.map_or_else(|| "{}".to_owned(), json);
        let answer = ask(kind.into(), name.into(), call, properties.as_str().into());
        let answer = answer.into_result().map_err(|error| error_of(&error))?;
        match serde_json::from_str(&answer) {
            Ok(serde_json::Value::Object(properties)) => Ok(properties),
            Ok(serde_json::Value::Null) => Ok(Options::new()),
            _ => Err(Error::new(
                Kind::Io,
                format_args!("the plugin answered '{answer}', expected a JSON object"),
            )),
        }
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
    last_failure: Option<extern "C" fn() -> RString>,
    cookie: u64,
    /// How many it was opened with.
    children: usize,
    opened: Arc<Opened>,
}

impl PluginNode {
    /// Runs an operation of the filter's own, over its children as they are.
    async fn run(&self, slots: Slots, ask: Ask, children: &[OpenChild]) -> driveline_op::Result<()> {
        let keep: Arc<dyn Any + Send + Sync> = self.opened.clone();
        // SAFETY: as in `instance`.
        let instance = unsafe { Instance::foreign(self.opened.filter.0, slots, keep) };
        let edges: Vec<_> = children.iter().map(|child| child.edge.clone()).collect();
        let info = edges.first().map(|edge| *edge.info()).unwrap_or_default();
        let edge = Edge::to(info, &Target::new(instance, edges));
        Call::new(edge, ask, Buffer::default()).await.result
    }

    /// Runs an operation that takes no argument, if the filter has it.
    async fn run_own(
        &self,
        vt: Option<Option<&'static OpVt>>,
        doing: &str,
        children: &[OpenChild],
    ) -> Result<()> {
        let Some(vt) = vt.flatten() else { return Ok(()) };
        let mut slots = [None; op::COUNT];
        slots[op::FLUSH as usize] = Some(vt);
        let done = self.run(slots, Ask { op: op::FLUSH, ..Ask::default() }, children).await;
        done.map_err(|error| {
            // The operation ended on this thread, just now.
            let said = self.last_failure.map(|ask| ask()).filter(|said| !said.is_empty());
            match said {
                Some(said) => Error::new(Kind::of_errno(error.code()), said),
                None => Error::io(error.code(), doing),
            }
        })
    }

    async fn settle(&self, children: &[OpenChild]) -> Result<()> {
        self.run_own(self.opened.ops.settle(), "putting its children in order", children).await
    }
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
        if let Some(limits) = self.opened.ops.info().flatten() {
            let below = info;
            // SAFETY: the filter is open, and both are lent for the call.
            unsafe { limits(self.opened.filter, RSlice::from_slice(children), &mut info) };
            if !info.request_alignment.is_power_of_two() || !info.memory_alignment.is_power_of_two() {
                tracing::error!(
                    node = self.cookie,
                    ?info,
                    "limits that cannot be; those of the child are used"
                );
                info = below;
            }
        }
        info
    }

    fn claim(&self, child: usize, _: bool) -> (Permissions, Permissions) {
        let Some(ask) = self.opened.ops.permissions().flatten() else { return Default::default() };
        let (mut takes, mut denies) = (0, 0);
        if child < self.children {
            // SAFETY: the filter is open, and both are lent for the call.
            unsafe { ask(self.opened.filter, child as u32, &mut takes, &mut denies) };
        }
        let known = |bits: u32| Permissions((bits & u32::from(Permissions::ALL.0)) as u8);
        (known(takes), known(denies))
    }

    fn set_drained(&self, drained: bool) {
        if let Some(tell) = self.opened.ops.drained().flatten() {
            // SAFETY: the filter is open.
            unsafe { tell(self.opened.filter, drained.into()) };
        }
    }

    fn resize<'a>(&'a self, children: &'a [OpenChild], size_bytes: u64) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            // Who resizes through a node that is not his own cannot give its children: he has the operation for it.
            if self.slots[op::RESIZE as usize].is_none() || children.len() != self.children {
                return Err(Error::new(Kind::NotSupported, "its driver cannot change the size"));
            }
            let ask = Ask { op: op::RESIZE, offset: size_bytes, ..Ask::default() };
            let resized = self.run(self.slots, ask, children).await;
            resized.map_err(|error| Error::io(error.code(), "resizing"))
        })
    }

    fn set_read_only<'a>(&'a self, children: &'a [OpenChild], read_only: bool) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { if read_only { self.settle(children).await } else { Ok(()) } })
    }

    fn close<'a>(&'a self, children: &'a [OpenChild]) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.settle(children))
    }

    fn details(&self) -> serde_json::Value {
        serde_json::json!({ "filter": self.driver, "version": self.version, "plugin": self.path.to_string_lossy() })
    }
}

pub(crate) fn announce(path: &Path, drivers: &[Arc<PluginDriver>]) {
    let names: Vec<_> = drivers.iter().map(|driver| driver.name()).collect();
    tracing::debug!(path = %path.display(), filters = names.join(", "), "plugin loaded");
}
