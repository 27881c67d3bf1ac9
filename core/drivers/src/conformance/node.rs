//! Nodes wired by hand, for tests of drivers.

use driveline_graph::{Description, Driver, Missing, OpenArgs, OpenChild, OpenNode, Options, Result};
use driveline_op::{Edge, Info, Route, Target, op};
use serde_json::Value;
use std::path::PathBuf;

/// What a node is opened with, beside its options and children.
#[derive(Clone, Debug)]
pub struct OpenNodeArgs {
    /// The name of the node, and under which its parent sees it as a child.
    pub name: &'static str,
    /// See [`OpenArgs::read_only`].
    pub read_only: bool,
    /// See [`OpenArgs::directory`].
    pub directory: PathBuf,
}

impl Default for OpenNodeArgs {
    fn default() -> Self {
        Self { name: "file", read_only: false, directory: PathBuf::from(".") }
    }
}

impl OpenNodeArgs {
    /// Opens a node. The one returned can be a child of the next, as its `name`.
    pub async fn open(
        self,
        driver: &dyn Driver,
        options: Value,
        children: Vec<OpenChild>,
    ) -> Result<OpenChild> {
        let Value::Object(options) = options else { panic!("options are a JSON object") };
        driver.check(&options)?;
        let args = OpenArgs {
            node_name: self.name,
            cookie: 0,
            options: &options,
            children: children.clone(),
            read_only: self.read_only,
            directory: &self.directory,
        };
        let node = driver.open(args).await?;
        let edge = edge_to(driver.description(), &*node, &children);
        Ok(OpenChild {
            name: self.name.into(),
            edge,
            unfiltered: node.clone(),
            node,
            node_name: self.name.into(),
        })
    }
}

/// Opens a writable node named `file`; see [`OpenNodeArgs`] for more.
pub async fn open_node(driver: &dyn Driver, options: Value, children: Vec<OpenChild>) -> Result<OpenChild> {
    OpenNodeArgs::default().open(driver, options, children).await
}

/// An edge to a node, as its size and limits are now. What the driver leaves out goes to child 0 or is refused, as its
/// description says; nothing is emulated.
pub fn edge_to(description: &Description, node: &dyn OpenNode, children: &[OpenChild]) -> Edge {
    let infos: Vec<Info> = children.iter().map(|child| *child.edge.info()).collect();
    let target = Target::new(node.instance(), children.iter().map(|child| child.edge.clone()).collect());
    let pass = description.missing == Missing::Pass && !children.is_empty();
    Edge::new(node.info(&infos), |number| match number {
        _ if target.instance().has(number) => Route::To(&target),
        op::READ..=op::CACHE if pass => Route::As(&children[0].edge),
        _ => Route::Refuse,
    })
}

/// Asserts that a driver accepts exactly the options that its description lists, and that `samples` (a value for each)
/// are all taken together. Returns the options in the form that drivers take.
pub fn options_of(driver: &dyn Driver, samples: Value) -> Options {
    options_with_words(driver, samples, &[])
}

/// The same; `words` are other names of options that have a sample.
pub fn options_with_words(driver: &dyn Driver, samples: Value, words: &[&str]) -> Options {
    let Value::Object(samples) = samples else { panic!("samples are a JSON object") };
    driver.check(&samples).expect("all options together are accepted");
    let mut listed: Vec<String> = driver.description().options.iter().map(ToString::to_string).collect();
    let words = words.iter().map(|&word| word.to_owned());
    let mut sampled: Vec<String> = samples.keys().cloned().chain(words).collect();
    let mut wrong = samples.clone();
    wrong.insert("no-such-option".into(), Value::Null);
    let error = driver.check(&wrong).expect_err("an unknown option is refused").to_string();
    assert!(error.contains("no-such-option"), "the error names the option: {error}");
    // What is accepted beyond that list is known from the error, which names what was expected.
    let (_, expected) = error.split_once("expected").expect("the error says what was expected");
    let mut accepted: Vec<String> = expected.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    for names in [&mut listed, &mut sampled, &mut accepted] {
        names.sort();
    }
    assert_eq!(listed, accepted, "the description lists what is accepted");
    assert_eq!(listed, sampled, "there is a sample for each option");
    samples
}
