//! The bridge from a plugin's `tracing` to the host's.
//!
//! A shared library has statics of its own, `tracing`'s among them. So the SDK installs a subscriber there that
//! hands everything on: each callsite is registered with the host once, and its filters, targets and spans work
//! as if the plugin were part of the program. What nobody listens to costs a load and a branch.

use abi_stable::std_types::{RSlice, RStr};
use driveline_abi::{CallsiteInfo, FieldValue, HostApiRef, Value};
use std::{
    collections::HashMap,
    fmt::Debug,
    sync::{PoisonError, RwLock},
};
use tracing_core::{
    Dispatch, Event, Interest, Level, LevelFilter, Metadata, Subscriber,
    callsite::Identifier,
    dispatcher,
    field::{Field, Visit},
    span,
};

/// Sends this library's events to the host from now on.
pub(crate) fn install(host: HostApiRef) {
    let bridge = Bridge { host, sites: RwLock::new(HashMap::new()) };
    // A subscriber that the author has set already stays; then his events are his own business.
    let _ = dispatcher::set_global_default(Dispatch::new(bridge));
}

/// A span that the host did not make. (Ids are never 0.)
const NO_SPAN: u64 = u64::MAX;

/// Calls the host about a span that it made.
fn about(span: &span::Id, call: extern "C" fn(u64)) {
    if span.into_u64() != NO_SPAN {
        call(span.into_u64());
    }
}

struct Bridge {
    host: HostApiRef,
    /// The host's handles.
    sites: RwLock<HashMap<Identifier, u64>>,
}

impl Bridge {
    fn site(&self, metadata: &'static Metadata<'static>) -> u64 {
        if let Some(site) = self.known(metadata) {
            return site;
        }
        let fields: Vec<RStr<'_>> =
            metadata.fields().iter().map(|field| RStr::from_str(field.name())).collect();
        let level = match *metadata.level() {
            Level::ERROR => 1,
            Level::WARN => 2,
            Level::INFO => 3,
            Level::DEBUG => 4,
            Level::TRACE => 5,
        };
        let site = (self.host.log_register())(&CallsiteInfo {
            name: metadata.name().into(),
            target: metadata.target().into(),
            file: metadata.file().unwrap_or("").into(),
            line: metadata.line().unwrap_or(0),
            level,
            is_span: metadata.is_span(),
            fields: RSlice::from_slice(&fields),
        });
        self.sites.write().unwrap_or_else(PoisonError::into_inner).insert(metadata.callsite(), site);
        site
    }

    fn known(&self, metadata: &Metadata<'_>) -> Option<u64> {
        self.sites.read().unwrap_or_else(PoisonError::into_inner).get(&metadata.callsite()).copied()
    }
}

impl Subscriber for Bridge {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        // Not `always`: the host's filter may depend on the span that it happens in.
        if (self.host.log_enabled())(self.site(metadata)) { Interest::sometimes() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.known(metadata).is_some_and(|site| (self.host.log_enabled())(site))
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(match (self.host.log_max_level())() {
            0 => LevelFilter::OFF,
            1 => LevelFilter::ERROR,
            2 => LevelFilter::WARN,
            3 => LevelFilter::INFO,
            4 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        })
    }

    fn new_span(&self, attributes: &span::Attributes<'_>) -> span::Id {
        let mut values = Values::default();
        attributes.record(&mut values);
        let site = self.site(attributes.metadata());
        let id = values.lend(|values| (self.host.span_new())(site, values));
        span::Id::from_u64(if id == 0 { NO_SPAN } else { id })
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {
        // The ABI has no call for values that come after a span was made.
    }

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut values = Values::default();
        event.record(&mut values);
        let site = self.site(event.metadata());
        values.lend(|values| (self.host.log_event())(site, values));
    }

    fn enter(&self, span: &span::Id) {
        about(span, self.host.span_enter());
    }

    fn exit(&self, span: &span::Id) {
        about(span, self.host.span_exit());
    }

    fn clone_span(&self, span: &span::Id) -> span::Id {
        about(span, self.host.span_clone());
        span.clone()
    }

    fn try_close(&self, span: span::Id) -> bool {
        about(&span, self.host.span_close());
        false
    }
}

/// Values of fields, kept until they are lent to the host together.
#[derive(Default)]
struct Values(Vec<(u32, Kept)>);

enum Kept {
    Plain(Value<'static>),
    Text(String),
    Printed(String),
}

impl Values {
    fn push(&mut self, field: &Field, value: Kept) {
        self.0.push((field.index() as u32, value));
    }

    fn lend<T>(&self, f: impl FnOnce(RSlice<'_, FieldValue<'_>>) -> T) -> T {
        let values: Vec<_> = self
            .0
            .iter()
            .map(|(index, kept)| {
                let value = match kept {
                    Kept::Plain(value) => *value,
                    Kept::Text(text) => Value::Str(text.as_str().into()),
                    Kept::Printed(text) => Value::Debug(text.as_str().into()),
                };
                FieldValue { index: *index, value }
            })
            .collect();
        f(RSlice::from_slice(&values))
    }
}

impl Visit for Values {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, Kept::Plain(Value::U64(value)));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, Kept::Plain(Value::I64(value)));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.push(field, Kept::Plain(Value::F64(value)));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, Kept::Plain(Value::Bool(value)));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, Kept::Text(value.to_owned()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.push(field, Kept::Printed(format!("{value:?}")));
    }
}
