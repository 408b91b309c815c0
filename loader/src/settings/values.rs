//! Values of settings: a typed value of any source, and the text forms of single values.
//!
//! Environment variables and the command line give text. Python, the configuration file and the
//! defaults give typed values. Text is accepted everywhere; the forms of a setting
//! ([`super::forms`]) turn both into the setting's Rust type.

use super::config::Skip;

/// A value of a setting, before its setting is known to accept it.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// No value.
    None,
    /// True or false.
    Switch(bool),
    /// A whole number.
    Integer(i128),
    /// Any other number.
    Float(f64),
    /// Text, which the setting parses.
    Text(String),
    /// Several values.
    List(Vec<Self>),
    /// Values by name, in order.
    Map(Vec<(String, Self)>),
    /// An object that no setting accepts. The text is the name of its type.
    Other(String),
}

impl Value {
    /// Name of the value's type, for errors.
    pub fn type_name(&self) -> &str {
        match self {
            Self::None => "none",
            Self::Switch(_) => "bool",
            Self::Integer(_) => "int",
            Self::Float(_) => "float",
            Self::Text(_) => "str",
            Self::List(_) => "list",
            Self::Map(_) => "dict",
            Self::Other(name) => name,
        }
    }

    /// The value as an error shows it: a short value in full, any other value by its type.
    pub(crate) fn shown(&self) -> String {
        match self {
            Self::Switch(on) => format!("`{on}`"),
            Self::Integer(number) => format!("`{number}`"),
            Self::Float(number) => format!("`{number}`"),
            Self::Text(text) => format!("`{text}`"),
            _ => format!("a value of type {}", self.type_name()),
        }
    }

    /// The value as JSON. `None` if it contains an object without a form in JSON.
    pub fn to_json(&self) -> Option<serde_json::Value> {
        Some(match self {
            Self::None => serde_json::Value::Null,
            Self::Switch(on) => (*on).into(),
            Self::Integer(number) => match u64::try_from(*number) {
                Ok(number) => number.into(),
                Err(_) => i64::try_from(*number).ok()?.into(),
            },
            Self::Float(number) => serde_json::Number::from_f64(*number)?.into(),
            Self::Text(text) => text.as_str().into(),
            Self::List(values) => values.iter().map(Self::to_json).collect::<Option<Vec<_>>>()?.into(),
            Self::Map(entries) => {
                let entry = |(key, value): &(String, Self)| Some((key.clone(), value.to_json()?));
                entries.iter().map(entry).collect::<Option<serde_json::Map<_, _>>>()?.into()
            }
            Self::Other(_) => return None,
        })
    }

    /// The name of the type of the innermost object that no setting accepts.
    pub(crate) fn stranger(&self) -> Option<&str> {
        match self {
            Self::Other(name) => Some(name),
            Self::List(values) => values.iter().find_map(Self::stranger),
            Self::Map(entries) => entries.iter().find_map(|(_, value)| value.stranger()),
            _ => None,
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&Value> for Value {
    fn from(value: &Value) -> Self {
        value.clone()
    }
}

impl From<&String> for Value {
    fn from(text: &String) -> Self {
        Self::Text(text.clone())
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Integer(number.into())
    }
}

/// Finds `text` in a list of names, whatever its case.
pub(super) fn named<T: Copy>(names: &[(&str, T)], text: &str) -> Option<T> {
    names.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)).map(|(_, value)| *value)
}

/// Whether `text` means that a setting has no value.
pub(super) fn is_none(text: &str) -> bool {
    text.is_empty() || text.eq_ignore_ascii_case("none")
}

/// Parses `1`, `true`, `on`, `yes` and their opposites.
pub(crate) fn boolean(text: &str) -> Option<bool> {
    const WORDS: &[(&str, bool)] = &[
        ("1", true),
        ("true", true),
        ("on", true),
        ("yes", true),
        ("0", false),
        ("false", false),
        ("off", false),
        ("no", false),
    ];
    named(WORDS, text)
}

/// Parses decimal digits, with single underscores between them.
pub(crate) fn integer(text: &str) -> Option<u64> {
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !text.split('_').all(digits) {
        return None;
    }
    text.replace('_', "").parse().ok()
}

/// Parses an integer with a decimal (`k`, `M`, `G`, `T`) or binary (`Ki`, `Mi`, `Gi`, `Ti`) unit.
/// With `bytes`, a `B` may follow the unit.
pub fn size(text: &str, bytes: bool) -> Option<u64> {
    let unit_at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let unit = unit.to_ascii_lowercase();
    let unit = if bytes { unit.strip_suffix('b').unwrap_or(&unit) } else { &unit };
    let factor = match unit {
        "" => 1,
        "k" => 1_000,
        "m" => 1_000_000,
        "g" => 1_000_000_000,
        "t" => 1_000_000_000_000,
        "ki" => 1 << 10,
        "mi" => 1 << 20,
        "gi" => 1 << 30,
        "ti" => 1 << 40,
        _ => return None,
    };
    integer(number.trim_end())?.checked_mul(factor)
}

/// Prints `value` with the largest binary unit that divides it, followed by `suffix`.
pub(super) fn size_text(value: u64, suffix: &str) -> String {
    for (shift, unit) in [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")] {
        if value > 0 && value.is_multiple_of(1 << shift) {
            return format!("{}{unit}{suffix}", value >> shift);
        }
    }
    value.to_string()
}

/// Parses names separated by commas. A backslash before a comma or a backslash removes its special
/// meaning.
pub(super) fn list(text: &str) -> Option<Vec<String>> {
    let mut names = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            ',' => names.push(String::new()),
            '\\' if matches!(characters.peek(), Some(',' | '\\')) => names.last_mut()?.extend(characters.next()),
            other => names.last_mut()?.push(other),
        }
    }
    names.iter().all(|name| !name.is_empty()).then_some(names)
}

/// Prints `names` as a text that the setting `data` reads back.
pub fn list_text<T: AsRef<str>>(names: &[T]) -> String {
    let escaped: Vec<_> = names.iter().map(|name| name.as_ref().replace('\\', "\\\\").replace(',', "\\,")).collect();
    escaped.join(",")
}

/// Largest CPU number that is accepted, plus one. No system has more.
pub(crate) const MOST_CPUS: u64 = 1 << 13;

/// Sorts `cpus` and drops repetitions. `None` if a number is too large.
pub(super) fn cpu_set(mut cpus: Vec<u64>) -> Option<Vec<u64>> {
    cpus.sort_unstable();
    cpus.dedup();
    cpus.last().is_none_or(|last| *last < MOST_CPUS).then_some(cpus)
}

/// Parses CPUs by number and range, such as `0,2-5`.
pub(super) fn cpus(text: &str) -> Option<Vec<u64>> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (integer(first.trim())?, integer(last.trim())?);
        if first > last || last >= MOST_CPUS {
            return None;
        }
        cpus.extend(first..=last);
    }
    cpu_set(cpus)
}

/// Prints sorted `cpus` as a text that [`cpus`] parses.
pub(crate) fn cpus_text(cpus: &[u64]) -> String {
    let runs = cpus.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [one] => one.to_string(),
        many => format!("{}-{}", many[0], many[many.len() - 1]),
    });
    runs.collect::<Vec<_>>().join(",")
}

/// Parses ranges `start-end`. A range belongs to epoch 0, or to the epoch before its colon.
pub(super) fn skips(text: &str) -> Option<Vec<Skip>> {
    if is_none(text) {
        return Some(Vec::new());
    }
    text.split(',')
        .map(|part| {
            let (epoch, range) = part.trim().split_once(':').unwrap_or(("0", part.trim()));
            let (start, end) = range.split_once('-')?;
            Some(Skip { epoch: integer(epoch)?, start: integer(start)?, end: integer(end)? })
        })
        .collect()
}

/// Prints `skips` as a text that [`skips`] parses.
pub(crate) fn skips_text(skips: &[Skip]) -> String {
    let range = |Skip { epoch, start, end }: &Skip| {
        if *epoch == 0 { format!("{start}-{end}") } else { format!("{epoch}:{start}-{end}") }
    };
    let ranges: Vec<String> = skips.iter().map(range).collect();
    if ranges.is_empty() { "none".to_owned() } else { ranges.join(",") }
}

/// Prints a large limit as a power of two.
pub(super) fn limit_text(limit: u64) -> String {
    const LARGE: u64 = 1 << 20;
    match limit {
        u64::MAX => "2^64 - 1".to_owned(),
        limit if limit >= LARGE && limit.is_power_of_two() => format!("2^{}", limit.trailing_zeros()),
        limit => limit.to_string(),
    }
}
