//! What is loaded, and what is refused with which words.

use super::sets::library;
use driveline_loader::{LoadError, Loader, Problem, inspect, load};
use std::{
    fs,
    io::Write,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

/// Why a file is refused, without the file's name.
fn refusal(path: &Path) -> String {
    let text = load(path).expect_err("refused").to_string();
    assert!(!text.contains('\n'), "one line: {text}");
    let named = format!("plugin {}: ", path.display());
    text.strip_prefix(&named).unwrap_or_else(|| panic!("names the file: {text}")).to_owned()
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

#[test]
fn files_that_are_no_libraries_are_refused_by_what_they_are() {
    let folder = scratch();
    let file = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let expected = "expected a shared library for this machine, found ";
    assert_eq!(
        refusal(&file("text.so", b"hello, this is a text of some length\n")),
        format!("{expected}a file that is not ELF")
    );
    assert_eq!(refusal(&file("empty.so", b"")), format!("{expected}an empty file"));
    assert_eq!(refusal(folder.path()), "expected a regular file");
    assert_eq!(refusal(Path::new("/dev/null")), "expected a regular file");
    assert_eq!(refusal(&folder.path().join("missing.so")), "No such file or directory (os error 2)");
    let program = std::env::current_exe().unwrap();
    assert!(refusal(&program).starts_with("the dynamic linker says: "), "{}", refusal(&program));
}

#[test]
fn other_libraries_are_no_plugins() {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let libc = maps.split_whitespace().find(|word| word.contains("libc.so")).expect("dynamically linked");
    assert_eq!(
        refusal(Path::new(libc)),
        "expected a Driveline filter plugin, found a library without a plugin's header, which export_filters! writes"
    );
}

#[test]
fn a_truncated_plugin_is_refused_wherever_it_is_cut() {
    let (folder, whole) = (scratch(), fs::read(library("current", "small")).unwrap());
    for part in 0..100 {
        let path = folder.path().join(format!("{part}.so"));
        fs::write(&path, &whole[..whole.len() * part / 100]).unwrap();
        let why = refusal(&path);
        assert!(why.starts_with("expected a shared library for this machine, found "), "{part} %: {why}");
    }
}

#[test]
fn a_build_that_aborts_on_panic_is_refused() {
    assert_eq!(
        refusal(&library("current", "aborts")),
        "expected a build with panic = \"unwind\", found panic = \"abort\""
    );
}

#[test]
fn a_name_exported_twice_is_refused() {
    assert_eq!(
        refusal(&library("current", "twice")),
        "filter 'twice': expected each name once, found it twice"
    );
}

#[test]
fn paths_and_links_to_one_file_are_one_plugin_and_a_copy_is_another() {
    let (folder, original) = (scratch(), library("current", "small"));
    let place = |name: &str| folder.path().join(name);
    fs::copy(&original, place("copy.so")).unwrap();
    fs::hard_link(place("copy.so"), place("hard.so")).unwrap();
    symlink(place("copy.so"), place("soft.so")).unwrap();
    let first = load(&place("copy.so")).unwrap();
    for same in ["copy.so", "hard.so", "soft.so"] {
        assert!(std::ptr::eq(first, load(&place(same)).unwrap()), "{same}");
    }
    assert!(!std::ptr::eq(first, load(&original).unwrap()));
}

#[test]
fn a_new_file_under_an_old_name_is_loaded_and_one_written_over_is_refused() {
    let folder = scratch();
    let (path, next) = (folder.path().join("plugin.so"), folder.path().join("next.so"));
    fs::copy(library("current", "versioned-1"), &path).unwrap();
    let old = load(&path).unwrap();
    fs::copy(library("current", "versioned-2"), &next).unwrap();
    fs::rename(&next, &path).unwrap();
    let new = load(&path).unwrap();
    let version = |plugin: &driveline_loader::Plugin| {
        driveline_loader::PluginReport::of(plugin).filters[0].version.clone()
    };
    assert_eq!((version(old), version(new)), ("1.0.0".into(), "2.0.0".into()));

    // Only appended to: the library is in memory.
    fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"more").unwrap();
    assert!(matches!(load(&path), Err(LoadError::Changed { .. })));
}

#[test]
fn the_first_of_two_names_wins_and_the_other_is_reported() {
    let (one, two) = (scratch(), scratch());
    let put = |from: PathBuf, folder: &tempfile::TempDir, name: &str| {
        let path = folder.path().join(format!("libdriveline_filter_{name}.so"));
        fs::copy(from, &path).unwrap();
        path
    };
    let first = put(library("current", "versioned-1"), &one, "versioned");
    let hidden = put(library("current", "versioned-2"), &two, "versioned");
    let other = put(library("current", "versioned-2"), &two, "other");
    fs::write(two.path().join("libdriveline_filter_bad.so"), "text").unwrap();
    fs::write(two.path().join("README"), "not looked at").unwrap();

    let mut loader = Loader::new();
    let missing = one.path().join("missing");
    loader.load_all(&[missing.clone(), one.path().into(), two.path().into()]);
    let names: Vec<_> = loader.drivers().iter().map(|driver| (driver.name(), driver.path())).collect();
    assert_eq!(names, [("versioned", &*first)]);
    let problems: Vec<String> = loader.problems().iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            format!("plugin directory {}: No such file or directory (os error 2)", missing.display()),
            format!(
                "plugin {}/libdriveline_filter_bad.so: expected a shared library for this machine, \
                 found a file that is not ELF",
                two.path().display()
            ),
            format!(
                "plugin {}: its filter 'versioned' is not used, {} comes first",
                other.display(),
                first.display()
            ),
            format!("plugin {}: not used, {} comes first", hidden.display(), first.display()),
        ]
    );
    assert!(matches!(loader.problems()[0], Problem::Directory { .. }));
}

#[test]
fn a_report_says_what_a_plugin_is() {
    let report = inspect(&library("current", "set")).unwrap();
    assert_eq!(report.abi_version, "1.3.0");
    let filter = |name: &str| report.filters.iter().find(|filter| filter.name == name).unwrap().clone();
    let invert = filter("invert");
    assert_eq!(invert.operations, ["read", "write"]);
    assert_eq!((&*invert.default, &*invert.effects), ("deny", &["changes-data".to_owned()][..]));
    assert_eq!(invert.operations_known, 9);
    assert_eq!(invert.summary, "stores every byte inverted");
    let mirror = filter("mirror");
    assert_eq!(mirror.children, ["child", "target"]);
    assert_eq!(mirror.effects, ["own-writes", "not-live"]);
    assert_eq!(filter("sleeper").options, ["time"]);
    assert_eq!(filter("nothing").operations, [""; 0]);
    assert_eq!(filter("passthrough").operations.len(), 7);
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<driveline_loader::PluginReport>(&json).unwrap(), report);
}

#[test]
fn failed_loads_leave_nothing_behind() {
    let open = || fs::read_dir("/proc/self/fd").unwrap().count();
    let bad = library("current", "aborts");
    let _ = load(&bad);
    let before = open();
    for _ in 0..200 {
        assert!(load(&bad).is_err());
    }
    // Other tests open and close files at the same time.
    assert!(open() < before + 100, "descriptors are given back");
}

#[test]
fn plugins_are_looked_for_where_the_program_is_told() {
    let (status, output) = {
        let mut command = super::child::command("search", Path::new("/given"));
        command.env("DRIVELINE_PLUGIN_PATH", "/first:/second::/given");
        let output = command.output().unwrap();
        (output.status, String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let beside = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let expected = format!("[\"/given\", \"/first\", \"/second\", {beside:?}]");
    assert!(status.success() && output.contains(&expected), "{output}");
}
