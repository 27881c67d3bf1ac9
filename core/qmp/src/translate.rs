//! Node definitions as QEMU's clients write them, looked at with QEMU's eyes.
//!
//! The graph takes QEMU's names by itself, flattened or not; so what is left is to say what is wrong with a definition in QEMU's
//! words, and with its names for things: a filter's child is its `file` (`image`, `raw`), a name is a node's and never a path, and a
//! parameter is missing, unexpected, of a wrong type, or does not accept a value.

use crate::{
    error::{Error, Result},
    image,
};
use driveline_graph::{
    COMMON_OPTIONS, Change, ChildSpec, Description, Driver, DriverKind, Graph, Layout, Node, Options, Role,
    check_name, nearest, nested,
};
use serde_json::Value;
use std::sync::Arc;

/// Looks at definitions for one graph.
pub(crate) struct Translator<'g> {
    graph: &'g Graph,
    /// Nodes that a change adds count as there.
    change: Option<&'g Change>,
}

impl<'g> Translator<'g> {
    pub(crate) fn new(graph: &'g Graph) -> Self {
        Self { graph, change: None }
    }

    pub(crate) fn in_change(graph: &'g Graph, change: &'g Change) -> Self {
        Self { graph, change: Some(change) }
    }

    fn find(&self, name: &str) -> driveline_graph::Result<Arc<Node>> {
        self.change.map_or_else(|| self.graph.node_or_drive(name), |change| change.node_or_drive(name))
    }

    fn layout(&self) -> Layout {
        self.change.map_or_else(|| self.graph.layout(), Change::layout)
    }

    /// A node with all that is below it.
    pub(crate) fn node(&self, options: Options) -> Result<Options> {
        self.node_at(options, "")
    }

    /// The same, where it stands within the arguments.
    pub(crate) fn node_at(&self, options: Options, at: &str) -> Result<Options> {
        let options = self.any(nested(options)?, at, false)?;
        Ok(self.ignoring_discards(options))
    }

    /// A node that says nothing of discards ignores them. One that is defined in place does not: its parent decides.
    ///
    /// Source: QEMU's block.c, `bdrv_inherited_options`.
    fn ignoring_discards(&self, mut options: Options) -> Options {
        let driver =
            options.get("driver").and_then(Value::as_str).and_then(|name| self.graph.driver(name).ok());
        let means_another = driver.is_some_and(|driver| {
            let description = driver.description();
            description.kind == DriverKind::Filter
                && description.options.iter().any(|option| option == "discard")
        });
        if !means_another {
            options.entry("discard").or_insert_with(|| "ignore".into());
        }
        options
    }

    /// A filter that gets its child from where it is put.
    pub(crate) fn filter(&self, options: Options, at: &str) -> Result<Options> {
        self.any(nested(options)?, at, true)
    }

    fn any(&self, mut options: Options, at: &str, put_above: bool) -> Result<Options> {
        let parameter = |key: &str| join(at, key);
        let driver = match options.get("driver") {
            None => return Err(missing(&parameter("driver"))),
            Some(Value::String(driver)) => driver.clone(),
            Some(_) => return Err(wrong_type(&parameter("driver"), "string")),
        };
        let Ok(found) = self.graph.driver(&driver) else {
            let refused = not_accepted(&parameter("driver"), &driver);
            // A command of our own helps where QEMU's have texts of theirs.
            let filters = self.graph.drivers().into_iter().filter(|driver| driver.kind == DriverKind::Filter);
            let filters: Vec<_> = filters.map(|driver| driver.name).collect();
            return Err(match nearest(&driver, filters.iter().map(|name| &**name)).filter(|_| put_above) {
                Some(nearest) => Error::generic(format_args!("{refused}; did you mean '{nearest}'?")),
                None => refused,
            });
        };
        let description = found.description();
        if let Some(name) = string(&options, "node-name", at)? {
            check_name(&name).map_err(|_| Error::generic(format_args!("Invalid node-name: '{name}'")))?;
        }
        let direct = common(&options, at)?;
        for spec in &description.children {
            self.child(&mut options, spec, description, at, direct, put_above)?;
        }
        self.own(&*found, &options, at)?;
        refuse_unknown(&options, description, at)?;
        Ok(options)
    }

    /// The driver's own options, as far as it can say without opening anything.
    fn own(&self, driver: &dyn Driver, options: &Options, at: &str) -> Result<()> {
        let description = driver.description();
        let is_own = |key: &str| description.options.iter().any(|option| option == key);
        let said_cache = options.get("cache").filter(|cache| cache.is_string());
        let direct = options.get("cache").and_then(|cache| cache.get("direct")).and_then(Value::as_bool);
        let mut own: Options = options
            .iter()
            .filter(|(key, _)| is_own(key) && !COMMON_OPTIONS.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        if is_own("cache") {
            let below = direct.map(|direct| if direct { "none" } else { "writeback" }.into());
            own.extend(said_cache.cloned().or(below).map(|cache| ("cache".to_owned(), cache)));
        }
        if is_own("filename") && !own.contains_key("path") {
            match own.get("filename") {
                None => return Err(missing(&join(at, "filename"))),
                Some(Value::String(name)) if name.is_empty() => {
                    let text = format_args!("The '{}' block driver requires a file name", description.name);
                    return Err(Error::generic(text));
                }
                Some(_) => {}
            }
        }
        driver.check(&own).map_err(|error| in_qemus_words(&error, at))
    }

    /// A list of children, each as one.
    fn children(
        &self,
        options: &mut Options,
        spec: &ChildSpec,
        description: &Description,
        at: &str,
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
            self.child(&mut one, &spec, description, at, said_direct, false)?;
            *member = one.shift_remove(&*spec.name).unwrap_or_default();
        }
        options.insert(spec.name.to_string(), members.into());
        Ok(())
    }

    fn child(
        &self,
        options: &mut Options,
        spec: &ChildSpec,
        description: &Description,
        at: &str,
        said_direct: Option<bool>,
        put_above: bool,
    ) -> Result<()> {
        let word = description.word(&spec.name, spec.role);
        if spec.role == Role::Filtered
            && !options.contains_key(&*spec.name)
            && let Some(child) = [word, "file"].into_iter().find_map(|word| options.shift_remove(word))
        {
            options.insert(spec.name.to_string(), child);
        }
        let parameter = join(at, word);
        if spec.list {
            return self.children(options, spec, description, at, said_direct);
        }
        let value = options.get_mut(&*spec.name);
        if put_above && spec.role == Role::Filtered {
            return match value {
                Some(_) => Err(Error::generic(format_args!("Parameter '{parameter}' is unexpected"))),
                None => Ok(()),
            };
        }
        match value {
            None if spec.required => return Err(missing(&parameter)),
            None => {}
            Some(Value::Object(inner)) => {
                let inner = std::mem::take(inner);
                let node = self.any(inner, &parameter, false)?;
                options.insert(spec.name.to_string(), node.into());
            }
            Some(Value::String(name)) => {
                // A name is a node's: a path would be an object with a driver.
                let node = self.find(name).map_err(|_| match spec.role {
                    Role::Backing => Error::generic(format_args!(
                        "Could not open backing file: {}",
                        Error::no_node(name).desc
                    )),
                    _ => Error::no_node(name),
                })?;
                if spec.role != Role::Backing
                    && let Some(said) = said_direct
                    && let Some(is) = image::is_direct(&self.layout(), node.name())
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
            Some(_) if spec.role == Role::Backing => {
                return Err(wrong_type(&parameter, "BlockdevRefOrNull"));
            }
            Some(_) => return Err(wrong_type(&parameter, "BlockdevRef")),
        }
        Ok(())
    }
}

/// Options of every node. Returns what is said of `cache.direct`.
fn common(options: &Options, at: &str) -> Result<Option<bool>> {
    for key in ["read-only", "auto-read-only", "force-share", "active"] {
        boolean(options, key, at)?;
    }
    for (key, words) in
        [("discard", &["ignore", "off", "unmap", "on"][..]), ("detect-zeroes", &["off", "on", "unmap"][..])]
    {
        if let Some(word) = string(options, key, at)?
            && !words.contains(&&*word)
        {
            return Err(not_accepted(&join(at, key), &word));
        }
    }
    let parameter = join(at, "cache");
    match options.get("cache") {
        None | Some(Value::String(_)) => Ok(None),
        Some(Value::Object(cache)) => {
            boolean(cache, "no-flush", &parameter)?;
            let direct = boolean(cache, "direct", &parameter)?;
            match cache.keys().find(|key| !["direct", "no-flush"].contains(&key.as_str())) {
                Some(key) => {
                    Err(Error::generic(format_args!("Parameter '{}' is unexpected", join(&parameter, key))))
                }
                None => Ok(direct),
            }
        }
        Some(_) => Err(wrong_type(&parameter, "object")),
    }
}

/// What a driver says about its options, as QEMU would.
fn in_qemus_words(error: &driveline_graph::Error, at: &str) -> Error {
    let (text, Some(key)) = (error.message(), error.option()) else {
        return Error::generic(error.message());
    };
    let parameter = join(at, key);
    if text == "it must be given" {
        return missing(&parameter);
    }
    if let Some(rest) = text.strip_prefix("unknown variant `")
        && let Some((value, _)) = rest.split_once('`')
    {
        return not_accepted(&parameter, value);
    }
    if text.starts_with("invalid type: ") {
        for (word, kind) in
            [("a boolean", "boolean"), ("a string", "string"), ("path", "string"), ("u", "integer")]
        {
            if text.split("expected ").last().is_some_and(|expected| expected.starts_with(word)) {
                return wrong_type(&parameter, kind);
            }
        }
    }
    // What QEMU says about some of its own options names no parameter.
    let names_it = !text.contains(&format!("{key}=")) && !text.starts_with(char::is_uppercase);
    if names_it {
        Error::generic(format_args!("Parameter '{parameter}': {text}"))
    } else {
        Error::generic(text)
    }
}

fn refuse_unknown(options: &Options, description: &Description, at: &str) -> Result<()> {
    let known = |key: &str| {
        ["driver", "node-name"].contains(&key)
            || COMMON_OPTIONS.contains(&key)
            || description.options.iter().any(|option| option == key)
            || description.children.iter().any(|child| child.name == key)
    };
    match options.keys().find(|key| !known(key)) {
        Some(key) => Err(Error::generic(format_args!("Parameter '{}' is unexpected", join(at, key)))),
        None => Ok(()),
    }
}

fn string(options: &Options, key: &str, at: &str) -> Result<Option<String>> {
    match options.get(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(wrong_type(&join(at, key), "string")),
    }
}

fn boolean(options: &Options, key: &str, at: &str) -> Result<Option<bool>> {
    match options.get(key) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
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
