//! Are the types on the boundary the same on both sides?

use abi_stable::{
    StableAbi,
    abi_stability::abi_checking::{
        AbiInstability, AbiInstabilityErrors, CheckingGlobals, check_layout_compatibility_with_globals,
    },
    sabi_types::VersionNumber,
    type_layout::TypeLayout,
};
use driveline_abi::PluginModRef;
use std::{
    fmt::Display,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// Compares a plugin's types with ours. The error is the innermost difference.
pub(crate) fn check(
    theirs: &'static TypeLayout,
    ours_version: VersionNumber,
    their_version: VersionNumber,
) -> Result<(), String> {
    let ours = <PluginModRef as StableAbi>::LAYOUT;
    let number = |version: VersionNumber| (version.minor, version.patch);
    // The check is one-sided: what is given first may have fewer prefix fields. So the older one goes first.
    let (first, second) =
        if number(their_version) < number(ours_version) { (theirs, ours) } else { (ours, theirs) };
    // With globals of its own: shared ones make the verdict depend on what was checked before, and keep references
    // into libraries that may be closed. And the layouts of a corrupt file make the checker panic.
    let checked = catch_unwind(AssertUnwindSafe(|| {
        check_layout_compatibility_with_globals(first, second, &CheckingGlobals::new())
    }));
    match checked {
        Ok(result) => result.map_err(|errors| innermost(&errors, std::ptr::eq(first, ours))),
        Err(payload) => {
            std::mem::forget(payload);
            Err("its description of itself, which makes no sense".into())
        }
    }
}

/// One line out of the thousands that the checker has to say: the deepest difference.
fn innermost(errors: &AbiInstabilityErrors, ours_first: bool) -> String {
    let mut found: Option<(usize, String)> = None;
    for error in &errors.errors {
        let stack: Vec<String> = error
            .stack_trace
            .iter()
            .map(|step| first_line(&step.expected).replace("field_name:", ""))
            .collect();
        let kind = error.stack_trace.last().map(|step| type_line(&step.expected)).unwrap_or_default();
        for difference in &error.errs {
            let depth = error.stack_trace.len();
            if found.as_ref().is_none_or(|(deepest, _)| *deepest < depth) {
                // Fields by name; positions and signatures on the way say nothing to a reader.
                let stack: Vec<&str> =
                    stack.iter().map(|step| step.trim()).filter(|step| is_name(step)).collect();
                found =
                    Some((depth, format!("{}{kind}: {}", stack.join(" > "), words(difference, ours_first))));
            }
        }
    }
    found.map_or_else(|| "a place that is not told".to_owned(), |(_, text)| text)
}

fn is_name(step: &str) -> bool {
    step.starts_with(|c: char| c.is_ascii_alphabetic())
        && step.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn first_line(value: &impl Display) -> String {
    value.to_string().lines().next().unwrap_or_default().trim().to_owned()
}

fn type_line(value: &impl Display) -> String {
    let text = value.to_string();
    let kind = text.lines().find_map(|line| line.trim().strip_prefix("type:"));
    kind.map(|kind| format!(" ({})", kind.trim())).unwrap_or_default()
}

fn words(difference: &AbiInstability, ours_first: bool) -> String {
    let sides = |what: &str, first: &dyn Display, second: &dyn Display| {
        let (here, there) = if ours_first { (first, second) } else { (second, first) };
        format!("{what}{here} here, {what}{there} there")
    };
    match difference {
        AbiInstability::Size(pair) => sides("size ", &pair.expected, &pair.found),
        AbiInstability::Alignment(pair) => sides("alignment ", &pair.expected, &pair.found),
        AbiInstability::FieldCountMismatch(pair) => sides("number of fields ", &pair.expected, &pair.found),
        AbiInstability::UnexpectedField(pair) => sides("field ", &pair.expected.name(), &pair.found.name()),
        AbiInstability::Name(pair) => sides("type ", &first_line(&pair.expected), &first_line(&pair.found)),
        AbiInstability::Package(pair) => sides("crate ", &pair.expected, &pair.found),
        AbiInstability::PackageVersion(pair) => sides("crate version ", &pair.expected, &pair.found),
        AbiInstability::MismatchedPrefixSize(pair) => {
            sides("number of fixed fields ", &pair.expected, &pair.found)
        }
        AbiInstability::MismatchedConstParam(pair) => {
            sides("length ", &format!("{:?}", pair.expected), &format!("{:?}", pair.found))
        }
        other => {
            let text = format!("{other:?}");
            text.split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
        }
    }
}
