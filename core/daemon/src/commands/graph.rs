//! `driveline graph`.

use super::{print, read};
use crate::{cli::PictureFormat, daemon::graph_for, picture::Picture};
use std::{path::Path, process::ExitCode};

/// Draws the graph of a file.
pub fn graph(file: &Path, format: PictureFormat) -> ExitCode {
    let (config, mut mistakes) = match read(file) {
        Ok(read) => read,
        Err(code) => return code,
    };
    let graph = graph_for(&config, &mut mistakes);
    config.check(&graph, &mut mistakes);
    if !mistakes.is_empty() {
        mistakes.print();
        return ExitCode::FAILURE;
    }
    let picture = match config.definitions(&graph) {
        Ok(definitions) => Picture::new(&config, &definitions),
        Err(error) => return super::fail(error),
    };
    print(&match format {
        PictureFormat::Text => picture.text(),
        PictureFormat::Dot => picture.dot(),
        PictureFormat::Svg => picture.svg(),
    })
}
