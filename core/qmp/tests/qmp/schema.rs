//! The schema against QEMU's, which is asked for here and now: whoever reads it must find all that he found there.

use crate::{
    interop::Qsd,
    kit::{World, differences, has},
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

/// A schema by name.
struct Schema(BTreeMap<String, Value>);

impl Schema {
    fn new(reply: &Value) -> Self {
        let entries = reply.as_array().unwrap();
        Self(
            entries.iter().map(|entry| (entry["name"].as_str().unwrap().to_owned(), entry.clone())).collect(),
        )
    }

    fn of(&self, name: &Value) -> &Value {
        &self.0[name.as_str().unwrap()]
    }

    fn named(&self, kind: &str) -> impl Iterator<Item = (&String, &Value)> {
        self.0.iter().filter(move |(_, entry)| entry["meta-type"] == kind)
    }

    /// The members of an object: type, and may it be missing. With `case`, of that variant too; without, of all.
    fn members(&self, object: &Value, case: Option<&str>) -> BTreeMap<String, (Value, bool)> {
        let own = |object: &Value, optional: bool| -> Vec<(String, (Value, bool))> {
            let members = object["members"].as_array().unwrap().iter();
            let member = |member: &Value| {
                let is = optional || member.get("default").is_some();
                (member["name"].as_str().unwrap().to_owned(), (member["type"].clone(), is))
            };
            members.map(member).collect()
        };
        let mut all: BTreeMap<_, _> = own(object, false).into_iter().collect();
        for variant in object["variants"].as_array().into_iter().flatten() {
            if case.is_none_or(|case| variant["case"] == case) {
                for (name, member) in own(self.of(&variant["type"]), case.is_none()) {
                    all.entry(name).or_insert(member);
                }
            }
        }
        all
    }

    /// The values of the member that decides about others.
    fn cases(&self, object: &Value) -> Vec<String> {
        let variants = object["variants"].as_array().into_iter().flatten();
        variants.map(|variant| variant["case"].as_str().unwrap().to_owned()).collect()
    }
}

/// What QEMU has and we lack, as paths.
struct Comparison<'a> {
    theirs: &'a Schema,
    ours: &'a Schema,
    found: BTreeSet<String>,
    seen: BTreeSet<(String, String)>,
}

impl Comparison<'_> {
    /// `given`: the client gives it (arguments), else it gets it (replies and events).
    fn types(&mut self, path: &str, theirs: &Value, ours: &Value, given: bool) {
        let (their, our) = (self.theirs.of(theirs), self.ours.of(ours));
        if !self.seen.insert((theirs.to_string(), ours.to_string())) {
            return;
        }
        let kinds = (their["meta-type"].as_str().unwrap(), our["meta-type"].as_str().unwrap());
        match kinds {
            _ if our["name"] == "any" => {}
            ("object", "object") => self.objects(path, their, our, given),
            ("array", "array") => self.types(path, &their["element-type"], &our["element-type"], given),
            ("enum", "enum") => {
                let words = |entry: &Value| -> BTreeSet<String> {
                    entry["values"]
                        .as_array()
                        .unwrap()
                        .iter()
                        .map(|word| word.as_str().unwrap().to_owned())
                        .collect()
                };
                // Of what the client gives, we take all; of what it gets, there is nothing that it does not know.
                let (theirs, ours) = (words(their), words(our));
                let lack: Vec<_> = if given {
                    theirs.difference(&ours).collect()
                } else {
                    ours.difference(&theirs).collect()
                };
                self.found.extend(lack.into_iter().map(|word| format!("{path}={word}")));
            }
            ("builtin", "builtin") if their["json-type"] == our["json-type"] => {}
            // A word is a text.
            ("enum", "builtin") if our["json-type"] == "string" => {}
            ("alternate", "alternate") => {
                let kind = |schema: &Schema, entry: &Value| -> BTreeMap<String, Value> {
                    let member = |member: &Value| {
                        let of = schema.of(&member["type"]);
                        let json = of["json-type"].as_str().or(of["meta-type"].as_str()).unwrap();
                        (json.replace("enum", "string"), member["type"].clone())
                    };
                    entry["members"].as_array().unwrap().iter().map(member).collect()
                };
                let (theirs, ours) = (kind(self.theirs, their), kind(self.ours, our));
                for (json, their) in &theirs {
                    match ours.get(json) {
                        Some(our) => self.types(path, their, our, given),
                        None => drop(self.found.insert(format!("{path} as {json}"))),
                    }
                }
            }
            _ => drop(self.found.insert(format!("{path}: {} is {}", kinds.0, kinds.1))),
        }
    }

    fn objects(&mut self, path: &str, their: &Value, our: &Value, given: bool) {
        let cases = self.theirs.cases(their);
        if cases.is_empty() {
            return self.members(
                path,
                &self.theirs.members(their, None),
                &self.ours.members(our, None),
                given,
            );
        }
        let tag = their["tag"].as_str().unwrap();
        for case in &cases {
            let all = self.ours.members(our, None);
            let words = all.get(tag).map(|(of, _)| self.ours.of(of)["values"].clone()).unwrap_or_default();
            // That we lack a case is said by the words of the tag.
            let lacks = words.as_array().is_some_and(|words| !words.iter().any(|word| *word == **case));
            let ours = match self.ours.cases(our).contains(case) {
                true => self.ours.members(our, Some(case)),
                false if lacks => continue,
                false => all,
            };
            self.members(
                &format!("{path}[{tag}={case}]"),
                &self.theirs.members(their, Some(case)),
                &ours,
                given,
            );
        }
    }

    fn members(
        &mut self,
        path: &str,
        theirs: &BTreeMap<String, (Value, bool)>,
        ours: &BTreeMap<String, (Value, bool)>,
        given: bool,
    ) {
        for (name, (their, optional)) in theirs {
            let path = format!("{path}.{name}");
            match ours.get(name) {
                // What a client need not be told, it may never be told.
                None if !given && *optional => {}
                None => drop(self.found.insert(path)),
                Some((our, is_optional)) => {
                    // Nothing more is asked for, and nothing less is told.
                    if given && *optional && !is_optional || !given && !*optional && *is_optional {
                        self.found.insert(format!("{path} optional"));
                    }
                    self.types(&path, their, our, given);
                }
            }
        }
    }
}

#[test]
fn whoever_reads_qemus_schema_finds_all_of_it_but_for_what_the_table_says() {
    if !has("qemu-storage-daemon", Command::new("qemu-storage-daemon").arg("--version")) {
        return;
    }
    let world = World::new();
    let ours = Schema::new(&world.client().ok("query-qmp-schema", json!({})));
    let theirs = Schema::new(&Qsd::start().client.ok("query-qmp-schema", json!({})));
    let mut comparison =
        Comparison { theirs: &theirs, ours: &ours, found: BTreeSet::new(), seen: BTreeSet::new() };
    for (kind, sides) in [("command", &["arg-type", "ret-type"][..]), ("event", &["arg-type"])] {
        for (name, their) in theirs.named(kind) {
            // What is not there at all is refused by its name; here it is about what is there.
            let Some(our) = ours.0.get(name) else { continue };
            for side in sides {
                let given = kind == "command" && *side == "arg-type";
                comparison.types(name, &their[side], &our[side], given);
            }
            comparison
                .found
                .extend((their.get("features") != our.get("features")).then(|| format!("{name} features")));
        }
    }
    let allowed = differences("schema");
    let is = |path: &String, row: &String| {
        path == row
            || path.starts_with(&format!("{row}."))
            || row.ends_with('*') && path.starts_with(row.trim_end_matches('*'))
    };
    let found: Vec<_> =
        comparison.found.iter().filter(|path| !allowed.iter().any(|row| is(path, row))).collect();
    assert!(found.is_empty(), "not in differences.md:\n{found:#?}");
}

#[test]
fn every_name_in_the_schema_leads_somewhere() {
    let world = World::new();
    let reply = world.client().ok("query-qmp-schema", json!({}));
    let schema = Schema::new(&reply);
    assert_eq!(schema.0.len(), reply.as_array().unwrap().len(), "no name is there twice");
    let commands = world.client().ok("query-commands", json!({}));
    let listed: BTreeSet<_> =
        commands.as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    let described: BTreeSet<_> = schema.named("command").map(|(name, _)| &**name).collect();
    assert_eq!(listed, described);
    for entry in schema.0.values() {
        for key in ["arg-type", "ret-type", "element-type"] {
            assert!(entry.get(key).is_none_or(|name| schema.of(name).is_object()));
        }
        for key in ["members", "variants"] {
            let inner = entry.get(key).and_then(Value::as_array).into_iter().flatten();
            inner
                .filter_map(|member| member.get("type"))
                .for_each(|name| assert!(schema.of(name).is_object()));
        }
    }
}
