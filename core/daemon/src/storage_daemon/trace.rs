//! `--trace`: which log lines, and where they go, in QEMU's syntax.
//!
//! QEMU's events are not Driveline's: a pattern of QEMU's says which part of the program it is about, by the first word.

use super::keyval;
use std::{fs::File, io};

/// By the beginning of QEMU's events: Driveline's target.
const PARTS: [(&str, &str); 14] = [
    ("nbd_", "driveline::nbd"),
    ("bdrv_", "driveline_graph"),
    ("blk_", "driveline::io"),
    ("block_", "driveline_jobs"),
    ("job_", "driveline_jobs"),
    ("mirror_", "driveline_jobs"),
    ("backup_", "driveline_jobs"),
    ("commit_", "driveline_jobs"),
    ("stream_", "driveline_jobs"),
    ("qmp_", "driveline::qmp"),
    ("monitor_", "driveline::qmp"),
    ("handle_qmp_", "driveline::qmp"),
    ("qcow2_", "driveline_drivers"),
    ("file_", "driveline_drivers"),
];

/// What all `--trace` options together ask for.
#[derive(Debug, Default)]
pub(super) struct Traces {
    /// In the language of log filters.
    pub(super) directives: Vec<String>,
    /// Instead of stderr.
    pub(super) file: Option<File>,
}

impl Traces {
    /// Takes one more option. Returns warnings. Errors: an unknown key, or a file that cannot be opened.
    pub(super) fn add(&mut self, text: &str) -> Result<Vec<String>, String> {
        let mut warnings = Vec::new();
        for (key, value) in keyval::flat(text, "enable") {
            let failed =
                |error: io::Error| format!("Could not open '{value}': {}", crate::exports::reason(&error));
            match &*key {
                "enable" => warnings.extend(self.pattern(&value)),
                "file" => self.file = Some(File::create(&value).map_err(failed)?),
                "events" => {
                    let patterns = std::fs::read_to_string(&value).map_err(failed)?;
                    let patterns = patterns.lines().map(str::trim);
                    for pattern in patterns.filter(|line| !line.is_empty() && !line.starts_with('#')) {
                        warnings.extend(self.pattern(pattern));
                    }
                }
                other => return Err(format!("Invalid parameter '{other}'")),
            }
        }
        Ok(warnings)
    }

    fn pattern(&mut self, pattern: &str) -> Option<String> {
        let (level, name) = match pattern.strip_prefix('-') {
            Some(name) => ("off", name),
            None => ("trace", pattern),
        };
        if name.starts_with("driveline") && !name.contains('*') {
            self.directives.push(format!("{name}={level}"));
            return None;
        }
        // A pattern is about a part if one of the two begins with the other, as far as it is literal.
        let (literal, wild) = match name.split_once('*') {
            Some((literal, _)) => (literal, true),
            None => (name, false),
        };
        let about = |part: &str| literal.starts_with(part) || wild && part.starts_with(literal);
        let mut targets: Vec<_> =
            PARTS.iter().filter(|(part, _)| about(part)).map(|(_, target)| *target).collect();
        targets.sort_unstable();
        targets.dedup();
        let found = !targets.is_empty();
        self.directives.extend(targets.iter().map(|target| format!("{target}={level}")));
        (!found).then(|| format!("trace event '{name}' does not exist"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_qemus_events_name_parts_of_the_program() {
        let mut traces = Traces::default();
        let mut add = |text: &str| traces.add(text);
        assert_eq!(add("nbd_*").unwrap(), [""; 0]);
        assert_eq!(add("enable=-qmp_job_cancel").unwrap(), [""; 0]);
        assert_eq!(add("driveline::io").unwrap(), [""; 0]);
        assert_eq!(add("foo").unwrap(), ["trace event 'foo' does not exist"]);
        assert_eq!(add("bogus=3").unwrap_err(), "Invalid parameter 'bogus'");
        assert_eq!(add("events=/nope").unwrap_err(), "Could not open '/nope': No such file or directory");
        assert_eq!(traces.directives, ["driveline::nbd=trace", "driveline::qmp=off", "driveline::io=trace"]);
    }
}
