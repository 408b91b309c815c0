//! Sources of values: arguments, variables, and the configuration file.

use std::collections::BTreeMap;
use std::path::Path;

use super::environment::{Environment, OTHER_VARIABLES};
use super::setting::Setting;
use super::suggest::nearest_of;
use super::values::Value;
use super::{all, find, nearest};
use crate::error::{Error, Result};

/// A value that some source gives for a setting.
#[derive(Clone, Debug)]
pub(super) struct GivenValue {
    pub(super) value: Value,
    /// Name of the place of the value, for errors.
    pub(super) place: String,
    /// Name of the place of the value, as the origin of the setting.
    pub(super) origin: String,
}

/// The values that one source gives, by setting.
pub(super) type GivenValues = BTreeMap<&'static str, GivenValue>;

/// The values among the arguments. Of several values of a setting the last one counts, but values
/// of `data` are joined to one list.
pub(super) fn arguments<'a, V: 'a>(explicit: &'a [(String, V)], faults: &mut Vec<Error>) -> GivenValues
where
    Value: From<&'a V>,
{
    let mut values = GivenValues::new();
    for (name, value) in explicit {
        let Some(setting) = find(name) else {
            faults.push(unknown(&format!("setting `{name}` is unknown"), nearest(name)));
            continue;
        };
        let value = match (values.get(setting.name), Value::from(value)) {
            (Some(GivenValue { value: Value::Text(before), .. }), Value::Text(text)) if setting.name == "data" => {
                Value::Text(format!("{before},{text}"))
            }
            (_, value) => value,
        };
        let given = GivenValue { value, place: name.clone(), origin: "argument".to_owned() };
        values.insert(setting.name, given);
    }
    values
}

/// The values among the variables. Warns of unknown names that begin like ours.
pub(super) fn variables(env: &Environment, faults: &mut Vec<Error>, warnings: &mut Vec<String>) -> GivenValues {
    let strict = env.switch("FOREBAY_STRICT_ENV", false).unwrap_or_else(|fault| {
        faults.push(fault);
        false
    });
    let names: BTreeMap<String, &Setting> = all().iter().map(|setting| (setting.variable(), setting)).collect();
    let mut values = GivenValues::new();
    for (variable, text) in env.iter() {
        if let Some(setting) = names.get(variable) {
            let (place, origin) = (variable.to_owned(), variable.to_owned());
            values.insert(setting.name, GivenValue { value: text.into(), place, origin });
        } else if variable.starts_with("FOREBAY_") && !OTHER_VARIABLES.contains(&variable) && !is_of_a_service(variable)
        {
            let known = names.keys().map(String::as_str).chain(OTHER_VARIABLES);
            // All names share the prefix, so that it would make all of them seem near.
            let nearest = nearest_of(
                variable.trim_start_matches("FOREBAY_"),
                known.map(|name| name.trim_start_matches("FOREBAY_")),
            );
            let nearest = nearest.map(|name| format!("FOREBAY_{name}"));
            let fault = unknown(&format!("variable `{variable}` is unknown"), nearest.as_deref());
            if strict { faults.push(fault) } else { warnings.push(fault.to_string()) }
        }
    }
    values
}

/// Whether Kubernetes sets `variable` for a service called `forebay`.
fn is_of_a_service(variable: &str) -> bool {
    variable.ends_with("_PORT")
        || variable.ends_with("_HOST")
        || variable.contains("_PORT_")
        || variable.contains("_SERVICE_")
}

fn unknown(fault: &str, nearest: Option<&str>) -> Error {
    match nearest {
        Some(name) => Error::config(format!("{fault}: did you mean `{name}`?")),
        None => Error::config(format!("{fault}; `forebay config` lists all")),
    }
}

/// The values in the file that `FOREBAY_CONFIG` names, if it names one.
pub(super) fn file(env: &Environment, faults: &mut Vec<Error>) -> GivenValues {
    let mut values = GivenValues::new();
    let Some(path) = env.get("FOREBAY_CONFIG").filter(|path| !path.is_empty()) else { return values };
    let table = read_file(path).unwrap_or_else(|fault| {
        faults.push(fault);
        toml::Table::new()
    });
    for (key, value) in &table {
        match find(key) {
            Some(setting) => {
                let (place, origin) = (format!("{path}: {key}"), path.to_owned());
                values.insert(setting.name, GivenValue { value: value_of(value), place, origin });
            }
            None => faults.push(unknown(&format!("key `{key}` of `{path}` is unknown"), nearest(key))),
        }
    }
    values
}

fn read_file(path: &str) -> Result<toml::Table> {
    let place = Path::new(path);
    let text = std::fs::read_to_string(place).map_err(|error| {
        Error::config("cannot read the file that `FOREBAY_CONFIG` names").with_source(error).at(place)
    })?;
    text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
        Error::config(format!(
            "the file that `FOREBAY_CONFIG` names is not valid TOML in line {line}: {}",
            error.message()
        ))
        .at(place)
    })
}

fn value_of(value: &toml::Value) -> Value {
    match value {
        toml::Value::String(text) => text.into(),
        toml::Value::Integer(number) => Value::Integer((*number).into()),
        toml::Value::Boolean(on) => Value::Switch(*on),
        toml::Value::Float(number) => Value::Float(*number),
        toml::Value::Array(values) => Value::List(values.iter().map(value_of).collect()),
        toml::Value::Table(table) => {
            Value::Map(table.iter().map(|(key, value)| (key.clone(), value_of(value))).collect())
        }
        toml::Value::Datetime(_) => Value::Other("datetime".to_owned()),
    }
}
