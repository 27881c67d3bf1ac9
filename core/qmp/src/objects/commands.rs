//! Commands on objects, and QEMU's object model as far as it has anything to show: `/objects` with one child for each.

use super::{Objects, TYPES, no_device, no_property};
use crate::{
    command::Done,
    error::{Class, Error, Result},
    monitor::Monitor,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// `qom-type`, `id`, and properties of that type.
#[derive(Deserialize)]
pub(crate) struct ObjectAdd(Map<String, Value>);

pub(crate) async fn object_add(monitor: &Monitor, ObjectAdd(arguments): ObjectAdd) -> Result<Done> {
    monitor.objects().add(arguments)?;
    Ok(Done {})
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ObjectDel {
    id: String,
}

pub(crate) async fn object_del(monitor: &Monitor, del: ObjectDel) -> Result<Done> {
    monitor.objects().remove(&del.id)?;
    Ok(Done {})
}

/// QAPI's `ObjectPropertyInfo`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PropertyInfo {
    name: String,
    r#type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    #[serde(rename = "default-value", skip_serializing_if = "Option::is_none")]
    default_value: Option<Value>,
}

impl PropertyInfo {
    fn new(name: impl Into<String>, r#type: impl Into<String>) -> Self {
        Self { name: name.into(), r#type: r#type.into(), description: None, default_value: None }
    }
}

/// QAPI's `ObjectTypeInfo`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct TypeInfo {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#abstract: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
}

/// Where a path leads.
enum Place {
    Root,
    Objects,
    Object(String),
}

/// A path from `/`, or a part of one that only one place ends with, such as an id.
fn place(objects: &Objects, path: &str) -> Result<Place> {
    let absolute = path.starts_with('/');
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let there = |id: &str| objects.get(id).is_some();
    match *parts {
        [] if absolute => Ok(Place::Root),
        ["objects"] => Ok(Place::Objects),
        ["objects", id] if there(id) => Ok(Place::Object(id.to_owned())),
        [id] if !absolute && there(id) => Ok(Place::Object(id.to_owned())),
        _ => Err(no_device(path)),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Path {
    path: String,
}

pub(crate) async fn qom_list(monitor: &Monitor, Path { path }: Path) -> Result<Vec<PropertyInfo>> {
    let objects = monitor.objects();
    let mut list = vec![PropertyInfo::new("type", "string")];
    match place(objects, &path)? {
        Place::Root => list.push(PropertyInfo::new("objects", "child<container>")),
        Place::Objects => {
            let child = |(id, kind)| PropertyInfo::new(id, format!("child<{kind}>"));
            list.extend(objects.list().into_iter().map(child));
        }
        Place::Object(id) => {
            let object = objects.get(&id).ok_or_else(|| no_device(&path))?;
            list.extend(object.kind().properties.iter().map(|(name, kind)| PropertyInfo::new(*name, *kind)));
        }
    }
    Ok(list)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct QomGet {
    path: String,
    property: String,
}

pub(crate) async fn qom_get(monitor: &Monitor, get: QomGet) -> Result<Value> {
    let objects = monitor.objects();
    let QomGet { path, property } = get;
    match (place(objects, &path)?, &*property) {
        (Place::Root | Place::Objects, "type") => Ok("container".into()),
        (Place::Root, "objects") => Ok("/objects".into()),
        (Place::Objects, id) if objects.get(id).is_some() => Ok(format!("/objects/{id}").into()),
        (Place::Root | Place::Objects, _) => Err(no_property("container", &property)),
        (Place::Object(id), _) => {
            let object = objects.get(&id).ok_or_else(|| no_device(&path))?;
            let kind = object.kind();
            if property == "type" {
                return Ok(kind.name.into());
            }
            let (_, of) = kind
                .properties
                .iter()
                .find(|(name, _)| *name == property)
                .ok_or_else(|| no_property(kind.name, &property))?;
            Ok(match object.properties().shift_remove(&*property) {
                // A text that was not given is an empty one.
                None | Some(Value::Null) if *of == "string" => "".into(),
                value => value.unwrap_or_default(),
            })
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct QomSet {
    path: String,
    property: String,
    value: Value,
}

pub(crate) async fn qom_set(monitor: &Monitor, set: QomSet) -> Result<Done> {
    let objects = monitor.objects();
    match place(objects, &set.path)? {
        Place::Object(id) => objects.set(&id, &set.property, set.value)?,
        Place::Root | Place::Objects => return Err(no_property("container", &set.property)),
    }
    Ok(Done {})
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct QomListTypes {
    implements: Option<String>,
    r#abstract: Option<bool>,
}

/// The types above those of objects. All of them are abstract but for the containers.
const PARENTS: [(&str, &str); 5] = [
    ("object", ""),
    ("authz", "object"),
    ("event-loop-base", "object"),
    ("secret_common", "object"),
    ("tls-creds", "object"),
];

pub(crate) async fn qom_list_types(_: &Monitor, query: QomListTypes) -> Result<Vec<TypeInfo>> {
    let wanted = query.implements.as_deref();
    let concrete = TYPES
        .iter()
        .map(|kind| (kind.name, kind.parent, false))
        .chain([("container", "object", false)])
        .filter(|(name, parent, _)| match wanted {
            None | Some("object") => true,
            Some("user-creatable") => *name != "container",
            Some(wanted) => wanted == *name || wanted == *parent,
        });
    let above = PARENTS.iter().map(|(name, parent)| (*name, *parent, true)).filter(|(name, _, _)| {
        query.r#abstract == Some(true) && wanted.is_none_or(|wanted| wanted == *name || wanted == "object")
    });
    let info = |(name, parent, is_abstract): (&str, &str, bool)| TypeInfo {
        name: name.to_owned(),
        r#abstract: is_abstract.then_some(true),
        parent: (!parent.is_empty()).then(|| parent.to_owned()),
    };
    Ok(above.chain(concrete).map(info).collect())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Typename {
    typename: String,
}

pub(crate) async fn qom_list_properties(
    _: &Monitor,
    Typename { typename }: Typename,
) -> Result<Vec<PropertyInfo>> {
    let own: &[(&str, &str)] = match TYPES.iter().find(|kind| kind.name == typename) {
        Some(kind) => kind.properties,
        None if typename == "container" || PARENTS.iter().any(|(name, _)| *name == typename) => &[],
        None if typename == "user-creatable" => {
            return Err(Error::generic("Parameter 'typename' expects a QOM type"));
        }
        None => {
            let text = format_args!("Class '{typename}' not found");
            return Err(Error::new(Class::DeviceNotFound, text));
        }
    };
    let all = [("type", "string")].into_iter().chain(own.iter().copied());
    Ok(all.map(|(name, kind)| PropertyInfo::new(name, kind)).collect())
}
