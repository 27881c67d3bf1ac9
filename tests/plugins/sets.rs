//! Builds the libraries of `plugin-sets`.
//!
//! Each set is a workspace of its own in the target directory, made of copies of the SDK and of the set's filters.
//! So a set can have another ABI than the program without anything being kept twice, and never goes stale: a change
//! that is to be made to the SDK's sources must find its place exactly once. All sets share one target directory,
//! and the names of their folders keep their crates apart in it.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, OnceLock},
};

/// A change to a file of the SDK: the file, what stands there, and what shall.
type Patch = (&'static str, &'static str, &'static str);

/// A set of plugins.
struct Set {
    name: &'static str,
    /// Folder below `plugin-sets`, of one crate or several.
    filters: &'static str,
    patches: &'static [Patch],
}

const SETS: &[Set] = &[
    Set { name: "current", filters: "current", patches: &[] },
    Set {
        name: "major",
        filters: "variant",
        patches: &[("abi/Cargo.toml", "version = \"1.3.0\"", "version = \"2.0.0\"")],
    },
    Set {
        name: "swapped",
        filters: "variant",
        patches: &[
            ("abi/src/word.rs", "    pub offset: u64,\n", "    pub first: u64,\n"),
            (
                "abi/src/word.rs",
                "    pub length: u64,\n    /// The memory of a read",
                "    pub offset: u64,\n    /// The memory of a read",
            ),
            ("abi/src/word.rs", "    pub first: u64,\n", "    pub length: u64,\n"),
        ],
    },
    Set {
        name: "grown",
        filters: "variant",
        patches: &[
            ("abi/src/word.rs", "    pub reserved: [u64; 2],\n}", "    pub reserved: [u64; 4],\n}"),
            ("abi/src/word.rs", "            reserved: [0; 2],", "            reserved: [0; 4],"),
        ],
    },
    Set {
        name: "retyped",
        filters: "variant",
        patches: &[
            (
                "abi/src/host.rs",
                "pub log_max_level: extern \"C\" fn() -> u32",
                "pub log_max_level: extern \"C\" fn() -> u64",
            ),
            (
                "sdk/src/testing/clock.rs",
                "extern \"C\" fn log_max_level() -> u32",
                "extern \"C\" fn log_max_level() -> u64",
            ),
        ],
    },
    Set {
        name: "newer",
        filters: "variant",
        patches: &[
            ("abi/Cargo.toml", "version = \"1.3.0\"", "version = \"1.4.0\""),
            ("abi/src/word.rs", "COUNT: usize = 9", "COUNT: usize = 10"),
            ("abi/src/word.rs", "\"event\"];", "\"event\", \"later\"];"),
            (
                "abi/src/plugin.rs",
                "fn(FilterPtr, drained: u32)>,\n",
                "fn(FilterPtr, drained: u32)>,\n    /// Since 1.4.\n    pub later: Option<&'static OpVt>,\n",
            ),
            (
                "abi/src/host.rs",
                "    pub node_failed: extern \"C\" fn(cookie: u64, message: RStr<'_>),\n",
                "    pub node_failed: extern \"C\" fn(cookie: u64, message: RStr<'_>),\n    /// Since 1.4.\n    pub later: extern \"C\" fn(u64),\n",
            ),
            (
                "sdk/src/export.rs",
                "            begin: begin::<F>(),\n",
                "            begin: begin::<F>(),\n            later: slots[op::CACHE as usize],\n",
            ),
            (
                "sdk/src/testing/node.rs",
                "        ops.event().flatten(),\n",
                "        ops.event().flatten(),\n        None,\n",
            ),
            (
                "sdk/src/testing/clock.rs",
                "    node_failed,\n}",
                "    node_failed,\n    later: span_nothing,\n}",
            ),
        ],
    },
];

/// The sets that were built with SDKs of the past: their names, and the versions of the ABI.
const OLD: [(&str, &str); 3] = [("old", "1.0"), ("old-1-1", "1.1"), ("old-1-2", "1.2")];

/// The crates of an SDK.
const SDK: [&str; 4] = ["abi", "op", "macros", "sdk"];

/// How a set is built.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Profile {
    Debug,
    #[allow(dead_code)] // for benchmarks
    Release,
}

/// The directory with the libraries of a set (`current`, `major`, ..., `old`, `old-1-1`, `old-1-2`), built on first use.
pub(crate) fn set(name: &str, profile: Profile) -> PathBuf {
    static BUILT: OnceLock<Mutex<HashMap<(String, Profile), Arc<OnceLock<()>>>>> = OnceLock::new();
    let built = BUILT.get_or_init(Default::default).lock().unwrap();
    let built = { built }.entry((name.to_owned(), profile)).or_default().clone();
    built.get_or_init(|| build(name, profile));
    target().join(match profile {
        Profile::Debug => "debug",
        Profile::Release => "release",
    })
}

/// A library of a set.
pub(crate) fn library(set_name: &str, filter: &str) -> PathBuf {
    file(&set(set_name, Profile::Debug), filter)
}

/// The library of a filter in a directory.
pub(crate) fn file(directory: &Path, filter: &str) -> PathBuf {
    directory.join(format!("libdriveline_filter_{}.so", filter.replace('-', "_")))
}

fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("plugin-sets/target")
}

fn build(name: &str, profile: Profile) {
    // The benchmarks of the loader use this file, too.
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .find(|folder| folder.join("tests/plugin-sets").is_dir())
        .expect("this crate is in the repository");
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("plugin-sets").join(name);
    // The folder inside has the set's name too: the paths inside a workspace are what tells cargo its crates apart.
    let crates = place.join(name);
    if let Some((_, version)) = OLD.iter().find(|(set, _)| *set == name) {
        copy(&repository.join("tests/plugin-sets/old-sdk").join(version), &crates, &mut |_, text| text);
        write(&place.join("Cargo.toml"), &manifest(repository, name, &[]));
    } else {
        let set = SETS.iter().find(|set| set.name == name).expect("a set that exists");
        let mut done = vec![false; set.patches.len()];
        for part in SDK {
            copy(&repository.join("plugins").join(part), &crates.join(part), &mut |path, mut text| {
                for (patch, done) in set.patches.iter().zip(&mut done) {
                    if Path::new(part).join(path) == Path::new(patch.0) {
                        assert_eq!(text.matches(patch.1).count(), 1, "set {name}: {patch:?} has one place");
                        text = text.replace(patch.1, patch.2);
                        *done = true;
                    }
                }
                text
            });
        }
        assert!(done.iter().all(|done| *done), "set {name}: every patch has its file");
        let filters = repository.join("tests/plugin-sets").join(set.filters);
        if set.filters == "variant" {
            copy(&filters, &crates.join("variant"), &mut |_, text| {
                text.replace("driveline-filter-variant", &format!("driveline-filter-{name}"))
            });
        } else {
            copy(&filters, &crates, &mut |_, text| text);
        }
        write(&place.join("Cargo.toml"), &manifest(repository, name, &SDK));
    }
    // The versions of all dependencies are those of the program, which are on this machine already.
    let lock = fs::read_to_string(repository.join("Cargo.lock")).expect("the repository has a lock file");
    if write(&place.join("Cargo.lock.repository"), &lock) {
        write(&place.join("Cargo.lock"), &lock);
    }
    cargo(&place, profile, &["build", "--workspace", "--exclude", "driveline-filter-aborts"]);
    if name == "current" {
        // The filter alone: what it is made of need not abort for the whole to do so.
        cargo(&place, profile, &["rustc", "-p", "driveline-filter-aborts", "--", "-Cpanic=abort"]);
    }
}

fn cargo(place: &Path, profile: Profile, arguments: &[&str]) {
    // One at a time: they would wait for each other's locks anyway, and say so.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (cargo_arguments, rest) = match arguments.iter().position(|argument| *argument == "--") {
        Some(at) => arguments.split_at(at),
        None => (arguments, &[][..]),
    };
    let output = Command::new(env!("CARGO"))
        .args(cargo_arguments)
        .args((profile == Profile::Release).then_some("--release"))
        .args(["--offline", "--quiet", "--target-dir"])
        .arg(target())
        .args(rest)
        .current_dir(place)
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .output()
        .expect("cargo can be run");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo {arguments:?} in {}:\n{errors}", place.display());
}

/// The manifest of a set's workspace: the repository's, with other members and its own copy of the SDK.
fn manifest(repository: &Path, name: &str, sdk: &[&str]) -> String {
    let text = fs::read_to_string(repository.join("Cargo.toml")).expect("the repository has a manifest");
    let mut manifest: toml::Table = text.parse().expect("it is TOML");
    let workspace = manifest["workspace"].as_table_mut().expect("it has a workspace");
    workspace.remove("default-members");
    workspace.remove("exclude");
    workspace.insert("members".into(), vec![format!("{name}/*")].into());
    let dependencies = workspace["dependencies"].as_table_mut().expect("it has dependencies");
    dependencies.retain(|dependency, _| !dependency.starts_with("driveline-"));
    for part in sdk {
        let mut dependency = toml::Table::new();
        dependency.insert("path".into(), format!("{name}/{part}").into());
        dependencies.insert(format!("driveline-{part}"), dependency.into());
    }
    let profile = "[dev]\ndebug = false\nincremental = false\n[dev.package.driveline-filter-small]\nopt-level = \"s\"\n[release]\ncodegen-units = 1\n";
    let mut profile: toml::Table = profile.parse().expect("it is TOML");
    if name != "current" {
        profile["dev"].as_table_mut().expect("it is a table").remove("package");
    }
    manifest.insert("profile".into(), profile.into());
    manifest.to_string()
}

/// Copies a folder's manifests and sources, with changes.
fn copy(from: &Path, to: &Path, change: &mut dyn FnMut(&Path, String) -> String) {
    copy_below(from, to, Path::new(""), change);
}

fn copy_below(from: &Path, to: &Path, below: &Path, change: &mut dyn FnMut(&Path, String) -> String) {
    for entry in fs::read_dir(from.join(below)).unwrap_or_else(|error| panic!("{}: {error}", from.display()))
    {
        let entry = entry.expect("it can be listed");
        let path = below.join(entry.file_name());
        if entry.file_type().expect("it has a type").is_dir() {
            // Tests and benches of the SDK have dependencies of their own.
            if !["target", "tests", "benches"].map(OsStr::new).contains(&&*entry.file_name()) {
                copy_below(from, to, &path, change);
            }
        } else if [Some("rs"), Some("toml")].contains(&path.extension().and_then(OsStr::to_str)) {
            let text = fs::read_to_string(from.join(&path)).expect("it can be read");
            write(&to.join(&path), &change(&path, text));
        }
    }
}

/// Writes a file if that changes it, so that cargo sees what has changed by its time. Says whether it did.
fn write(path: &Path, text: &str) -> bool {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return false;
    }
    fs::create_dir_all(path.parent().expect("a file is in a folder")).expect("a folder can be made");
    fs::write(path, text).expect("a file can be written");
    true
}
