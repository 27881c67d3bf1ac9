//! What a type looks like on the wire, found by watching it being read.
//!
//! A command's arguments are a struct that serde reads. Here serde reads it from a deserializer that has nothing to give but
//! notes what is asked for: which fields, of which types, and whether they may be missing. So the schema cannot say anything
//! else than what the parser takes, and whoever adds a command writes nothing down twice. (`schemars` was weighed: a second
//! derive beside serde's on every type, JSON Schema in between, and it sees attributes where this sees behaviour.)
//!
//! What decides by looking at the value (`deserialize_any`) has to be known by what it says it expects: see [`alternate`].

use crate::bitmaps::BitmapRef;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess,
    SeqAccess, VariantAccess, Visitor,
};
use std::{cell::RefCell, fmt};

/// What a type looks like.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Shape {
    /// Anything.
    Any,
    Null,
    Bool,
    Int,
    Number,
    Str,
    Array(Box<Shape>),
    /// One of these words.
    Enum(Vec<String>),
    Object(Object),
    /// An object that this stands in.
    Recursion(&'static str),
    /// One of these; no two of them are of one JSON type.
    Alternate(Vec<Shape>),
    /// It may be missing. Only within objects.
    Optional(Box<Shape>),
}

/// An object.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Object {
    /// The name of the type, which is not shown.
    pub(crate) name: &'static str,
    pub(crate) members: Vec<(String, Shape)>,
    /// The member that decides which further members there are, and those for each of its values.
    pub(crate) variants: Option<(String, Vec<(String, Object)>)>,
}

/// What `T` looks like. [`Shape::Any`] where that cannot be seen.
pub(crate) fn trace<T: DeserializeOwned>() -> Shape {
    let (shape, required) = watch::<T>(None);
    let Some(mut shape) = shape else { return Shape::Any };
    // A field with a default asks for its type like others do; but it may be left out.
    for (object, field) in required {
        if watch::<T>(Some((object, field))).0.is_some() {
            make_optional(&mut shape, object, field);
        }
    }
    shape
}

type Field = (&'static str, &'static str);

/// Reads a `T` without one field. Says what it looked like, and which fields there are that are no `Option`.
fn watch<T: DeserializeOwned>(without: Option<Field>) -> (Option<Shape>, Vec<Field>) {
    let watcher = Watcher { without, ..Watcher::default() };
    let mut shape = Shape::Any;
    let read = T::deserialize(Probe { shape: &mut shape, watcher: &watcher });
    (read.is_ok().then_some(shape), watcher.required.into_inner())
}

fn make_optional(shape: &mut Shape, object: &str, field: &str) {
    match shape {
        Shape::Object(found) => {
            for (name, member) in &mut found.members {
                if found.name == object && name == field && !matches!(member, Shape::Optional(_)) {
                    *member = Shape::Optional(Box::new(member.clone()));
                }
                make_optional(member, object, field);
            }
        }
        Shape::Array(inner) | Shape::Optional(inner) => make_optional(inner, object, field),
        Shape::Alternate(shapes) => shapes.iter_mut().for_each(|shape| make_optional(shape, object, field)),
        _ => {}
    }
}

/// The alternates of QEMU's schema, by what their visitors expect, and a text that one of them takes.
fn alternate(expected: &str) -> Option<Shape> {
    match expected {
        "BlockDirtyBitmapOrStr" => Some(Shape::Alternate(vec![Shape::Str, trace::<BitmapRef>()])),
        "StrOrNull" => Some(Shape::Alternate(vec![Shape::Str, Shape::Null])),
        _ => None,
    }
}

#[derive(Default)]
struct Watcher {
    /// Structs that are being read, the outermost first.
    within: RefCell<Vec<&'static str>>,
    required: RefCell<Vec<Field>>,
    without: Option<Field>,
}

/// Has nothing to give, and notes what is asked for.
struct Probe<'a> {
    shape: &'a mut Shape,
    watcher: &'a Watcher,
}

#[derive(Debug)]
struct Unseen;

impl fmt::Display for Unseen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it cannot be seen what it looks like")
    }
}

impl std::error::Error for Unseen {}

impl de::Error for Unseen {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self
    }
}

struct Expects<'a, V>(&'a V);

impl<'de, V: Visitor<'de>> fmt::Display for Expects<'_, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }
}

macro_rules! plain {
    ($($method:ident $shape:ident $visit:ident($value:expr),)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unseen> {
            *self.shape = Shape::$shape;
            visitor.$visit($value)
        })*
    };
}

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = Unseen;

    plain! {
        deserialize_bool Bool visit_bool(false),
        deserialize_i8 Int visit_i8(1),
        deserialize_i16 Int visit_i16(1),
        deserialize_i32 Int visit_i32(1),
        deserialize_i64 Int visit_i64(1),
        deserialize_u8 Int visit_u8(1),
        deserialize_u16 Int visit_u16(1),
        deserialize_u32 Int visit_u32(1),
        deserialize_u64 Int visit_u64(1),
        deserialize_f32 Number visit_f32(1.0),
        deserialize_f64 Number visit_f64(1.0),
        deserialize_str Str visit_str(""),
        deserialize_string Str visit_str(""),
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unseen> {
        *self.shape = Shape::Null;
        visitor.visit_unit()
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unseen> {
        match alternate(&Expects(&visitor).to_string()) {
            Some(shape) => {
                *self.shape = shape;
                visitor.visit_str("")
            }
            None => {
                *self.shape = Shape::Any;
                visitor.visit_unit()
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unseen> {
        let recurs = {
            let within = self.watcher.within.borrow();
            within.last().is_some_and(|last| within[..within.len() - 1].contains(last))
        };
        // The second time round it would never end; what is here has been seen the first time.
        if recurs {
            *self.shape = Shape::Optional(Box::new(Shape::Any));
            return visitor.visit_none();
        }
        let mut inner = Shape::Any;
        let value = visitor.visit_some(Probe { shape: &mut inner, watcher: self.watcher })?;
        *self.shape = Shape::Optional(Box::new(inner));
        Ok(value)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Unseen> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unseen> {
        let mut inner = Shape::Any;
        let value = visitor.visit_seq(Once { shape: Some(&mut inner), watcher: self.watcher })?;
        *self.shape = Shape::Array(Box::new(inner));
        Ok(value)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unseen> {
        *self.shape = Shape::Any;
        visitor
            .visit_map(de::value::MapDeserializer::<_, de::value::Error>::new(
                std::iter::empty::<(&str, &str)>(),
            ))
            .map_err(|_| Unseen)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Unseen> {
        let watcher = self.watcher;
        let again = watcher.within.borrow().contains(&name);
        watcher.within.borrow_mut().push(name);
        let mut members = Vec::new();
        let left: Vec<&'static str> =
            fields.iter().copied().filter(|field| watcher.without != Some((name, field))).collect();
        let value =
            visitor.visit_map(Fields { left: left.into_iter(), field: "", members: &mut members, watcher });
        watcher.within.borrow_mut().pop();
        let value = value?;
        let required = members.iter().filter(|(_, shape)| !matches!(shape, Shape::Optional(_)));
        let required = required.filter_map(|(field, _)| fields.iter().find(|known| *known == field));
        watcher.required.borrow_mut().extend(required.map(|field| (name, *field)));
        *self.shape = match again {
            true => Shape::Recursion(name),
            false => Shape::Object(Object { name, members, variants: None }),
        };
        Ok(value)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Unseen> {
        *self.shape = Shape::Enum(variants.iter().map(|word| (*word).to_owned()).collect());
        visitor.visit_enum(Word(variants.first().ok_or(Unseen)?))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Unseen> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! { char bytes byte_buf unit_struct tuple tuple_struct identifier }
}

/// An array of one element.
struct Once<'a> {
    shape: Option<&'a mut Shape>,
    watcher: &'a Watcher,
}

impl<'de> SeqAccess<'de> for Once<'_> {
    type Error = Unseen;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Unseen> {
        let Some(shape) = self.shape.take() else { return Ok(None) };
        seed.deserialize(Probe { shape, watcher: self.watcher }).map(Some)
    }
}

/// The fields of a struct, one after the other.
struct Fields<'a> {
    left: std::vec::IntoIter<&'static str>,
    field: &'static str,
    members: &'a mut Vec<(String, Shape)>,
    watcher: &'a Watcher,
}

impl<'de> MapAccess<'de> for Fields<'_> {
    type Error = Unseen;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Unseen> {
        let Some(field) = self.left.next() else { return Ok(None) };
        self.field = field;
        seed.deserialize(field.into_deserializer()).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Unseen> {
        let mut shape = Shape::Any;
        let value = seed.deserialize(Probe { shape: &mut shape, watcher: self.watcher })?;
        self.members.push((self.field.to_owned(), shape));
        Ok(value)
    }
}

/// A variant without data.
struct Word(&'static str);

impl<'de> EnumAccess<'de> for Word {
    type Error = Unseen;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Unseen> {
        Ok((seed.deserialize(self.0.into_deserializer())?, self))
    }
}

impl<'de> VariantAccess<'de> for Word {
    type Error = Unseen;

    fn unit_variant(self) -> Result<(), Unseen> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, Unseen> {
        Err(Unseen)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Unseen> {
        Err(Unseen)
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], _: V) -> Result<V::Value, Unseen> {
        Err(Unseen)
    }
}
