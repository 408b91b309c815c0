//! Forms: read, print, check and describe the values of one type.
//!
//! A row of the table names the form of its setting. A form knows the accepted range or choices, so
//! that nothing else checks a single value.

use super::config::{Epochs, Shuffle, Skip};
use super::mixture::MixtureSettings;
use super::values::{
    Value, boolean, cpu_set, cpus, cpus_text, integer, is_none, limit_text, list, list_text, named, size, size_text,
    skips, skips_text,
};
use crate::error::Error;
use crate::tokens::{Dtype, MAX_FIELDS};

/// The reason why a value cannot be the value of a setting.
#[derive(Debug)]
pub(crate) enum Unfit {
    /// The setting takes values of other types.
    Type,
    /// The type is right. The value is out of range, or a text that the setting does not
    /// understand.
    Value,
    /// One part of the value is wrong. The error names the part.
    Part(Error),
}

/// Reads and shows values of type `T`.
pub(crate) trait Form<T>: Sync {
    /// Reads a text without blanks around it.
    fn parse(&self, text: &str) -> Result<T, Unfit>;

    /// Reads a typed value that is not text and not none.
    fn convert(&self, value: &Value) -> Result<T, Unfit>;

    /// Whether a text could have given this value, which was built in Rust.
    fn holds(&self, value: &T) -> bool;

    /// Prints `value` as a text that [`Form::parse`] reads back.
    fn print(&self, value: &T) -> String;

    /// Returns `value` as a typed value.
    fn value(&self, value: &T) -> Value {
        Value::Text(self.print(value))
    }

    /// Describes the accepted values, as a noun phrase.
    fn accepts(&self) -> String;

    /// The type annotation in Python, without `None`.
    fn python(&self) -> String;

    /// The name and the meaning of each value, if values have names and meanings.
    fn meanings(&self) -> Vec<(&'static str, &'static str)> {
        Vec::new()
    }

    /// Reads a value of any source.
    fn read(&self, value: &Value) -> Result<T, Unfit> {
        match value {
            Value::Text(text) => self.parse(text.trim()),
            Value::None => self.parse("none").map_err(|_| Unfit::Type),
            value => self.convert(value),
        }
    }
}

/// Reads an integer that fits `T`.
fn whole<T: TryFrom<i128>>(value: &Value) -> Result<T, Unfit> {
    match value {
        Value::Integer(number) => T::try_from(*number).map_err(|_| Unfit::Value),
        _ => Err(Unfit::Type),
    }
}

/// Checks a value that was read.
fn checked<T>(form: &impl Form<T>, value: Option<T>) -> Result<T, Unfit> {
    value.filter(|value| form.holds(value)).ok_or(Unfit::Value)
}

/// The unit in which an integer is printed.
#[derive(Clone, Copy)]
enum Unit {
    None,
    /// Tokens, printed with a unit. The text is an example for errors.
    Tokens(&'static str),
    /// Tokens, printed without a unit.
    PlainTokens,
    Bytes,
}

/// An integer from `low` to `high`, of any integer type that holds them.
pub(super) struct Integer {
    low: i128,
    high: i128,
    unit: Unit,
    /// Description of the accepted values, if the usual one does not fit.
    accepts: Option<&'static str>,
}

const fn from_to(low: u64, high: u64, unit: Unit) -> Integer {
    Integer { low: low as i128, high: high as i128, unit, accepts: None }
}

pub(super) const fn number(low: u64, high: u64) -> Integer {
    from_to(low, high, Unit::None)
}

/// An integer that may be negative.
pub(super) const fn signed_number() -> Integer {
    let accepts = Some("an integer of 64 bits");
    Integer { low: i64::MIN as i128, high: i64::MAX as i128, unit: Unit::None, accepts }
}

/// A token id.
pub(super) const fn token_id() -> Integer {
    number(0, i32::MAX as u64).called("an id below 2^31")
}

/// A number of tokens, printed with a unit like `example`.
pub(super) const fn tokens(low: u64, high: u64, example: &'static str) -> Integer {
    from_to(low, high, Unit::Tokens(example))
}

/// A number of tokens, printed in digits.
pub(super) const fn few_tokens(low: u64, high: u64) -> Integer {
    from_to(low, high, Unit::PlainTokens)
}

/// A number of bytes.
pub(super) const fn bytes() -> Integer {
    from_to(0, u64::MAX, Unit::Bytes).called("a number of bytes, such as `512MiB` or `1GB`")
}

impl Integer {
    /// The same integers, with another description of the accepted values.
    pub(super) const fn called(self, accepts: &'static str) -> Self {
        Self { accepts: Some(accepts), ..self }
    }
}

impl<T: Copy + Into<i128> + TryFrom<i128>> Form<T> for Integer {
    fn parse(&self, text: &str) -> Result<T, Unfit> {
        let (digits, sign) = match text.strip_prefix('-') {
            Some(digits) if self.low < 0 => (digits, -1),
            _ => (text, 1),
        };
        let found = match self.unit {
            Unit::None => integer(digits),
            Unit::Tokens(_) | Unit::PlainTokens => size(digits, false),
            Unit::Bytes => size(digits, true),
        };
        checked(self, found.and_then(|found| T::try_from(sign * i128::from(found)).ok()))
    }

    fn convert(&self, value: &Value) -> Result<T, Unfit> {
        checked(self, Some(whole(value)?))
    }

    fn holds(&self, value: &T) -> bool {
        (self.low..=self.high).contains(&(*value).into())
    }

    fn print(&self, value: &T) -> String {
        let value = (*value).into();
        match self.unit {
            Unit::None | Unit::PlainTokens => value.to_string(),
            Unit::Tokens(_) => size_text(value as u64, ""),
            Unit::Bytes => size_text(value as u64, "B"),
        }
    }

    fn value(&self, value: &T) -> Value {
        Value::Integer((*value).into())
    }

    fn accepts(&self) -> String {
        let noun = match self.unit {
            Unit::Tokens(_) | Unit::PlainTokens => "a number of tokens",
            _ => "an integer",
        };
        let example =
            if let Unit::Tokens(example) = self.unit { format!(", such as `{example}`") } else { String::new() };
        let range = || format!("{noun} from {} to {}{example}", self.low, limit_text(self.high as u64));
        self.accepts.map_or_else(range, str::to_owned)
    }

    fn python(&self) -> String {
        "int".to_owned()
    }
}

/// True or false.
pub(super) struct Switch;

/// Reads 0 and 1 as false and true.
fn switch_of(value: &Value) -> Result<bool, Unfit> {
    match value {
        Value::Switch(on) => Ok(*on),
        Value::Integer(0) => Ok(false),
        Value::Integer(1) => Ok(true),
        Value::Integer(_) => Err(Unfit::Value),
        _ => Err(Unfit::Type),
    }
}

impl Form<bool> for Switch {
    fn parse(&self, text: &str) -> Result<bool, Unfit> {
        boolean(text).ok_or(Unfit::Value)
    }

    fn convert(&self, value: &Value) -> Result<bool, Unfit> {
        switch_of(value)
    }

    fn holds(&self, _: &bool) -> bool {
        true
    }

    fn print(&self, value: &bool) -> String {
        value.to_string()
    }

    fn value(&self, value: &bool) -> Value {
        Value::Switch(*value)
    }

    fn accepts(&self) -> String {
        "`true` or `false`".to_owned()
    }

    fn python(&self) -> String {
        "bool".to_owned()
    }
}

/// A type with a name for each of its values.
pub(crate) trait Choice: Copy + PartialEq + Sync + 'static {
    /// Every accepted value, with its name.
    const CHOICES: &'static [(&'static str, Self)];
    /// Meaning of each value, in the same order. Empty if the names say enough.
    const DOCS: &'static [&'static str] = &[];
}

/// The name of `value`. `None` if the value is not accepted.
fn name_of<T: Choice>(value: T) -> Option<&'static str> {
    T::CHOICES.iter().find(|(_, choice)| *choice == value).map(|(name, _)| *name)
}

/// Lists the names of the choices, each between two `quote`s.
fn names<T: Choice>(quote: &str) -> Vec<String> {
    T::CHOICES.iter().map(|(name, _)| format!("{quote}{name}{quote}")).collect()
}

/// Joins `names` to `a, b or c`.
fn one_of(names: &[String]) -> String {
    match names {
        [rest @ .., last] if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        names => names.join(""),
    }
}

/// One of the names of a [`Choice`].
pub(super) struct Name;

impl<T: Choice> Form<T> for Name {
    fn parse(&self, text: &str) -> Result<T, Unfit> {
        named(T::CHOICES, text).ok_or(Unfit::Value)
    }

    fn convert(&self, _: &Value) -> Result<T, Unfit> {
        Err(Unfit::Type)
    }

    fn holds(&self, value: &T) -> bool {
        name_of(*value).is_some()
    }

    fn print(&self, value: &T) -> String {
        name_of(*value).expect("the list names every variant").to_owned()
    }

    fn accepts(&self) -> String {
        one_of(&names::<T>("`"))
    }

    fn python(&self) -> String {
        format!("Literal[{}]", names::<T>("\"").join(", "))
    }

    fn meanings(&self) -> Vec<(&'static str, &'static str)> {
        T::CHOICES.iter().zip(T::DOCS).map(|((name, _), doc)| (*name, doc.trim())).collect()
    }
}

/// The order of an epoch: a name, or true or false.
pub(super) struct ShuffleKind;

impl Form<Shuffle> for ShuffleKind {
    fn parse(&self, text: &str) -> Result<Shuffle, Unfit> {
        let switch = || boolean(text).map(|on| if on { Shuffle::On } else { Shuffle::Off });
        named(Shuffle::CHOICES, text).or_else(switch).ok_or(Unfit::Value)
    }

    fn convert(&self, value: &Value) -> Result<Shuffle, Unfit> {
        switch_of(value).map(|on| if on { Shuffle::On } else { Shuffle::Off })
    }

    fn holds(&self, _: &Shuffle) -> bool {
        true
    }

    fn print(&self, value: &Shuffle) -> String {
        Name.print(value)
    }

    fn value(&self, value: &Shuffle) -> Value {
        match value {
            Shuffle::Off => Value::Switch(false),
            Shuffle::On => Value::Switch(true),
            other => Value::Text(self.print(other)),
        }
    }

    fn accepts(&self) -> String {
        one_of(&names::<Shuffle>("`"))
    }

    fn python(&self) -> String {
        "bool | Literal[\"global\", \"block\"]".to_owned()
    }
}

/// A type of ids in a file, by NumPy's name.
pub(super) struct StoredDtype;

impl StoredDtype {
    fn all() -> impl Iterator<Item = Dtype> {
        Dtype::ALL.into_iter().filter(|dtype| dtype.is_id())
    }
}

impl Form<Dtype> for StoredDtype {
    fn parse(&self, text: &str) -> Result<Dtype, Unfit> {
        checked(self, Self::all().find(|dtype| dtype.name() == text))
    }

    fn convert(&self, _: &Value) -> Result<Dtype, Unfit> {
        Err(Unfit::Type)
    }

    fn holds(&self, value: &Dtype) -> bool {
        value.is_id()
    }

    fn print(&self, value: &Dtype) -> String {
        value.name().to_owned()
    }

    fn accepts(&self) -> String {
        one_of(&Self::all().map(|dtype| format!("`{}`", dtype.name())).collect::<Vec<_>>())
    }

    fn python(&self) -> String {
        "npt.DTypeLike".to_owned()
    }
}

/// A type of delivered ids, by NumPy's name.
pub(super) struct IdDtype;

impl Choice for Dtype {
    const CHOICES: &'static [(&'static str, Self)] = &[("int64", Self::I64), ("int32", Self::I32)];
}

impl Form<Dtype> for IdDtype {
    fn parse(&self, text: &str) -> Result<Dtype, Unfit> {
        Name.parse(text)
    }

    fn convert(&self, _: &Value) -> Result<Dtype, Unfit> {
        Err(Unfit::Type)
    }

    fn holds(&self, value: &Dtype) -> bool {
        name_of(*value).is_some()
    }

    fn print(&self, value: &Dtype) -> String {
        value.name().to_owned()
    }

    fn accepts(&self) -> String {
        one_of(&names::<Dtype>("`"))
    }

    fn python(&self) -> String {
        "npt.DTypeLike".to_owned()
    }
}

/// A number of epochs, or epochs without end.
pub(super) struct EpochCount;

/// Most epochs of a pass with an end.
const MOST_EPOCHS: u64 = 1 << 32;

impl Form<Epochs> for EpochCount {
    fn parse(&self, text: &str) -> Result<Epochs, Unfit> {
        let is_endless = text.eq_ignore_ascii_case("endless");
        checked(self, if is_endless { Some(Epochs::Endless) } else { integer(text).map(Epochs::Count) })
    }

    fn convert(&self, value: &Value) -> Result<Epochs, Unfit> {
        checked(self, Some(Epochs::Count(whole(value)?)))
    }

    fn holds(&self, value: &Epochs) -> bool {
        match value {
            Epochs::Count(count) => (1..=MOST_EPOCHS).contains(count),
            Epochs::Endless => true,
        }
    }

    fn print(&self, value: &Epochs) -> String {
        match value {
            Epochs::Count(count) => count.to_string(),
            Epochs::Endless => "endless".to_owned(),
        }
    }

    fn value(&self, value: &Epochs) -> Value {
        match value {
            Epochs::Count(count) => (*count).into(),
            Epochs::Endless => "endless".into(),
        }
    }

    fn accepts(&self) -> String {
        format!("an integer from 1 to {}, or `endless`", limit_text(MOST_EPOCHS))
    }

    fn python(&self) -> String {
        "int | Literal[\"endless\"]".to_owned()
    }
}

/// Ranges of positions, or none.
pub(super) struct Skips;

/// Number of positions that a setting can name.
const MOST_POSITIONS: u64 = 1 << 62;

fn skip_of(value: &Value) -> Result<Skip, Unfit> {
    let Value::List(numbers) = value else { return Err(Unfit::Type) };
    match numbers.iter().map(whole).collect::<Result<Vec<u64>, _>>()?[..] {
        [start, end] => Ok(Skip { epoch: 0, start, end }),
        [epoch, start, end] => Ok(Skip { epoch, start, end }),
        _ => Err(Unfit::Type),
    }
}

impl Form<Vec<Skip>> for Skips {
    fn parse(&self, text: &str) -> Result<Vec<Skip>, Unfit> {
        checked(self, skips(text))
    }

    fn convert(&self, value: &Value) -> Result<Vec<Skip>, Unfit> {
        let Value::List(ranges) = value else { return Err(Unfit::Type) };
        checked(self, Some(ranges.iter().map(skip_of).collect::<Result<_, _>>()?))
    }

    fn holds(&self, value: &Vec<Skip>) -> bool {
        value.iter().all(|skip| skip.start < skip.end && skip.end <= MOST_POSITIONS)
    }

    fn print(&self, value: &Vec<Skip>) -> String {
        skips_text(value)
    }

    fn value(&self, value: &Vec<Skip>) -> Value {
        let range = |skip: &Skip| Value::List([skip.epoch, skip.start, skip.end].map(Value::from).to_vec());
        Value::List(value.iter().map(range).collect())
    }

    fn accepts(&self) -> String {
        "a list of `(start, end)` or `(epoch, start, end)`, as text `100-200,3:0-50` (epoch 0 and epoch 3), or `none`"
            .to_owned()
    }

    fn python(&self) -> String {
        "Skip".to_owned()
    }
}

/// CPUs, or none.
pub(super) struct Cpus;

impl Form<Vec<u64>> for Cpus {
    fn parse(&self, text: &str) -> Result<Vec<u64>, Unfit> {
        checked(self, cpus(text))
    }

    fn convert(&self, value: &Value) -> Result<Vec<u64>, Unfit> {
        let Value::List(cpus) = value else { return Err(Unfit::Type) };
        checked(self, cpu_set(cpus.iter().map(whole).collect::<Result<_, _>>()?))
    }

    fn holds(&self, value: &Vec<u64>) -> bool {
        !value.is_empty()
    }

    fn print(&self, value: &Vec<u64>) -> String {
        cpus_text(value)
    }

    fn value(&self, value: &Vec<u64>) -> Value {
        Value::List(value.iter().map(|cpu| Value::from(*cpu)).collect())
    }

    fn accepts(&self) -> String {
        "CPUs such as `0,2-5`".to_owned()
    }

    fn python(&self) -> String {
        "str | Iterable[int]".to_owned()
    }
}

/// Paths and patterns, in order.
pub(super) struct Paths;

impl Form<Vec<String>> for Paths {
    fn parse(&self, text: &str) -> Result<Vec<String>, Unfit> {
        list(text).ok_or(Unfit::Value)
    }

    fn convert(&self, value: &Value) -> Result<Vec<String>, Unfit> {
        let Value::List(paths) = value else { return Err(Unfit::Type) };
        let path = |path: &Value| match path {
            Value::Text(path) if path.is_empty() => Err(Unfit::Value),
            Value::Text(path) => Ok(path.clone()),
            _ => Err(Unfit::Type),
        };
        paths.iter().map(path).collect()
    }

    fn holds(&self, _: &Vec<String>) -> bool {
        true
    }

    fn print(&self, value: &Vec<String>) -> String {
        list_text(value)
    }

    fn value(&self, value: &Vec<String>) -> Value {
        Value::List(value.iter().map(Value::from).collect())
    }

    fn accepts(&self) -> String {
        "files, folders and glob patterns, separated by commas (`\\,` is a comma in a name)".to_owned()
    }

    fn python(&self) -> String {
        "Data".to_owned()
    }
}

/// Names of columns, or none.
pub(super) struct Columns;

/// Names that other arrays of a batch have.
const TAKEN_NAMES: [&str; 5] = ["input_ids", "x", "y", "source", "sample_index"];

impl Form<Vec<String>> for Columns {
    fn parse(&self, text: &str) -> Result<Vec<String>, Unfit> {
        checked(self, if is_none(text) { Some(Vec::new()) } else { list(text) })
    }

    fn convert(&self, value: &Value) -> Result<Vec<String>, Unfit> {
        checked(self, Some(Paths.convert(value)?))
    }

    fn holds(&self, names: &Vec<String>) -> bool {
        let is_new =
            |(index, name): (usize, &String)| !TAKEN_NAMES.contains(&name.as_str()) && !names[..index].contains(name);
        names.len() <= MAX_FIELDS && names.iter().enumerate().all(is_new)
    }

    fn print(&self, names: &Vec<String>) -> String {
        if names.is_empty() { "none".to_owned() } else { list_text(names) }
    }

    fn value(&self, names: &Vec<String>) -> Value {
        Value::List(names.iter().map(Value::from).collect())
    }

    fn accepts(&self) -> String {
        format!("up to {MAX_FIELDS} columns, each once and none called `{}`, or `none`", TAKEN_NAMES.join("`, `"))
    }

    fn python(&self) -> String {
        "Iterable[str]".to_owned()
    }
}

/// Addresses of services, or none.
pub(super) struct Addresses;

/// Beginnings of addresses.
const SCHEMES: [&str; 3] = ["unix:", "grpc://", "grpc+tls://"];

impl Form<Vec<String>> for Addresses {
    fn parse(&self, text: &str) -> Result<Vec<String>, Unfit> {
        checked(self, if is_none(text) { Some(Vec::new()) } else { list(text) })
    }

    fn convert(&self, value: &Value) -> Result<Vec<String>, Unfit> {
        checked(self, Some(Paths.convert(value)?))
    }

    fn holds(&self, addresses: &Vec<String>) -> bool {
        let is_address = |address: &String| {
            SCHEMES.iter().any(|scheme| address.strip_prefix(scheme).is_some_and(|place| !place.is_empty()))
        };
        addresses.iter().all(is_address)
    }

    fn print(&self, addresses: &Vec<String>) -> String {
        if addresses.is_empty() { "none".to_owned() } else { list_text(addresses) }
    }

    fn value(&self, addresses: &Vec<String>) -> Value {
        Value::List(addresses.iter().map(Value::from).collect())
    }

    fn accepts(&self) -> String {
        "addresses such as `unix:PATH`, `grpc://HOST:PORT` and `grpc+tls://HOST:PORT`, or `none`".to_owned()
    }

    fn python(&self) -> String {
        "str | Iterable[str]".to_owned()
    }
}

/// A text of any kind.
pub(super) struct Text {
    accepts: &'static str,
    python: &'static str,
}

pub(super) const fn column() -> Text {
    Text { accepts: "a column's name", python: "str" }
}

pub(super) const fn text(accepts: &'static str) -> Text {
    Text { accepts, python: "str" }
}

pub(super) const fn folder() -> Text {
    Text { accepts: "a folder", python: "str | os.PathLike[str]" }
}

impl Form<String> for Text {
    fn parse(&self, text: &str) -> Result<String, Unfit> {
        Ok(text.to_owned())
    }

    fn convert(&self, _: &Value) -> Result<String, Unfit> {
        Err(Unfit::Type)
    }

    fn holds(&self, _: &String) -> bool {
        true
    }

    fn print(&self, value: &String) -> String {
        value.clone()
    }

    fn accepts(&self) -> String {
        self.accepts.to_owned()
    }

    fn python(&self) -> String {
        self.python.to_owned()
    }
}

/// A mixture. It keeps the JSON text that the user wrote.
pub(super) struct MixtureText;

impl Form<String> for MixtureText {
    fn parse(&self, text: &str) -> Result<String, Unfit> {
        MixtureSettings::parse(text).map_err(Unfit::Part)?;
        Ok(text.to_owned())
    }

    fn convert(&self, value: &Value) -> Result<String, Unfit> {
        if let Some(stranger) = value.stranger() {
            return Err(Unfit::Part(Error::config(format!("`mixture` cannot hold a value of type {stranger}"))));
        }
        match value {
            Value::Map(_) => self.parse(&value.to_json().ok_or(Unfit::Value)?.to_string()),
            _ => Err(Unfit::Type),
        }
    }

    fn holds(&self, _: &String) -> bool {
        true
    }

    fn print(&self, value: &String) -> String {
        value.clone()
    }

    fn accepts(&self) -> String {
        "sources, weights and stages as JSON".to_owned()
    }

    fn python(&self) -> String {
        "Mapping[str, Any] | str".to_owned()
    }
}

/// A value that may be missing.
pub(super) struct Optional<F>(pub(super) F);

impl<T, F: Form<T>> Form<Option<T>> for Optional<F> {
    fn parse(&self, text: &str) -> Result<Option<T>, Unfit> {
        if is_none(text) { Ok(None) } else { self.0.parse(text).map(Some) }
    }

    fn convert(&self, value: &Value) -> Result<Option<T>, Unfit> {
        // An empty list means the same.
        if *value == Value::List(Vec::new()) { Ok(None) } else { self.0.convert(value).map(Some) }
    }

    fn holds(&self, value: &Option<T>) -> bool {
        value.as_ref().is_none_or(|value| self.0.holds(value))
    }

    fn print(&self, value: &Option<T>) -> String {
        value.as_ref().map_or_else(|| "none".to_owned(), |value| self.0.print(value))
    }

    fn value(&self, value: &Option<T>) -> Value {
        value.as_ref().map_or(Value::None, |value| self.0.value(value))
    }

    fn accepts(&self) -> String {
        format!("{}, or `none`", self.0.accepts())
    }

    fn python(&self) -> String {
        self.0.python()
    }
}
