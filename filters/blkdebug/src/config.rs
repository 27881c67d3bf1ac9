//! Rules from a file, in QEMU's format of configuration: `[inject-error]` and `[set-state]`, with lines `key = "value"`.
//!
//! Source: QEMU util/qemu-config.c, `qemu_config_foreach`, for what is read how; the words are those of QEMU 10.0.2.

use crate::{
    errno::Errno,
    event::Event,
    machine::{InjectError, IoType, SetState, io_error, no_sector},
};

/// What a file has in it.
#[derive(Debug, Default)]
pub(crate) struct Config {
    pub(crate) errors: Vec<InjectError>,
    pub(crate) states: Vec<SetState>,
}

/// A group of lines, as far as it was read.
#[derive(Default)]
struct Group {
    name: String,
    event: Option<String>,
    state: i64,
    new_state: i64,
    iotype: Option<String>,
    errno: Option<i64>,
    sector: Option<i64>,
    once: bool,
    immediately: bool,
}

/// Reads it all, or says what is wrong.
pub(crate) fn parse(text: &str) -> Result<Config, String> {
    let mut config = Config::default();
    let mut group: Option<Group> = None;
    for line in text.lines() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split([']', ' ']).next()) {
            if let Some(group) = group.take() {
                group.end(&mut config)?;
            }
            if !["inject-error", "set-state"].contains(&name) {
                return Err(format!("There is no option group '{name}'"));
            }
            group = Some(Group { name: name.to_owned(), ..Group::default() });
            continue;
        }
        // As QEMU reads it: a word, and a value between quotes after an equals sign; what is otherwise is an empty value.
        let line = line.trim_start();
        let (key, rest) = line.split_at(line.find(char::is_whitespace).unwrap_or(line.len()));
        let quoted = rest.trim_start().strip_prefix('=').and_then(|rest| rest.trim_start().strip_prefix('"'));
        let value = quoted.and_then(|value| value.split('"').next()).unwrap_or("");
        if key.is_empty() {
            continue;
        }
        group.as_mut().ok_or("no group defined")?.set(key, value)?;
    }
    if let Some(group) = group {
        group.end(&mut config)?;
    }
    Ok(config)
}

fn number(key: &str, value: &str) -> Result<i64, String> {
    let parsed = match value.strip_prefix("0x") {
        Some(hex) => i64::from_str_radix(hex, 16).ok(),
        None => value.parse().ok(),
    };
    parsed.ok_or_else(|| format!("Parameter '{key}' expects a number"))
}

fn truth(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(format!("Parameter '{key}' expects 'on' or 'off'")),
    }
}

impl Group {
    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let inject = self.name == "inject-error";
        match key {
            "event" => self.event = Some(value.to_owned()),
            "state" => self.state = number(key, value)?,
            "iotype" if inject => self.iotype = Some(value.to_owned()),
            "errno" if inject => self.errno = Some(number(key, value)?),
            "sector" if inject => self.sector = Some(number(key, value)?),
            "once" if inject => self.once = truth(key, value)?,
            "immediately" if inject => self.immediately = truth(key, value)?,
            "new_state" if !inject => self.new_state = number(key, value)?,
            _ => return Err(format!("Invalid parameter '{key}'")),
        }
        Ok(())
    }

    fn end(self, config: &mut Config) -> Result<(), String> {
        let event = Event::of(self.event.as_deref().ok_or("Missing event name for rule")?)?;
        if self.name == "set-state" {
            config.states.push(SetState { event, state: self.state, new_state: self.new_state });
            return Ok(());
        }
        let iotype = match self.iotype.as_deref() {
            None => None,
            Some("read") => Some(IoType::Read),
            Some("write") => Some(IoType::Write),
            Some("write-zeroes") => Some(IoType::WriteZeroes),
            Some("discard") => Some(IoType::Discard),
            Some("flush") => Some(IoType::Flush),
            Some("block-status") => Some(IoType::BlockStatus),
            Some(other) => return Err(format!("invalid parameter value: {other}")),
        };
        let errno = match self.errno {
            None => io_error(),
            Some(errno) => {
                Errno::of_number(errno).ok_or_else(|| format!("invalid parameter value: {errno}"))?
            }
        };
        config.errors.push(InjectError {
            event,
            state: self.state,
            iotype,
            errno,
            sector: self.sector.unwrap_or_else(no_sector),
            once: self.once,
            immediately: self.immediately,
        });
        Ok(())
    }
}
