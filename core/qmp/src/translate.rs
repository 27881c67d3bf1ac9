//! Node definitions as QEMU's clients write them, turned into Driveline's.
//!
//! | QEMU | Driveline |
//! |---|---|
//! | `driver`: `null-co`, `null-aio`; `host_device` | `null`; `file` |
//! | `filename` (of `file`) | `path` |
//! | `cache`: `{ "direct": true }`, at the node or one above it | `cache`: `"none"` at the file |
//! | `discard`: `on`, `off` | `unmap`, `ignore` |
//! | `auto-read-only` | if the file cannot be opened for writing, the node is read-only |
//! | a filter's `file` | the child by the name that the filter gives it |
//! | `file.driver` and so on, flattened | nested |
//!
//! What says what is so anyway (`detect-zeroes`: `off`, `force-share`: `false`, `active`: `true`, `cache.no-flush`: `false`) is taken,
//! and its opposite is refused. Every other option that the driver does not have is unexpected, by name.

use crate::{
    error::{Error, Result},
    image,
};
use driveline_graph::{ChildSpec, Description, Graph, Options, Role, check_name};
use serde_json::Value;
use std::cell::Cell;

/// What `auto-read-only` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AutoReadOnly {
    /// Nothing yet: writing is tried first.
    No,
    /// Writing was tried.
    Yes,
}

/// Translates for one graph.
pub(crate) struct Translator<'g> {
    graph: &'g Graph,
    auto_read_only: AutoReadOnly,
    saw_auto_read_only: Cell<bool>,
}

/// What a node has from the one above it.
#[derive(Clone, Copy, Default)]
struct Inherited {
    direct: Option<bool>,
    ignore_discard: Option<bool>,
}

impl<'g> Translator<'g> {
    pub(crate) fn new(graph: &'g Graph) -> Self {
        Self { graph, auto_read_only: AutoReadOnly::No, saw_auto_read_only: Cell::new(false) }
    }

    pub(crate) fn with(self, auto_read_only: AutoReadOnly) -> Self {
        Self { auto_read_only, ..self }
    }

    /// Has a node that was translated the option `auto-read-only`?
    pub(crate) fn saw_auto_read_only(&self) -> bool {
        self.saw_auto_read_only.get()
    }

    /// A node with all that is below it.
    pub(crate) fn node(&self, options: Options) -> Result<Options> {
        self.any(nested(options, "")?, "", Inherited::default(), false)
    }

    /// A filter that gets its child from where it is put. `at` is where it stands within the arguments.
    pub(crate) fn filter(&self, options: Options, at: &str) -> Result<Options> {
        self.any(nested(options, at)?, at, Inherited::default(), true)
    }

    fn any(&self, mut options: Options, at: &str, above: Inherited, put_above: bool) -> Result<Options> {
        let parameter = |key: &str| join(at, key);
        let driver = match options.get("driver") {
            None => return Err(missing(&parameter("driver"))),
            Some(Value::String(driver)) => match &**driver {
                "null-co" | "null-aio" => "null".to_owned(),
                "host_device" => "file".to_owned(),
                other => other.to_owned(),
            },
            Some(_) => return Err(wrong_type(&parameter("driver"), "string")),
        };
        let Ok(found) = self.graph.driver(&driver) else {
            return Err(not_accepted(&parameter("driver"), &driver));
        };
        let description = found.description();
        options.insert("driver".into(), driver.into());
        if let Some(name) = string(&options, "node-name", at)? {
            check_name(&name).map_err(|_| Error::generic(format_args!("Invalid node-name: '{name}'")))?;
        }
        self.common(&mut options, at)?;
        let has = |option: &str| description.options.iter().any(|o| o == option);
        if has("path")
            && let Some(path) = options.shift_remove("filename")
        {
            options.insert("path".into(), path);
        }
        let said = take_direct(&mut options, at)?;
        let below = Inherited {
            direct: said.or(above.direct),
            ignore_discard: take_discard(&mut options, at)?.or(above.ignore_discard),
        };
        if has("cache")
            && !options.contains_key("cache")
            && let Some(direct) = below.direct
        {
            options.insert("cache".into(), if direct { "none" } else { "writeback" }.into());
        }
        if has("discard")
            && let Some(ignore) = below.ignore_discard
        {
            options.insert("discard".into(), if ignore { "ignore" } else { "unmap" }.into());
        }
        for spec in &description.children {
            self.child(&mut options, spec, at, below, said, put_above)?;
        }
        refuse_unknown(&options, description, at)?;
        Ok(options)
    }

    /// Options of every node in QEMU.
    fn common(&self, options: &mut Options, at: &str) -> Result<()> {
        if take_bool(options, "auto-read-only", at)? == Some(true) {
            self.saw_auto_read_only.set(true);
            if self.auto_read_only == AutoReadOnly::Yes && !options.contains_key("read-only") {
                options.insert("read-only".into(), true.into());
            }
        }
        if options.get("read-only").is_some_and(|value| !value.is_boolean()) {
            return Err(wrong_type(&join(at, "read-only"), "boolean"));
        }
        for (key, so) in [("force-share", false), ("active", true)] {
            if take_bool(options, key, at)?.is_some_and(|value| value != so) {
                return Err(not_accepted(&join(at, key), &(!so).to_string()));
            }
        }
        match string(options, "detect-zeroes", at)?.as_deref() {
            None => {}
            Some("off") => drop(options.shift_remove("detect-zeroes")),
            Some(other) => return Err(not_accepted(&join(at, "detect-zeroes"), other)),
        }
        Ok(())
    }

    /// A list of children, each as one.
    fn children(
        &self,
        options: &mut Options,
        spec: &ChildSpec,
        at: &str,
        below: Inherited,
        said_direct: Option<bool>,
    ) -> Result<()> {
        let mut members = match options.shift_remove(&*spec.name) {
            Some(Value::Array(members)) => members,
            Some(_) => return Err(wrong_type(&join(at, &spec.name), "array")),
            None => return Err(missing(&join(at, &spec.name))),
        };
        for (number, member) in members.iter_mut().enumerate() {
            let spec = spec.member(number);
            let mut one = Options::from_iter([(spec.name.to_string(), member.take())]);
            self.child(&mut one, &spec, at, below, said_direct, false)?;
            *member = one.shift_remove(&*spec.name).unwrap_or_default();
        }
        options.insert(spec.name.to_string(), members.into());
        Ok(())
    }

    fn child(
        &self,
        options: &mut Options,
        spec: &ChildSpec,
        at: &str,
        below: Inherited,
        said_direct: Option<bool>,
        put_above: bool,
    ) -> Result<()> {
        if spec.role == Role::Filtered
            && !options.contains_key(&*spec.name)
            && let Some(file) = options.shift_remove("file")
        {
            options.insert(spec.name.to_string(), file);
        }
        let parameter = join(at, &spec.name);
        if spec.list {
            return self.children(options, spec, at, below, said_direct);
        }
        let value = options.get_mut(&*spec.name);
        if put_above && spec.role == Role::Filtered {
            return match value {
                Some(_) => Err(Error::generic(format_args!("Parameter '{parameter}' is unexpected"))),
                None => Ok(()),
            };
        }
        match value {
            None if spec.required => return Err(missing(&join(at, in_qemu(spec)))),
            None => {}
            Some(Value::Object(inner)) => {
                let inner = std::mem::take(inner);
                let node = self.any(inner, &parameter, below, false)?;
                options.insert(spec.name.to_string(), node.into());
            }
            Some(Value::String(name)) => {
                // A name is a node's: a path would be an object with a driver.
                let node = self.graph.node_or_drive(name).map_err(|_| Error::no_node(name))?;
                if spec.role != Role::Backing
                    && let (Some(said), Some(is)) = (said_direct, image::is_direct(self.graph, node.name()))
                    && said != is
                {
                    let text = format_args!(
                        "Parameter '{}' does not accept value '{said}': node '{}' below is opened with \
                         cache.direct={is}",
                        join(at, "cache.direct"),
                        node.name(),
                    );
                    return Err(Error::generic(text));
                }
                *name = node.name().to_owned();
            }
            Some(Value::Null) if !spec.required => {}
            Some(_) => return Err(wrong_type(&parameter, "BlockdevRef")),
        }
        Ok(())
    }
}

/// What a child is called in QEMU.
fn in_qemu(spec: &ChildSpec) -> &str {
    if spec.role == Role::Filtered { "file" } else { &spec.name }
}

/// `cache`, as QEMU's object. Driveline's own word for a file stays where it is.
fn take_direct(options: &mut Options, at: &str) -> Result<Option<bool>> {
    let parameter = join(at, "cache");
    match options.get("cache") {
        None | Some(Value::String(_)) => return Ok(None),
        Some(Value::Object(_)) => {}
        Some(_) => return Err(wrong_type(&parameter, "object")),
    }
    let Some(Value::Object(mut cache)) = options.shift_remove("cache") else { return Ok(None) };
    let direct = take_bool(&mut cache, "direct", &parameter)?;
    if take_bool(&mut cache, "no-flush", &parameter)? == Some(true) {
        return Err(not_accepted(&join(&parameter, "no-flush"), "true"));
    }
    match cache.keys().next() {
        Some(key) => Err(Error::generic(format_args!("Parameter '{}' is unexpected", join(&parameter, key)))),
        None => Ok(direct),
    }
}

/// `discard`: is it to be ignored?
fn take_discard(options: &mut Options, at: &str) -> Result<Option<bool>> {
    match string(options, "discard", at)?.as_deref() {
        None => Ok(None),
        Some(word @ ("ignore" | "off" | "unmap" | "on")) => {
            let ignore = matches!(word, "ignore" | "off");
            options.shift_remove("discard");
            Ok(Some(ignore))
        }
        Some(other) => Err(not_accepted(&join(at, "discard"), other)),
    }
}

fn refuse_unknown(options: &Options, description: &Description, at: &str) -> Result<()> {
    let known = |key: &str| {
        ["driver", "node-name", "read-only"].contains(&key)
            || description.options.iter().any(|option| option == key)
            || description.children.iter().any(|child| child.name == key)
    };
    match options.keys().find(|key| !known(key)) {
        Some(key) => Err(Error::generic(format_args!("Parameter '{}' is unexpected", join(at, key)))),
        None => Ok(()),
    }
}

/// `file.driver` and `file.path` become `file` with both in it; `x.0` and `x.1` become a list. At every depth.
fn nested(options: Options, at: &str) -> Result<Options> {
    let mut out = Options::new();
    for (key, value) in options {
        let value = match value {
            Value::Object(inner) => Value::Object(nested(inner, &join(at, &key))?),
            other => other,
        };
        insert(&mut out, &key, value).map_err(|()| {
            let text = format_args!("Parameter '{}' is given in two ways", join(at, &key));
            Error::generic(text)
        })?;
    }
    Ok(out.into_iter().map(|(key, value)| (key, listed(value))).collect())
}

fn insert(object: &mut Options, key: &str, value: Value) -> Result<(), ()> {
    let Some((first, rest)) = key.split_once('.') else {
        return match (object.get_mut(key), value) {
            (None, value) => {
                object.insert(key.to_owned(), value);
                Ok(())
            }
            // `cache.direct` came first, and now `cache` with the rest.
            (Some(Value::Object(there)), Value::Object(more)) => {
                more.into_iter().try_for_each(|(key, value)| insert(there, &key, value))
            }
            (Some(_), _) => Err(()),
        };
    };
    match object.entry(first).or_insert_with(|| Value::Object(Options::new())) {
        Value::Object(inner) => insert(inner, rest, value),
        _ => Err(()),
    }
}

/// An object whose keys are 0, 1, 2 and so on is a list; at every depth.
fn listed(value: Value) -> Value {
    let Value::Object(object) = value else { return value };
    let mut object: Options = object.into_iter().map(|(key, value)| (key, listed(value))).collect();
    let keys: Vec<String> = (0..object.len()).map(|at| at.to_string()).collect();
    if keys.is_empty() || !keys.iter().all(|key| object.contains_key(key)) {
        return object.into();
    }
    keys.iter().filter_map(|key| object.shift_remove(key)).collect()
}

fn string(options: &Options, key: &str, at: &str) -> Result<Option<String>> {
    match options.get(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(wrong_type(&join(at, key), "string")),
    }
}

fn take_bool(options: &mut Options, key: &str, at: &str) -> Result<Option<bool>> {
    match options.shift_remove(key) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(value)),
        Some(_) => Err(wrong_type(&join(at, key), "boolean")),
    }
}

fn join(at: &str, key: &str) -> String {
    if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") }
}

fn missing(parameter: &str) -> Error {
    Error::generic(format_args!("Parameter '{parameter}' is missing"))
}

fn wrong_type(parameter: &str, expected: &str) -> Error {
    Error::generic(format_args!("Invalid parameter type for '{parameter}', expected: {expected}"))
}

fn not_accepted(parameter: &str, value: &str) -> Error {
    Error::generic(format_args!("Parameter '{parameter}' does not accept value '{value}'"))
}

#[cfg(test)]
mod tests;
