//! Logging of plugins: each of their callsites becomes one of this program.
//!
//! A callsite lives for ever, as `tracing` wants it; there are as many as log statements in the plugins' sources.

use super::callback;
use abi_stable::std_types::{RSlice, RStr};
use driveline_abi::{CallsiteInfo, FieldValue, Value as AbiValue};
use std::{
    fmt,
    sync::{
        OnceLock,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
};
use tracing_core::{
    Callsite, Event, Interest, Kind, Level, LevelFilter, Metadata,
    callsite::Identifier,
    dispatcher,
    field::{FieldSet, Value, ValueSet},
    span,
};

/// A callsite of a plugin.
struct Site {
    metadata: OnceLock<Metadata<'static>>,
    interest: AtomicU8,
}

const NEVER: u8 = 0;
const SOMETIMES: u8 = 1;
const ALWAYS: u8 = 2;

impl Callsite for Site {
    fn set_interest(&self, interest: Interest) {
        let interest = match () {
            () if interest.is_never() => NEVER,
            () if interest.is_always() => ALWAYS,
            () => SOMETIMES,
        };
        self.interest.store(interest, Relaxed);
    }

    fn metadata(&self) -> &Metadata<'_> {
        self.metadata.get().expect("set before the callsite is registered")
    }
}

impl Site {
    fn enabled(&'static self) -> bool {
        match self.interest.load(Relaxed) {
            NEVER => false,
            ALWAYS => true,
            _ => dispatcher::get_default(|dispatch| dispatch.enabled(self.static_metadata())),
        }
    }

    fn static_metadata(&'static self) -> &'static Metadata<'static> {
        self.metadata.get().expect("set before the callsite is registered")
    }
}

/// The callsite behind a handle; 0 is none.
fn site(handle: u64) -> Option<&'static Site> {
    // SAFETY: handles are the addresses that `register` gave out, of leaked boxes, or 0.
    unsafe { (handle as *const Site).as_ref() }
}

fn leak(text: RStr<'_>) -> &'static str {
    Box::leak(text.as_str().to_owned().into_boxed_str())
}

pub(super) extern "C" fn max_level() -> u32 {
    callback(0, || match LevelFilter::current() {
        LevelFilter::OFF => 0,
        LevelFilter::ERROR => 1,
        LevelFilter::WARN => 2,
        LevelFilter::INFO => 3,
        LevelFilter::DEBUG => 4,
        _ => 5,
    })
}

pub(super) extern "C" fn register(callsite: &CallsiteInfo<'_>) -> u64 {
    callback(0, || {
        let names: Vec<&'static str> = callsite.fields.iter().map(|name| leak(*name)).collect();
        let names: &'static [&'static str] = names.leak();
        let site: &'static Site =
            Box::leak(Box::new(Site { metadata: OnceLock::new(), interest: AtomicU8::new(SOMETIMES) }));
        let level = match callsite.level {
            0 | 1 => Level::ERROR,
            2 => Level::WARN,
            3 => Level::INFO,
            4 => Level::DEBUG,
            _ => Level::TRACE,
        };
        let metadata = Metadata::new(
            leak(callsite.name),
            leak(callsite.target),
            level,
            Some(leak(callsite.file)),
            Some(callsite.line),
            None,
            FieldSet::new(names, Identifier(site)),
            if callsite.is_span { Kind::SPAN } else { Kind::EVENT },
        );
        let _ = site.metadata.set(metadata);
        tracing_core::callsite::register(site);
        (&raw const *site) as u64
    })
}

pub(super) extern "C" fn enabled(callsite: u64) -> bool {
    callback(false, || site(callsite).is_some_and(Site::enabled))
}

/// A text that was printed on the other side.
struct Printed<'a>(&'a str);

impl fmt::Debug for Printed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// Runs `f` with a plugin's values as `tracing` has them.
fn with_values<T>(
    metadata: &'static Metadata<'static>,
    values: &[FieldValue<'_>],
    f: impl FnOnce(&ValueSet<'_>) -> T,
) -> T {
    let own: Vec<(usize, Box<dyn Value + '_>)> = values
        .iter()
        .map(|value| {
            let own: Box<dyn Value + '_> = match value.value {
                AbiValue::U64(value) => Box::new(value),
                AbiValue::I64(value) => Box::new(value),
                AbiValue::F64(value) => Box::new(value),
                AbiValue::Bool(value) => Box::new(value),
                AbiValue::Str(text) => Box::new(text.as_str()),
                AbiValue::Debug(text) => Box::new(tracing_core::field::debug(Printed(text.as_str()))),
            };
            (value.index as usize, own)
        })
        .collect();
    let mut by_field: Vec<Option<&dyn Value>> = vec![None; metadata.fields().len()];
    for (index, value) in &own {
        if let Some(place) = by_field.get_mut(*index) {
            *place = Some(&**value);
        }
    }
    f(&metadata.fields().value_set_all(&by_field))
}

pub(super) extern "C" fn event(callsite: u64, values: RSlice<'_, FieldValue<'_>>) {
    callback((), || {
        if let Some(site) = site(callsite).filter(|site| site.enabled()) {
            let metadata = site.static_metadata();
            with_values(metadata, values.as_slice(), |values| Event::dispatch(metadata, values));
        }
    });
}

pub(super) extern "C" fn span_new(callsite: u64, values: RSlice<'_, FieldValue<'_>>) -> u64 {
    callback(0, || {
        let Some(site) = site(callsite) else { return 0 };
        let metadata = site.static_metadata();
        with_values(metadata, values.as_slice(), |values| {
            dispatcher::get_default(|dispatch| {
                dispatch.new_span(&span::Attributes::new(metadata, values)).into_u64()
            })
        })
    })
}

/// Does something with a span; 0 is none.
fn with_span(id: u64, f: impl Fn(&dispatcher::Dispatch, &span::Id)) {
    if id != 0 {
        callback((), || dispatcher::get_default(|dispatch| f(dispatch, &span::Id::from_u64(id))));
    }
}

pub(super) extern "C" fn span_enter(id: u64) {
    with_span(id, |dispatch, id| dispatch.enter(id));
}

pub(super) extern "C" fn span_exit(id: u64) {
    with_span(id, |dispatch, id| dispatch.exit(id));
}

pub(super) extern "C" fn span_clone(id: u64) {
    with_span(id, |dispatch, id| _ = dispatch.clone_span(id));
}

pub(super) extern "C" fn span_close(id: u64) {
    with_span(id, |dispatch, id| _ = dispatch.try_close(id.clone()));
}
