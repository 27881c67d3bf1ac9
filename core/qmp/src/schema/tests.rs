use super::*;
use serde::Deserialize;
use serde_json::Map;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(dead_code)]
struct Image {
    virtual_size: u64,
    tags: Vec<Colour>,
    #[serde(default)]
    compressed: bool,
    backing_image: Option<Box<Image>>,
    free: Option<Value>,
    more: Option<Map<String, Value>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Colour {
    DarkRed,
    Blue,
}

#[test]
fn a_type_is_seen_as_it_is_read() {
    let Shape::Object(image) = trace::<Image>() else { panic!() };
    let optional = |shape| Shape::Optional(Box::new(shape));
    let expected = [
        ("virtual-size", Shape::Int),
        ("tags", Shape::Array(Box::new(Shape::Enum(vec!["dark-red".into(), "blue".into()])))),
        ("compressed", optional(Shape::Bool)),
        ("backing-image", optional(Shape::Recursion("Image"))),
        ("free", optional(Shape::Any)),
        ("more", optional(Shape::Any)),
    ];
    assert_eq!(image.members, expected.map(|(name, shape)| (name.to_owned(), shape)));
}

#[test]
fn a_type_that_contains_itself_has_one_entry() {
    let mut schema = Schema::default();
    let name = schema.name(&trace::<Image>());
    let entries = schema.finish();
    let objects: Vec<_> = entries.iter().filter(|entry| entry["meta-type"] == "object").collect();
    assert_eq!(objects.len(), 1);
    assert_eq!(objects[0]["name"], name);
    let inner =
        objects[0]["members"].as_array().unwrap().iter().find(|member| member["name"] == "backing-image");
    assert_eq!(inner.unwrap(), &json!({ "name": "backing-image", "type": name, "default": null }));
}

#[test]
fn a_reply_that_is_only_written_is_any_value() {
    struct Written;
    async fn query(_: &Monitor, _: Nothing) -> Result<Written> {
        Ok(Written)
    }
    assert_eq!((&probe(query)).reply(), Shape::Any);
    assert_eq!(probe(command_of_words).reply(), Shape::Array(Box::new(Shape::Str)));
}

async fn command_of_words(_: &Monitor, _: Nothing) -> Result<Vec<String>> {
    Ok(Vec::new())
}

#[test]
fn the_arguments_of_every_command_are_seen() {
    // Those that have members by driver or type are put together in `nodes.rs`.
    let by_hand = ["blockdev-add", "object-add"];
    for signature in command::signatures() {
        let seen = matches!(signature.arguments, Shape::Object(_));
        assert_eq!(seen, !by_hand.contains(&signature.name), "{}", signature.name);
    }
}
