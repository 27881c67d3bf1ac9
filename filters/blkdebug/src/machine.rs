//! QEMU's rules: events make errors active, and change the state that rules are for.
//!
//! An error is *active* from its event on, until another event makes others active: then requests fail by it. Of several,
//! the first that was written counts.
//!
//! Source: QEMU docs/devel/blkdebug.rst, and block/blkdebug.c, `process_rule` and `rule_check`, for what comes first.

use crate::{errno::Errno, event::Event, rule::Operation};
use driveline_sdk::options;
use std::{
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// A kind of request that an error is for.
#[options]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IoType {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

impl IoType {
    fn is(self, operation: Operation) -> bool {
        matches!(
            (self, operation),
            (Self::Read, Operation::Read)
                | (Self::Write, Operation::Write)
                | (Self::WriteZeroes, Operation::WriteZeroes)
                | (Self::Discard, Operation::Discard)
                | (Self::Flush, Operation::Flush)
                | (Self::BlockStatus, Operation::BlockStatus)
        )
    }
}

/// An error, as it is written.
#[options]
#[derive(Clone, Debug)]
pub(crate) struct InjectError {
    pub(crate) event: Event,
    /// In this state; 0: in any.
    #[serde(default)]
    pub(crate) state: i64,
    /// Without it: all but questions about extents.
    #[serde(default)]
    pub(crate) iotype: Option<IoType>,
    #[serde(default = "io_error")]
    pub(crate) errno: Errno,
    /// Of requests that touch this sector; -1: of all.
    #[serde(default = "no_sector")]
    pub(crate) sector: i64,
    #[serde(default)]
    pub(crate) once: bool,
    /// Before anybody else gets a turn.
    #[serde(default)]
    pub(crate) immediately: bool,
}

pub(crate) fn io_error() -> Errno {
    Errno(5)
}

pub(crate) fn no_sector() -> i64 {
    -1
}

/// A change of the state, as it is written.
#[options]
#[derive(Clone, Debug)]
pub(crate) struct SetState {
    pub(crate) event: Event,
    #[serde(default)]
    pub(crate) state: i64,
    #[serde(rename = "new_state", alias = "new-state")]
    pub(crate) new_state: i64,
}

/// The state, and what is active in it.
#[derive(Debug)]
pub(crate) struct Machine {
    errors: Vec<InjectError>,
    states: Vec<SetState>,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    state: i64,
    /// By number, in the order in which they are asked.
    active: Vec<usize>,
    /// Those with `once` that are used up.
    spent: Vec<bool>,
}

/// How a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Injected {
    pub(crate) errno: i32,
    pub(crate) immediately: bool,
}

impl Machine {
    pub(crate) fn new(errors: Vec<InjectError>, states: Vec<SetState>) -> Self {
        let now = Now { state: 1, active: Vec::new(), spent: vec![false; errors.len()] };
        Self { errors, states, now: Mutex::new(now) }
    }

    /// Is there any rule?
    pub(crate) fn is_empty(&self) -> bool {
        self.errors.is_empty() && self.states.is_empty()
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something happens.
    pub(crate) fn event(&self, event: u64) {
        if self.is_empty() {
            return;
        }
        let mut now = self.now();
        let state = now.state;
        let concerned = |of: Event, when: i64| of.0 == event && (when == 0 || when == state);
        let errors = self.errors.iter().enumerate();
        let active: Vec<usize> = errors
            .filter(|(number, rule)| concerned(rule.event, rule.state) && !now.spent[*number])
            .map(|(number, _)| number)
            .collect();
        if !active.is_empty() {
            now.active = active;
        }
        // All rules of one event see the state before it.
        if let Some(next) = self.states.iter().find(|rule| concerned(rule.event, rule.state)) {
            now.state = next.new_state;
        }
    }

    /// Does an active error concern this request? A flush has no range.
    pub(crate) fn error(&self, operation: Operation, range: Option<&Range<u64>>) -> Option<Injected> {
        if self.errors.is_empty() {
            return None;
        }
        let mut now = self.now();
        let found = now.active.iter().copied().find(|number| {
            let rule = &self.errors[*number];
            let its_type = match rule.iotype {
                Some(iotype) => iotype.is(operation),
                None => !matches!(operation, Operation::BlockStatus | Operation::Cache),
            };
            let its_range = match u64::try_from(rule.sector) {
                Ok(sector) => range.is_some_and(|range| range.contains(&sector.saturating_mul(512))),
                Err(_) => true,
            };
            its_type && its_range
        })?;
        let rule = &self.errors[found];
        if rule.errno.0 == 0 {
            return None;
        }
        if rule.once {
            now.spent[found] = true;
            now.active.retain(|number| *number != found);
        }
        Some(Injected { errno: rule.errno.0, immediately: rule.immediately })
    }
}
