//! A node as it is written down: driver, children, options.

use crate::{
    common::NodeOptions,
    driver::{ChildSpec, Description, DriverKind, Options, Role},
    error::{Error, Kind, Result},
};
use serde_json::Value;

/// A node as it is written down, before it is opened.
#[derive(Clone, Debug)]
pub struct Definition {
    /// Its name; nodes defined inside others may leave it out.
    pub name: Option<String>,
    /// Its driver.
    pub driver: String,
    /// `read-only`, if it is said.
    pub read_only: Option<bool>,
    /// What it has in common with all nodes.
    pub common: NodeOptions,
    /// Its children, by name, in the order of the driver's description.
    pub children: Vec<(ChildSpec, ChildDefinition)>,
    /// The rest, which is the driver's.
    pub options: Options,
}

/// A child as it is written down.
#[derive(Clone, Debug)]
pub enum ChildDefinition {
    /// A node by name.
    Node(String),
    /// A node defined in place.
    Inline(Box<Definition>),
    /// None, although the image may name one (`backing = null`).
    Null,
}

/// Letters, digits, `-`, `.`, `_`, a letter first: what a node or drive may be called.
pub fn check_name(name: &str) -> Result<()> {
    let good = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    if good && name.len() <= 127 {
        return Ok(());
    }
    let expected = "a letter, then letters, digits, '-', '.' and '_', at most 127";
    Err(Error::new(Kind::Invalid, format_args!("'{name}' cannot be a name; expected {expected}")))
}

impl Definition {
    /// Reads a definition from a JSON object. `describe` knows the drivers, `is_node` the names of nodes that
    /// exist or are defined beside this one: the file of a format may be a path instead of a name.
    pub fn parse<'d>(
        object: Options,
        describe: &dyn Fn(&str) -> Result<&'d Description>,
        is_node: &dyn Fn(&str) -> bool,
    ) -> Result<Self> {
        Self::parse_below(nested(object)?, &NodeOptions::default(), describe, is_node)
    }

    /// A node that has some of its options from the one above it.
    fn parse_below<'d>(
        mut object: Options,
        above: &NodeOptions,
        describe: &dyn Fn(&str) -> Result<&'d Description>,
        is_node: &dyn Fn(&str) -> bool,
    ) -> Result<Self> {
        let name = match take_string(&mut object, "node-name")? {
            Some(name) => {
                check_name(&name)?;
                Some(name)
            }
            None => None,
        };
        Self::parse_rest(object, name.clone(), above, describe, is_node)
            .map_err(|error| name.as_deref().map_or(error.clone(), |name| error.at(name)))
    }

    fn parse_rest<'d>(
        mut object: Options,
        name: Option<String>,
        above: &NodeOptions,
        describe: &dyn Fn(&str) -> Result<&'d Description>,
        is_node: &dyn Fn(&str) -> bool,
    ) -> Result<Self> {
        let Some(driver) = take_string(&mut object, "driver")? else {
            return Err(Error::new(Kind::Invalid, "missing; every node names its driver").key("driver"));
        };
        let description = describe(&driver)?;
        let read_only = match object.shift_remove("read-only") {
            None => None,
            Some(Value::Bool(read_only)) => Some(read_only),
            Some(other) => return Err(unexpected("read-only", "true or false", &other)),
        };
        let common = NodeOptions::take(&mut object, description, above)?;
        let below = common.below();
        let mut children = Vec::new();
        for spec in &description.children {
            // QEMU calls a filter's child `file`, or by a word that the driver has for it; all are taken.
            let words = description.child_words.iter().map(|word| &**word);
            let mut also = ["file"].into_iter().chain(words).filter(|_| spec.role == Role::Filtered);
            let Some(value) =
                object.shift_remove(&*spec.name).or_else(|| also.find_map(|word| object.shift_remove(word)))
            else {
                if spec.required {
                    let message = format_args!("missing; driver '{driver}' needs this child");
                    return Err(Error::new(Kind::Invalid, message).key(&spec.name));
                }
                continue;
            };
            let values = match value {
                Value::Array(members) if spec.list => {
                    let members = members.into_iter().enumerate();
                    members.map(|(number, value)| (spec.member(number), value)).collect()
                }
                other if spec.list => return Err(unexpected(&spec.name, "a list of nodes", &other)),
                one => vec![(spec.clone(), one)],
            };
            for (spec, value) in values {
                let child = match value {
                    Value::Null if !spec.required => ChildDefinition::Null,
                    Value::String(text) if may_be_path(description, &spec) && !is_node(&text) => {
                        let mut file = Options::new();
                        file.insert("driver".into(), "file".into());
                        file.insert("path".into(), text.into());
                        ChildDefinition::Inline(Box::new(Self::parse_below(file, &below, describe, is_node)?))
                    }
                    Value::String(text) => ChildDefinition::Node(text),
                    Value::Object(inner) => ChildDefinition::Inline(Box::new(Self::parse_below(
                        inner, &below, describe, is_node,
                    )?)),
                    other => {
                        return Err(unexpected(
                            &spec.name,
                            "the name of a node, or a node defined in place",
                            &other,
                        ));
                    }
                };
                children.push((spec, child));
            }
        }
        Ok(Self { name, driver, read_only, common, children, options: object })
    }

    /// The names of nodes that it refers to, at any depth.
    pub fn references(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for (_, child) in &self.children {
            match child {
                ChildDefinition::Node(name) => names.push(name.as_str()),
                ChildDefinition::Inline(inner) => names.extend(inner.references()),
                ChildDefinition::Null => {}
            }
        }
        names
    }
}

/// The file of a format may be written as a path.
fn may_be_path(description: &Description, spec: &ChildSpec) -> bool {
    let data = spec.role == Role::Data && description.kind == DriverKind::Format;
    spec.role == Role::Storage || data
}

fn take_string(object: &mut Options, key: &str) -> Result<Option<String>> {
    match object.shift_remove(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(unexpected(key, "a string", &other)),
    }
}

fn unexpected(key: &str, expected: &str, found: &Value) -> Error {
    Error::new(Kind::Invalid, format_args!("expected {expected}, found {found}")).key(key)
}

/// So deep is nothing that a node could be: whoever takes a key apart calls itself for each dot.
const DOTS_MAX: usize = 20;

/// `file.driver` and `file.path` become `file` with both in it; `x.0` and `x.1` become a list. At every depth.
///
/// Errors: an option that is given in two ways.
pub fn nested(options: Options) -> Result<Options> {
    nested_in(options, "")
}

fn nested_in(options: Options, at: &str) -> Result<Options> {
    let join = |key: &str| if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") };
    let mut out = Options::new();
    for (key, value) in options {
        if key.bytes().filter(|byte| *byte == b'.').count() > DOTS_MAX {
            let text = format_args!("an option is nested more than {DOTS_MAX} times: '{key:.64}...'");
            return Err(Error::new(Kind::Invalid, text));
        }
        let value = match value {
            Value::Object(inner) => Value::Object(nested_in(inner, &join(&key))?),
            other => other,
        };
        insert(&mut out, &key, value).map_err(|()| {
            let text = format_args!("Parameter '{}' is given in two ways", join(&key));
            Error::new(Kind::Invalid, text)
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

/// Puts definitions into an order in which each comes after those that it refers to. A cycle names its nodes.
pub fn in_order(definitions: Vec<Definition>) -> Result<Vec<Definition>> {
    let mut left: Vec<Option<Definition>> = definitions.into_iter().map(Some).collect();
    let names: Vec<Option<String>> =
        left.iter().map(|definition| definition.as_ref().and_then(|d| d.name.clone())).collect();
    let mut order = Vec::new();
    for start in 0..left.len() {
        visit(start, &names, &mut left, &mut Vec::new(), &mut order)?;
    }
    Ok(order)
}

fn visit(
    at: usize,
    names: &[Option<String>],
    left: &mut [Option<Definition>],
    path: &mut Vec<usize>,
    order: &mut Vec<Definition>,
) -> Result<()> {
    if let Some(from) = path.iter().position(|&on_path| on_path == at) {
        let cycle: Vec<_> =
            path[from..].iter().chain([&at]).map(|&i| names[i].as_deref().unwrap_or("?")).collect();
        return Err(Error::new(Kind::Invalid, format_args!("a cycle of nodes: {}", cycle.join(" -> "))));
    }
    let Some(definition) = &left[at] else { return Ok(()) };
    let below: Vec<usize> = definition
        .references()
        .iter()
        .filter_map(|name| names.iter().position(|n| n.as_deref() == Some(name)))
        .collect();
    path.push(at);
    for next in below {
        visit(next, names, left, path, order)?;
    }
    path.pop();
    order.extend(left[at].take());
    Ok(())
}
