//! Nodes of a file against the drivers that there are.

use super::{
    Config,
    mistake::{Mistake, Mistakes, Span},
    sections::unknown_option,
    value::{Table, Value, get},
};
use driveline_graph::{
    COMMON_OPTIONS, ChildSpec, Description, Driver, DriverKind, Graph, Options, Role, check_name,
};
use std::sync::Arc;
use toml::Spanned;

/// A table as the graph takes it. `backing = false` says that there is none, where JSON has `null`.
pub(super) fn to_options(table: &Table) -> Options {
    fn convert(value: &Value) -> serde_json::Value {
        match value {
            Value::Table(table) if get(table, "driver").is_some() => to_options(table).into(),
            other => other.to_json(),
        }
    }
    let entry = |(key, value): &(Spanned<String>, Spanned<Value>)| {
        let none = key.get_ref() == "backing" && *value.get_ref() == Value::Boolean(false);
        (key.get_ref().clone(), if none { serde_json::Value::Null } else { convert(value.get_ref()) })
    };
    table.iter().map(entry).collect()
}

/// Checks every node: its driver, its keys, their values, and the children it names.
pub(super) fn check(config: &Config, graph: &Graph, mistakes: &mut Mistakes) {
    let mut check = Check { config, graph, drivers: graph.drivers(), mistakes, names: Vec::new() };
    check.names = config.nodes.iter().map(|node| node.name.get_ref().clone()).collect();
    for node in &config.nodes {
        let what = format!("node '{}'", node.name.get_ref());
        check.node(&what, node.name.span(), &node.value, false);
    }
    super::cycles::check(config, check.mistakes);
}

struct Check<'a> {
    config: &'a Config,
    graph: &'a Graph,
    drivers: Vec<Description>,
    mistakes: &'a mut Mistakes,
    /// The names of all nodes, those in children included as they are met.
    names: Vec<String>,
}

impl Check<'_> {
    fn node(&mut self, what: &str, span: Span, value: &Spanned<Value>, inline: bool) {
        let Value::Table(table) = value.get_ref() else {
            return; // said when the file was read
        };
        let Some(driver) = self.driver(what, span.clone(), table) else { return };
        let description = driver.description();
        let mut options = Options::new();
        for (key, value) in table {
            match key.get_ref().as_str() {
                "driver" => {}
                // What it should be is not known, and that it is wrong has been said.
                _ if *value.get_ref() == Value::Wrong => {}
                "read-only" => self.expect_boolean(what, key, value),
                "node-name" if inline => self.inline_name(value),
                "node-name" => {
                    let message = format_args!("the name of {what} is in its header already");
                    self.mistakes.add(Mistake::new(key.span(), message));
                }
                // What every node takes, the graph reads.
                name if COMMON_OPTIONS.contains(&name)
                    && (matches!(value.get_ref(), Value::Table(_))
                        || !description.options.iter().any(|option| option == name)) => {}
                name => match child_spec(description, name) {
                    Some(spec) => self.child(what, description, spec, key, value),
                    None if description.options.iter().any(|option| option == name) => {
                        let options_of = to_options(&vec![(key.clone(), value.clone())]);
                        options.extend(options_of);
                    }
                    None => {
                        let known = known_keys(description, inline);
                        self.mistakes.add(unknown_option(key, what, &description.name, &known));
                    }
                },
            }
        }
        for spec in description.children.iter().filter(|spec| spec.required) {
            let words = description.child_words.iter().map(|word| &**word).chain(["file"]);
            let mut also = words.filter(|_| spec.role == Role::Filtered);
            if get(table, &spec.name).is_none() && !also.any(|word| get(table, word).is_some()) {
                let message =
                    format_args!("{what} has no '{}', and driver '{}' needs it", spec.name, description.name);
                let value = if may_be_path(description, spec) { "disk.img" } else { "NODE" };
                let help = format_args!("for example: {} = \"{value}\"", spec.name);
                self.mistakes.add(Mistake::new(span.clone(), message).label("missing here").help(help));
            }
        }
        self.options(what, span, table, &*driver, options);
    }

    fn driver(&mut self, what: &str, span: Span, table: &Table) -> Option<Arc<dyn Driver>> {
        let Some((_, value)) = get(table, "driver") else {
            let message = format_args!("{what} has no 'driver'");
            let mistake = Mistake::new(span, message).label("missing here");
            self.mistakes.add(mistake.help("for example: driver = \"qcow2\""));
            return None;
        };
        let Value::String(name) = value.get_ref() else {
            let message =
                format_args!("'driver' of {what} is a string, but this is {}", value.get_ref().kind());
            self.mistakes.add(Mistake::new(value.span(), message));
            return None;
        };
        let driver = self.graph.driver(name).ok();
        if driver.is_none() {
            let names = self.drivers.iter().map(|description| &*description.name);
            let mistake = Mistake::new(value.span(), format_args!("unknown driver '{name}'"));
            let mut mistake = mistake.nearest(name, names);
            if mistake.label.is_empty() {
                let known: Vec<_> = self.drivers.iter().map(|d| &*d.name).collect();
                let known = if known.is_empty() { "none".into() } else { known.join(", ") };
                mistake.help = Some(format!(
                    "drivers that were found: {known}; 'driveline plugin list' says where filters are looked for"
                ));
            }
            self.mistakes.add(mistake);
        }
        driver
    }

    fn expect_boolean(&mut self, what: &str, key: &Spanned<String>, value: &Spanned<Value>) {
        if !matches!(value.get_ref(), Value::Boolean(_)) {
            let (key, kind) = (key.get_ref(), value.get_ref().kind());
            let message = format_args!("'{key}' of {what} is true or false, but this is {kind}");
            self.mistakes.add(Mistake::new(value.span(), message));
        }
    }

    fn inline_name(&mut self, value: &Spanned<Value>) {
        let Value::String(name) = value.get_ref() else {
            let message = format_args!("a node's name is a string, but this is {}", value.get_ref().kind());
            return self.mistakes.add(Mistake::new(value.span(), message));
        };
        if let Err(error) = check_name(name) {
            self.mistakes.add(Mistake::new(value.span(), error.message()));
        }
        let drive = self.config.drives.iter().any(|drive| drive.name.get_ref() == name);
        if drive || self.names.contains(name) {
            let message = format_args!("the name '{name}' is taken");
            self.mistakes.add(Mistake::new(value.span(), message).label("a second one"));
        }
        self.names.push(name.clone());
    }

    fn child(
        &mut self,
        what: &str,
        description: &Description,
        spec: &ChildSpec,
        key: &Spanned<String>,
        value: &Spanned<Value>,
    ) {
        match value.get_ref() {
            Value::Table(_) => {
                let inner = format!("'{}' of {what}", key.get_ref());
                self.node(&inner, key.span(), value, true);
            }
            // A path, or a node; which of them, is known by whether there is such a node.
            Value::String(_) if may_be_path(description, spec) => {}
            Value::String(name) => self.reference(what, key, name, value.span()),
            Value::Boolean(false) if key.get_ref() == "backing" && !spec.required => {}
            other => {
                let message = format_args!(
                    "'{}' of {what} is the name of a node, or a table that defines one, but this is {}",
                    key.get_ref(),
                    other.kind()
                );
                self.mistakes.add(Mistake::new(value.span(), message));
            }
        }
    }

    fn reference(&mut self, what: &str, key: &Spanned<String>, name: &str, span: Span) {
        let nodes = self.config.nodes.iter().map(|node| node.name.get_ref().as_str());
        if nodes.clone().any(|node| node == name) {
            return;
        }
        let message = format_args!("'{}' of {what} names a node '{name}' that there is not", key.get_ref());
        let mistake = Mistake::new(span, message);
        let is_drive = self.config.drives.iter().any(|drive| drive.name.get_ref() == name);
        self.mistakes.add(if is_drive {
            mistake.label("a drive, not a node")
        } else {
            mistake.nearest(name, nodes)
        });
    }

    /// Asks the driver about its options. It tells the first mistake only, so what it refused is left out and it is
    /// asked again: one wrong value does not hide the next.
    fn options(&mut self, what: &str, span: Span, table: &Table, driver: &dyn Driver, mut options: Options) {
        let wrong = |(key, value): &(Spanned<String>, Spanned<Value>)| {
            (*value.get_ref() == Value::Wrong).then(|| key.get_ref().clone())
        };
        let mut left_out: Vec<String> = table.iter().filter_map(wrong).collect();
        while let Err(error) = driver.check(&options) {
            let key = error.option().unwrap_or_default();
            let first = key.split(['.', '[']).next().unwrap_or_default().to_owned();
            if left_out.contains(&first) {
                return; // it is missing only because it was wrong
            }
            let mistake = match get(table, &first) {
                Some((_, value)) => {
                    let message = format_args!("'{key}' of {what}: {}", error.message());
                    Mistake::new(value.span(), message)
                }
                None if key.is_empty() => {
                    Mistake::new(span.clone(), format_args!("{what}: {}", error.message()))
                        .label("in this node")
                }
                None => {
                    let message = format_args!("{what} has no '{key}': {}", error.message());
                    Mistake::new(span.clone(), message).label("missing here")
                }
            };
            self.mistakes.add(mistake);
            if options.shift_remove(&first).is_none() {
                return;
            }
            left_out.push(first);
        }
    }
}

/// The child that a key means. QEMU calls a filter's child `file`, or by a word that the driver has; all are taken.
fn child_spec<'d>(description: &'d Description, name: &str) -> Option<&'d ChildSpec> {
    description.children.iter().find(|spec| spec.name == name).or_else(|| {
        let filtered = description.children.iter().find(|spec| spec.role == Role::Filtered);
        filtered.filter(|_| name == "file" || description.child_words.iter().any(|word| word == name))
    })
}

/// The file of a format may be written as a path; so the graph reads it.
fn may_be_path(description: &Description, spec: &ChildSpec) -> bool {
    spec.role == Role::Storage || spec.role == Role::Data && description.kind == DriverKind::Format
}

fn known_keys(description: &Description, inline: bool) -> Vec<String> {
    let children = description.children.iter().map(|spec| spec.name.to_string());
    let options = description.options.iter().map(|option| option.to_string());
    let common = ["driver", if inline { "node-name" } else { "" }];
    let common = common.into_iter().chain(COMMON_OPTIONS).filter(|key| !key.is_empty()).map(String::from);
    let mut keys: Vec<String> = Vec::new();
    for key in children.chain(options).chain(common) {
        // Some drivers have an option of their own by the name of one that every node has.
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys
}
