//! Events as they come.

use super::{Result, Talk, number, print, text};
use serde_json::Value;
use std::{fmt::Write, process::ExitCode};

impl Talk {
    /// A line for each event, until the daemon ends. Its end is no failure: it is what was watched for.
    pub(super) fn watch(&mut self) -> Result<ExitCode> {
        loop {
            match self.client.event(None) {
                Ok(None) => {}
                Ok(Some(event)) => {
                    let line = if self.json { format!("{event}\n") } else { line(&event) };
                    if print(&line) != ExitCode::SUCCESS {
                        return Ok(ExitCode::FAILURE);
                    }
                    if text(&event["event"]) == "SHUTDOWN" {
                        return Ok(ExitCode::SUCCESS);
                    }
                }
                Err(failed) => return Err(failed),
            }
        }
    }
}

/// `12:30:05.250  JOB_STATUS_CHANGE  id=job0 status=running`: the time of day is UTC.
fn line(event: &Value) -> String {
    let time = &event["timestamp"];
    let (seconds, micros) = (number(&time["seconds"]), number(&time["microseconds"]));
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    let mut out = format!(
        "{hours:02}:{minutes:02}:{:02}.{:03}Z  {}",
        seconds % 60,
        micros / 1000,
        text(&event["event"])
    );
    let data = event["data"].as_object();
    for (at, (key, value)) in data.into_iter().flatten().enumerate() {
        let gap = if at == 0 { "  " } else { " " };
        let _ = match value {
            Value::String(value) if !value.contains(char::is_whitespace) => write!(out, "{gap}{key}={value}"),
            value => write!(out, "{gap}{key}={value}"),
        };
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_event_is_one_line() {
        let event = json!({
            "timestamp": { "seconds": 3605, "microseconds": 250_999 },
            "event": "BLOCK_JOB_COMPLETED",
            "data": { "device": "vda", "len": 5, "error": "No space\nleft" },
        });
        let expected = "01:00:05.250Z  BLOCK_JOB_COMPLETED  device=vda len=5 error=\"No space\\nleft\"\n";
        assert_eq!(line(&event), expected);
    }
}
