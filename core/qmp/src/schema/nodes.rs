//! Arguments whose members depend on one of them: definitions of nodes, by driver, and objects, by type. The parser looks at
//! that one first, so there is no type that says all of it.

use super::{Object, Shape, Signature, trace};
use crate::{exports, objects};
use driveline_graph::{Description, Role};
use serde::Deserialize;

/// What every node may have.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(dead_code, reason = "only its schema is used")]
struct Common {
    node_name: Option<String>,
    discard: Option<Discard>,
    cache: Option<Cache>,
    active: Option<bool>,
    read_only: Option<bool>,
    auto_read_only: Option<bool>,
    force_share: Option<bool>,
    detect_zeroes: Option<DetectZeroes>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Discard {
    Ignore,
    Unmap,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum DetectZeroes {
    Off,
    On,
    Unmap,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(dead_code, reason = "only its schema is used")]
struct Cache {
    direct: Option<bool>,
    no_flush: Option<bool>,
}

const DEFINITION: &str = "BlockdevOptions";

/// Drivers that QEMU has by other names.
const OTHER_NAMES: &[(&str, &[&str])] =
    &[("null", &["null-co", "null-aio"]), ("file", &["file", "host_device"])];

/// The definition of a node, with a variant for each driver.
pub(super) fn definition(drivers: &[Description]) -> Object {
    let mut cases = Vec::new();
    for driver in drivers {
        let names = OTHER_NAMES.iter().find(|(name, _)| *name == driver.name);
        // A driver that is registered by one of QEMU's names itself is not said twice.
        let names: Vec<&str> = match names {
            Some((_, names)) => names.to_vec(),
            None => vec![&driver.name],
        };
        for name in names {
            if !cases.iter().any(|(case, _): &(String, Object)| case == name) {
                cases.push((name.to_owned(), variant(driver)));
            }
        }
    }
    let words = cases.iter().map(|(case, _)| case.clone()).collect();
    let mut members = vec![("driver".to_owned(), Shape::Enum(words))];
    if let Shape::Object(common) = trace::<Common>() {
        members.extend(common.members);
    }
    Object { name: DEFINITION, members, variants: Some(("driver".into(), cases)) }
}

/// What one driver takes: its children, and options of which it says no more than the names.
fn variant(driver: &Description) -> Object {
    let child = |optional: bool| {
        let mut shapes = vec![Shape::Recursion(DEFINITION), Shape::Str];
        shapes.extend(optional.then_some(Shape::Null));
        Shape::Alternate(shapes)
    };
    let children = driver.children.iter().map(|spec| {
        let name = driver.word(&spec.name, spec.role);
        let shape = child(spec.role == Role::Backing);
        (name.to_owned(), if spec.required { shape } else { Shape::Optional(Box::new(shape)) })
    });
    let common = ["cache", "discard", "detect-zeroes", "read-only"];
    let options =
        driver.options.iter().filter(|option| !common.contains(&&***option)).map(|option| match &**option {
            "path" => ("filename".to_owned(), Shape::Str),
            other => (other.to_owned(), Shape::Optional(Box::new(Shape::Any))),
        });
    Object { name: "", members: children.chain(options).collect(), variants: None }
}

/// The arguments of a command, with what its types leave open.
pub(super) fn arguments(signature: &Signature, definition: &Object) -> Shape {
    match (signature.name, &signature.arguments) {
        ("blockdev-add", _) => Shape::Object(definition.clone()),
        ("object-add", _) => Shape::Object(new_object()),
        ("blockdev-reopen", Shape::Object(object)) => {
            let mut object = object.clone();
            for (name, shape) in &mut object.members {
                if name == "options" {
                    *shape = Shape::Array(Box::new(Shape::Object(definition.clone())));
                }
            }
            Shape::Object(object)
        }
        ("nbd-server-start", Shape::Object(object)) => {
            let mut object = object.clone();
            for (name, shape) in &mut object.members {
                if name == "addr" {
                    *shape = Shape::Object(address());
                }
            }
            Shape::Object(object)
        }
        (_, shape) => shape.clone(),
    }
}

/// QAPI's `SocketAddressLegacy`.
fn address() -> Object {
    let case = |(name, shape): (&str, Shape)| {
        let members = vec![("data".to_owned(), shape)];
        (name.to_owned(), Object { name: "", members, variants: None })
    };
    let cases: Vec<_> = exports::address_shapes().into_iter().map(case).collect();
    let words = cases.iter().map(|(case, _)| case.clone()).collect();
    let members = vec![("type".to_owned(), Shape::Enum(words))];
    Object { name: "", members, variants: Some(("type".into(), cases)) }
}

fn new_object() -> Object {
    let cases: Vec<(String, Object)> = objects::shapes()
        .into_iter()
        .filter_map(|(name, shape)| match shape {
            Shape::Object(object) => Some((name.to_owned(), object)),
            _ => None,
        })
        .collect();
    let words = cases.iter().map(|(case, _)| case.clone()).collect();
    let members = vec![("qom-type".to_owned(), Shape::Enum(words)), ("id".to_owned(), Shape::Str)];
    Object { name: "", members, variants: Some(("qom-type".into(), cases)) }
}
