//! What a TOML file says, with the place of every key and value.

use super::mistake::{Mistake, Mistakes, Span};
use toml::{Spanned, de::DeTable, de::DeValue};

/// A table: keys and values in the order of the file.
pub type Table = Vec<(Spanned<String>, Spanned<Value>)>;

/// A TOML value without dates, which nothing here has a use for.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text.
    String(String),
    /// Any integer that TOML can write.
    Integer(i128),
    /// A number with a fraction.
    Float(f64),
    /// `true` or `false`.
    Boolean(bool),
    /// A list.
    Array(Vec<Spanned<Value>>),
    /// A table, inline or not.
    Table(Table),
    /// Something that cannot be; that has been said already.
    Wrong,
}

impl Value {
    /// What kind of value it is, for people.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::String(_) => "a string",
            Value::Integer(_) => "an integer",
            Value::Float(_) => "a float",
            Value::Boolean(_) => "a boolean",
            Value::Array(_) => "an array",
            Value::Table(_) => "a table",
            Value::Wrong => "wrong",
        }
    }

    /// The same in JSON, the language of options.
    pub fn to_json(&self) -> serde_json::Value {
        use serde_json::Value as Json;
        match self {
            Value::String(text) => Json::from(text.as_str()),
            Value::Integer(number) => match (u64::try_from(*number), i64::try_from(*number)) {
                (Ok(number), _) => Json::from(number),
                (_, Ok(number)) => Json::from(number),
                // Integers were checked when they were read.
                _ => Json::Null,
            },
            Value::Float(number) => Json::from(*number),
            Value::Boolean(flag) => Json::from(*flag),
            Value::Array(items) => items.iter().map(|item| item.get_ref().to_json()).collect(),
            Value::Table(table) => Json::Object(to_json(table)),
            Value::Wrong => Json::Null,
        }
    }
}

/// A table in JSON.
pub(super) fn to_json(table: &Table) -> serde_json::Map<String, serde_json::Value> {
    table.iter().map(|(key, value)| (key.get_ref().clone(), value.get_ref().to_json())).collect()
}

/// The value of a key.
pub(super) fn get<'t>(table: &'t Table, key: &str) -> Option<(&'t Spanned<String>, &'t Spanned<Value>)> {
    table.iter().find(|(name, _)| name.get_ref() == key).map(|(key, value)| (key, value))
}

/// Reads a text. What is no TOML goes to `mistakes`, and the rest is read all the same.
pub(super) fn parse(text: &str, mistakes: &mut Mistakes) -> Table {
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let span = error.span().unwrap_or(0..0);
        let mut lines = error.message().lines();
        let mistake = match lines.next() {
            Some("duplicate key") => {
                let key = text.get(span.clone()).unwrap_or_default();
                Mistake::new(span, format_args!("'{key}' is there already")).label("the second")
            }
            message => Mistake::new(span, message.unwrap_or("this is no TOML")),
        };
        let rest: Vec<_> = lines.collect();
        mistakes.add(if rest.is_empty() { mistake } else { mistake.help(rest.join("; ")) });
    }
    convert_table(table.get_ref(), mistakes)
}

fn convert_table(table: &DeTable<'_>, mistakes: &mut Mistakes) -> Table {
    let entry = |(key, value): (&Spanned<_>, &Spanned<DeValue<'_>>), mistakes: &mut Mistakes| {
        let name = String::from(&**AsRef::<std::borrow::Cow<'_, str>>::as_ref(key));
        (Spanned::new(key.span(), name), Spanned::new(value.span(), convert(value, mistakes)))
    };
    table.iter().map(|pair| entry(pair, mistakes)).collect()
}

fn convert(value: &Spanned<DeValue<'_>>, mistakes: &mut Mistakes) -> Value {
    let span = value.span();
    match value.get_ref() {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Boolean(flag) => Value::Boolean(*flag),
        DeValue::Integer(number) => {
            let digits = number.as_str().replace('_', "");
            let value = i128::from_str_radix(&digits, number.radix()).ok();
            let Some(value) = value.filter(|v| (i64::MIN.into()..=u64::MAX.into()).contains(v)) else {
                return refuse(mistakes, span, "an integer has at most 64 bits");
            };
            Value::Integer(value)
        }
        DeValue::Float(number) => match number.as_str().replace('_', "").parse::<f64>() {
            Ok(value) if value.is_finite() => Value::Float(value),
            _ => refuse(mistakes, span, "expected a finite number"),
        },
        DeValue::Datetime(_) => refuse(mistakes, span, "nothing here takes a date or a time"),
        DeValue::Array(items) => {
            let item = |item: &Spanned<DeValue<'_>>, mistakes: &mut Mistakes| {
                Spanned::new(item.span(), convert(item, mistakes))
            };
            Value::Array(items.iter().map(|value| item(value, mistakes)).collect())
        }
        DeValue::Table(table) => Value::Table(convert_table(table, mistakes)),
    }
}

fn refuse(mistakes: &mut Mistakes, span: Span, message: &str) -> Value {
    mistakes.add(Mistake::new(span, message));
    Value::Wrong
}
