//! What the tests of this crate share.
#![allow(dead_code)] // each test program uses some of it

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

/// Compares with the file of that name, or writes it when `UPDATE_GOLDEN` is set.
pub(crate) fn golden(path: &Path, found: &str) {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        return std::fs::write(path, found).unwrap();
    }
    let expected = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        expected == found,
        "{} is not what was found; with UPDATE_GOLDEN=1 it is written anew\n--- found\n{found}--- expected\n{expected}",
        path.display()
    );
}

/// The folder of this crate's tests.
pub(crate) fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// The folder of the example graphs.
pub(crate) fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/graphs").canonicalize().unwrap()
}

/// The program.
pub(crate) fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_driveline"))
}

/// The program, with the filters that the examples use beside it: built once, by the cargo that runs the tests.
pub(crate) fn program_with_filters() -> &'static Path {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let directory = program().parent().unwrap();
        let mut cargo = Command::new(env!("CARGO"));
        // What cargo says of this crate to its tests is nothing for build scripts, which would run again for it.
        let of_this_crate =
            |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
        for (name, _) in std::env::vars_os().filter(|(name, _)| of_this_crate(&name.to_string_lossy())) {
            cargo.env_remove(name);
        }
        cargo.args(["build", "--quiet"]);
        for filter in ["bitmap-holder", "throttle", "copy-on-read"] {
            cargo.arg("-p").arg(format!("driveline-filter-{filter}"));
        }
        cargo.arg("--manifest-path").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml"));
        cargo.arg("--target-dir").arg(directory.parent().unwrap());
        if directory.ends_with("release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().expect("cargo runs").success(), "the filters are built");
    });
    program()
}

/// Runs the program to its end.
pub(crate) fn driveline(arguments: &[&str]) -> Output {
    Command::new(program()).args(arguments).output().expect("the program runs")
}

/// What it printed.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("it prints UTF-8")
}
