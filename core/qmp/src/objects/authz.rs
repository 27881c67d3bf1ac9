//! Who may connect: names of clients, as their certificates say them, against a name or a list of rules.
//!
//! | type | allows |
//! |---|---|
//! | `authz-simple` | the one `identity` |
//! | `authz-list` | what the first of its `rules` says that matches the name, and its `policy` if none does |
//! | `authz-listfile` | the same by the JSON in a file: `{"rules": [...], "policy": "deny"}`; with `refresh` by what it says now |
//!
//! A rule's `format` is `exact`, or `glob`: `*` is anything, and `?` one character. Without a policy nobody is allowed.
//!
//! They are looked up when a client connects, so they may come, change and go while a server has their name. One that is not there
//! allows nobody. Source: QEMU's qapi/authz.json.

use super::{Object, Objects};
use crate::{
    arguments,
    error::{Error, Result},
};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::{Path, PathBuf, absolute},
};

pub(super) const SIMPLE: &[(&str, &str)] = &[("identity", "string")];
pub(super) const LIST: &[(&str, &str)] = &[("policy", "QAuthZListPolicy"), ("rules", "QAuthZListRule")];
pub(super) const LIST_FILE: &[(&str, &str)] = &[("filename", "string"), ("refresh", "bool")];

/// What becomes of a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AuthzPolicy {
    /// It may not connect.
    #[default]
    Deny,
    /// It may.
    Allow,
}

/// How a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Format {
    Exact,
    Glob,
}

/// A rule of a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuthzRule {
    r#match: String,
    policy: AuthzPolicy,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<Format>,
}

impl AuthzRule {
    fn matches(&self, name: &str) -> bool {
        match self.format {
            None | Some(Format::Exact) => self.r#match == name,
            Some(Format::Glob) => glob(&self.r#match, name),
        }
    }
}

/// An `authz-list`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AuthzList {
    policy: AuthzPolicy,
    rules: Vec<AuthzRule>,
}

impl AuthzList {
    /// What becomes of this name.
    pub fn decide(&self, name: &str) -> AuthzPolicy {
        self.rules.iter().find(|rule| rule.matches(name)).map_or(self.policy, |rule| rule.policy)
    }
}

/// An `authz-listfile`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AuthzListFile {
    filename: String,
    refresh: bool,
    /// Where the file is, whatever becomes of the working directory.
    #[serde(skip)]
    path: PathBuf,
    /// What the file said at first.
    #[serde(skip)]
    list: AuthzList,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AuthzSimpleArguments {
    pub(super) identity: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AuthzListArguments {
    policy: Option<AuthzPolicy>,
    rules: Option<Vec<AuthzRule>>,
}

impl AuthzListArguments {
    pub(super) fn over(self, list: AuthzList) -> AuthzList {
        AuthzList { policy: self.policy.unwrap_or(list.policy), rules: self.rules.unwrap_or(list.rules) }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AuthzListFileArguments {
    filename: String,
    refresh: Option<bool>,
}

impl AuthzListFileArguments {
    pub(super) fn read(self) -> Result<AuthzListFile> {
        let path = absolute(&self.filename).unwrap_or_else(|_| self.filename.clone().into());
        let list = read(&path)?;
        Ok(AuthzListFile { filename: self.filename, refresh: self.refresh.unwrap_or(true), path, list })
    }
}

/// The list in a file.
fn read(path: &Path) -> Result<AuthzList> {
    let wrong = |why: &dyn std::fmt::Display| Error::generic(format_args!("'{}': {why}", path.display()));
    let unreadable = |error: std::io::Error| {
        let text = error.to_string();
        let text = text.split(" (os error").next().unwrap_or_default();
        Error::generic(format_args!("Unable to read '{}': {text}", path.display()))
    };
    // Nothing that would have to be waited for, such as a pipe.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(wrong(&"expected a file with an access list"));
    }
    let text = fs::read_to_string(path).map_err(unreadable)?;
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| wrong(&error))?;
    if !value.is_object() {
        return Err(wrong(&"expected a JSON object with 'rules' and 'policy'"));
    }
    let given: AuthzListArguments = arguments::parse(value, "").map_err(|error| wrong(&error.desc))?;
    Ok(given.over(AuthzList::default()))
}

/// `*` is anything, and `?` one character.
fn glob(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // The last `*`, and up to where it reaches. Only that one can need to be tried again.
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == '?' || *c == name[n] => (p, n) = (p + 1, n + 1),
            _ => {
                let Some((at, reach)) = star else { return false };
                star = Some((at, reach + 1));
                (p, n) = (at + 1, reach + 1);
            }
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

impl Objects {
    /// May `name` connect, if the `authz-*` of that id is asked now? It may read a file, and block for it.
    ///
    /// Errors: it may not; there is no such object, or it is something else; its file cannot be read.
    pub fn authorize(&self, id: &str, name: &str) -> Result<()> {
        let policy = match self.get(id) {
            None => return Err(Error::generic(format_args!("Cannot find QAuthZ object ID {id}"))),
            Some(Object::AuthzSimple(identity)) if identity == name => AuthzPolicy::Allow,
            Some(Object::AuthzSimple(_)) => AuthzPolicy::Deny,
            Some(Object::AuthzList(list)) => list.decide(name),
            Some(Object::AuthzListFile(file)) if file.refresh => read(&file.path)?.decide(name),
            Some(Object::AuthzListFile(file)) => file.list.decide(name),
            Some(_) => {
                return Err(Error::generic(format_args!("Object '{id}' is not a QAuthZ subclass")));
            }
        };
        match policy {
            AuthzPolicy::Allow => Ok(()),
            AuthzPolicy::Deny => {
                Err(Error::generic(format_args!("TLS x509 authz check for {name} is denied")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn add(objects: &Objects, arguments: Value) -> Result<()> {
        objects.add(arguments.as_object().unwrap().clone())
    }

    #[test]
    fn a_glob_matches_what_its_stars_reach() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("?", "", false),
            ("?", "日", true),
            ("CN=*,O=x", "CN=a,O=y,O=x", true),
            ("CN=*,O=x", "CN=a,O=x,", false),
            ("*a*b*", "xxaaxxb", true),
            ("a**b", "ab", true),
            ("a*?b", "ab", false),
            ("[ab]", "a", false),
            ("A", "a", false),
        ] {
            assert_eq!(glob(pattern, name), expected, "{pattern:?} {name:?}");
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let objects = Objects::default();
        add(&objects, json!({ "qom-type": "authz-simple", "id": "s", "identity": "CN=a" })).unwrap();
        add(&objects, json!({ "qom-type": "authz-list", "id": "nobody" })).unwrap();
        let rules = json!([
            { "match": "CN=a*", "policy": "deny" },
            { "match": "CN=b", "policy": "deny", "format": "exact" },
            { "match": "CN=b*", "policy": "allow", "format": "glob" },
        ]);
        let list = json!({ "qom-type": "authz-list", "id": "l", "rules": rules });
        add(&objects, list).unwrap();
        let allowed = |id: &str, name: &str| objects.authorize(id, name).is_ok();
        assert!(allowed("s", "CN=a") && !allowed("s", "CN=aa") && !allowed("nobody", "CN=a"));
        // A star without `format` is a star.
        assert!(!allowed("l", "CN=b") && allowed("l", "CN=bb") && !allowed("l", "CN=ab"));
        objects.set("l", "policy", json!("allow")).unwrap();
        assert!(!allowed("l", "CN=b") && allowed("l", "CN=ab") && !allowed("l", "CN=a*"));
        objects.set("s", "identity", json!("CN=z")).unwrap();
        assert!(!allowed("s", "CN=a") && allowed("s", "CN=z"));
        objects.remove("l").unwrap();
        let error = objects.authorize("l", "CN=bb").unwrap_err().desc;
        assert_eq!(error, "Cannot find QAuthZ object ID l");
        add(&objects, json!({ "qom-type": "secret", "id": "l", "data": "x" })).unwrap();
        let error = objects.authorize("l", "CN=bb").unwrap_err().desc;
        assert_eq!(error, "Object 'l' is not a QAuthZ subclass");
    }

    #[test]
    fn a_file_is_read_when_somebody_comes_and_one_that_is_wrong_lets_nobody_in() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("list.json");
        let objects = Objects::default();
        let file = |id: &str, refresh: bool| json!({ "qom-type": "authz-listfile", "id": id, "filename": path, "refresh": refresh });
        for (text, says) in [
            ("", "EOF"),
            ("[]", "expected a JSON object"),
            (r#"{"policy":"maybe"}"#, "Parameter 'policy' does not accept value 'maybe'"),
            (r#"{"rules":[{"match":"x"}]}"#, "Parameter 'rules[0].policy' is missing"),
        ] {
            fs::write(&path, text).unwrap();
            let error = add(&objects, file("f", true)).unwrap_err().desc;
            assert!(error.contains(says) && error.contains("list.json"), "{error}");
        }
        fs::write(&path, r#"{"rules":[{"match":"CN=a","policy":"allow"}]}"#).unwrap();
        add(&objects, file("f", true)).unwrap();
        add(&objects, file("once", false)).unwrap();
        let allowed = |id: &str, name: &str| objects.authorize(id, name).is_ok();
        assert!(allowed("f", "CN=a") && allowed("once", "CN=a") && !allowed("f", "CN=b"));
        fs::write(&path, r#"{"policy":"allow","rules":[{"match":"CN=a","policy":"deny"}]}"#).unwrap();
        assert!(!allowed("f", "CN=a") && allowed("once", "CN=a"));
        assert!(allowed("f", "CN=b") && !allowed("once", "CN=b"));
        fs::write(&path, "{").unwrap();
        assert!(!allowed("f", "CN=b") && allowed("once", "CN=a"));
        fs::remove_file(&path).unwrap();
        let error = objects.authorize("f", "CN=b").unwrap_err().desc;
        assert_eq!(error, format!("Unable to read '{}': No such file or directory", path.display()));
    }
}
