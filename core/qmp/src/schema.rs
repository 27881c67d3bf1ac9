//! `query-qmp-schema`: what the table of commands takes and returns, in QEMU's format for introspection.
//!
//! Arguments and replies come from the types themselves ([`trace`]); a definition of a node, from what the registered drivers
//! say about themselves, so that loaded filters are in it too. Types have numbers for names, as QEMU's have.
//! Source: QEMU's qapi/introspect.json.

mod events;
mod nodes;
mod trace;

pub(crate) use trace::{Object, Shape, trace};

use crate::{
    command::{self, Nothing},
    error::Result,
    monitor::Monitor,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::{future::Future, marker::PhantomData, sync::OnceLock};

/// A command's function, of which only the types are looked at.
pub(crate) struct Probe<A, R>(PhantomData<fn(A) -> R>);

pub(crate) fn probe<F, Fut, A, R>(_: F) -> Probe<A, R>
where
    F: Fn(&'static Monitor, A) -> Fut,
    Fut: Future<Output = Result<R>>,
{
    Probe(PhantomData)
}

impl<A: DeserializeOwned, R> Probe<A, R> {
    pub(crate) fn arguments(&self) -> Shape {
        trace::<A>()
    }
}

/// A reply whose type serde can read as well as write: its schema is known.
pub(crate) trait Readable {
    fn reply(&self) -> Shape;
}

impl<A, R: DeserializeOwned> Readable for Probe<A, R> {
    fn reply(&self) -> Shape {
        trace::<R>()
    }
}

/// Any other reply. The compiler takes this one where the other does not fit.
#[allow(dead_code, reason = "nearly all fit")]
pub(crate) trait Opaque {
    fn reply(&self) -> Shape;
}

impl<A, R> Opaque for &Probe<A, R> {
    fn reply(&self) -> Shape {
        Shape::Any
    }
}

/// A command, as far as its types say.
pub(crate) struct Signature {
    pub(crate) name: &'static str,
    pub(crate) arguments: Shape,
    pub(crate) reply: Shape,
}

pub(crate) async fn query_qmp_schema(monitor: &Monitor, _: Nothing) -> Result<Value> {
    static SIGNATURES: OnceLock<Vec<Signature>> = OnceLock::new();
    let signatures = SIGNATURES.get_or_init(command::signatures);
    let definition = nodes::definition(&monitor.graph().drivers());
    let mut schema = Schema::default();
    for signature in signatures {
        let arguments = nodes::arguments(signature, &definition);
        let reply = match &signature.reply {
            Shape::Any => events::reply(signature.name),
            known => known.clone(),
        };
        schema.command(signature.name, &arguments, &reply);
    }
    for (name, data) in events::all() {
        schema.event(name, &data);
    }
    Ok(schema.finish().into())
}

/// Commands and members that QEMU marks; what begins with `x-` is unstable in any case.
const DEPRECATED: &[(&str, &str)] = &[
    ("drive-backup", ""),
    ("nbd-server-add", ""),
    ("nbd-server-remove", ""),
    ("block-commit", "base"),
    ("block-commit", "top"),
];

fn features(command: &str, member: &str) -> Option<Value> {
    let name = if member.is_empty() { command } else { member };
    let unstable = name.starts_with("x-") && !name.starts_with("x-driveline-");
    let features = match DEPRECATED.contains(&(command, member)) {
        true => "deprecated",
        false if unstable => "unstable",
        // Where a write-only overlay is taken: whoever makes a mirror of a snapshot's top image asks for it.
        false if (command, member) == ("blockdev-snapshot", "") => "allow-write-only-overlay",
        false => return None,
    };
    Some(json!([features]))
}

/// A schema in the making.
#[derive(Default)]
struct Schema {
    commands: Vec<Value>,
    types: Vec<Value>,
    /// Shapes that have a name, so that equal ones share it.
    known: Vec<(Shape, String)>,
    /// Objects that are being described, with their names.
    within: Vec<(&'static str, String)>,
    next: usize,
}

impl Schema {
    fn command(&mut self, name: &str, arguments: &Shape, reply: &Shape) {
        let arguments = self.arguments(name, arguments);
        let reply = self.name(reply);
        let mut command =
            json!({ "name": name, "meta-type": "command", "arg-type": arguments, "ret-type": reply });
        if name == command::OUT_OF_BAND {
            command["allow-oob"] = true.into();
        }
        if let Some(features) = features(name, "") {
            command["features"] = features;
        }
        self.commands.push(command);
    }

    fn event(&mut self, name: &str, data: &Shape) {
        let data = self.name(data);
        self.commands.push(json!({ "name": name, "meta-type": "event", "arg-type": data }));
    }

    /// Arguments are an object of their own for each command, because members have features.
    fn arguments(&mut self, command: &str, shape: &Shape) -> String {
        match shape {
            Shape::Object(object) if DEPRECATED.iter().any(|(name, _)| *name == command) => {
                self.object(object, command)
            }
            Shape::Object(_) => self.name(shape),
            // A command always takes an object, even if nobody can say which.
            _ => self.name(&Shape::Object(Object::default())),
        }
    }

    /// The name of a type, which is described if it was not.
    fn name(&mut self, shape: &Shape) -> String {
        match shape {
            Shape::Any => self.builtin("any", "value"),
            Shape::Null => self.builtin("null", "null"),
            Shape::Bool => self.builtin("bool", "boolean"),
            Shape::Int => self.builtin("int", "int"),
            Shape::Number => self.builtin("number", "number"),
            Shape::Str => self.builtin("str", "string"),
            Shape::Optional(inner) => self.name(inner),
            Shape::Recursion(name) => {
                let outer = self.within.iter().rev().find(|(within, _)| within == name);
                outer.map(|(_, name)| name.clone()).unwrap_or_else(|| "any".to_owned())
            }
            Shape::Array(inner) => {
                let inner = self.name(inner);
                let name = format!("[{inner}]");
                let array = json!({ "name": name, "meta-type": "array", "element-type": inner });
                if !self.types.contains(&array) {
                    self.types.push(array);
                }
                name
            }
            Shape::Object(_) | Shape::Enum(_) | Shape::Alternate(_) => {
                match self.known.iter().find(|(known, _)| known == shape) {
                    Some((_, name)) => name.clone(),
                    None => self.describe(shape),
                }
            }
        }
    }

    fn builtin(&mut self, name: &str, json_type: &str) -> String {
        let builtin = json!({ "name": name, "meta-type": "builtin", "json-type": json_type });
        if !self.types.contains(&builtin) {
            self.types.push(builtin);
        }
        name.to_owned()
    }

    fn describe(&mut self, shape: &Shape) -> String {
        match shape {
            Shape::Object(object) => {
                let name = self.object(object, "");
                self.known.push((shape.clone(), name.clone()));
                name
            }
            Shape::Enum(words) => {
                let name = self.number();
                self.known.push((shape.clone(), name.clone()));
                let members: Vec<Value> = words.iter().map(|word| json!({ "name": word })).collect();
                let entry = json!({ "name": name, "meta-type": "enum", "members": members, "values": words });
                self.types.push(entry);
                name
            }
            Shape::Alternate(shapes) => {
                let name = self.number();
                let members: Vec<Value> =
                    shapes.iter().map(|shape| json!({ "type": self.name(shape) })).collect();
                self.known.push((shape.clone(), name.clone()));
                self.types.push(json!({ "name": name, "meta-type": "alternate", "members": members }));
                name
            }
            other => self.name(other),
        }
    }

    /// Describes an object; the features of its members are those that `command` has for them.
    fn object(&mut self, object: &Object, command: &str) -> String {
        let number = self.number();
        self.within.push((object.name, number.clone()));
        let mut members = Vec::new();
        for (name, shape) in &object.members {
            let mut member = json!({ "name": name, "type": self.name(shape) });
            if matches!(shape, Shape::Optional(_)) {
                member["default"] = Value::Null;
            }
            if let Some(features) = features(command, name) {
                member["features"] = features;
            }
            members.push(member);
        }
        let mut entry = json!({ "name": number, "meta-type": "object", "members": members });
        if let Some((tag, variants)) = &object.variants {
            let variant = |(case, object): &(String, Object)| json!({ "case": case, "type": self.name(&Shape::Object(object.clone())) });
            entry["variants"] = variants.iter().map(variant).collect();
            entry["tag"] = tag.clone().into();
        }
        self.within.pop();
        self.types.push(entry);
        number
    }

    fn number(&mut self) -> String {
        self.next += 1;
        (self.next - 1).to_string()
    }

    fn finish(self) -> Vec<Value> {
        let mut all = self.commands;
        all.extend(self.types);
        all
    }
}

#[cfg(test)]
mod tests;
