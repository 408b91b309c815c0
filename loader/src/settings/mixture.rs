//! MixtureSettings: a mixture of sources as its user writes it, in JSON.
//!
//! ```json
//! {"sources": [{"name": "web", "data": ["web/"], "weight": 0.7}, {"name": "code", "data": ["code/"], "weight": 0.3, "epochs": 4}],
//!  "stages": [{"at_tokens": 1000000000, "ramp_tokens": 100000000, "weights": {"web": 0.5, "code": 0.5}}],
//!  "exhausted": "drop"}
//! ```
//!
//! Weights are shares of the tokens, which are shares of the sequences, since all have one length. They are taken as the decimal fractions that
//! they are written as, never as binary ones, so that the schedule is exact.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::settings::suggest::nearest_of;

/// Largest sum of the weights of one stage.
pub const MAX_CYCLE: u64 = 100_000_000;

/// Digits after the point that a weight may have.
const DIGITS: usize = 9;

/// What happens when a source has had its epochs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Exhausted {
    /// The epoch of the mixture ends with the first source that has, on each lane.
    #[default]
    Stop,
    /// The others go on by their weights, until all have.
    Drop,
}

/// Weights from a position on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// First position; rounded up to a whole number of places in every lane.
    pub start: u64,
    /// Positions over which the weights move there from those of the stage before.
    pub ramp: u64,
    /// One per source.
    pub weights: Vec<u64>,
}

/// A mixture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MixtureSettings {
    /// The sources, in order; new ones are appended.
    pub sources: Vec<Source>,
    /// What happens when a source has had its epochs.
    pub exhausted: Exhausted,
    /// Sequences of the global batches that have exact counts of each source, where that is asked for.
    pub exact_per: Option<u64>,
    stages: Vec<Written>,
}

/// One corpus of a mixture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its name, in stages and statistics.
    pub name: String,
    /// Files, folders and glob patterns.
    pub data: Vec<String>,
    /// Epochs that it gives at most; none if it is repeated as often as its weight asks for.
    pub epochs: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Written {
    start: Length,
    ramp: Length,
    weights: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    Tokens(u64),
    Sequences(u64),
}

impl Length {
    fn sequences(self, seq_len: u64) -> u64 {
        match self {
            Self::Tokens(tokens) => tokens.div_ceil(seq_len),
            Self::Sequences(sequences) => sequences,
        }
    }
}

impl MixtureSettings {
    /// Reads a recipe; an error names the place in it.
    pub fn parse(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| Error::config(format!("`mixture` is not valid JSON: {error}")))?;
        let table = Table::new("", &value, &["sources", "stages", "exhausted", "exact_per"])?;
        let exact_per = match table.get("exact_per") {
            None | Some(Value::Null) => None,
            Some(value) => {
                let count = value.as_u64().filter(|count| (1..=MAX_CYCLE).contains(count));
                Some(count.ok_or_else(|| table.fault("exact_per", "the sequences of a global batch, from 1"))?)
            }
        };
        let exhausted = match table.get("exhausted") {
            None => "stop",
            Some(value) => value.as_str().unwrap_or_default(),
        };
        let (exhausted, repeats) = match exhausted {
            "stop" => (Exhausted::Stop, false),
            "repeat" => (Exhausted::Stop, true),
            "drop" => (Exhausted::Drop, false),
            _ => return Err(table.fault("exhausted", "`stop`, `repeat` or `drop`")),
        };
        let mut sources = Vec::new();
        let mut weights = Vec::new();
        let list = table.get("sources").and_then(Value::as_array).filter(|list| !list.is_empty());
        for (index, value) in list.ok_or_else(|| table.fault("sources", "a list of sources"))?.iter().enumerate() {
            let table = Table::new(&format!("sources[{index}]"), value, &["name", "data", "weight", "epochs"])?;
            let name = table.get("name").and_then(Value::as_str).filter(|name| !name.is_empty());
            let name = name.ok_or_else(|| table.fault("name", "a name"))?.to_owned();
            if sources.iter().any(|source: &Source| source.name == name) {
                return Err(table.fault("name", "a name of its own"));
            }
            let data = match table.get("data") {
                Some(Value::String(path)) => Some(vec![path.clone()]),
                Some(Value::Array(paths)) => paths.iter().map(|path| path.as_str().map(str::to_owned)).collect(),
                _ => None,
            };
            let data = data
                .filter(|data| !data.is_empty())
                .ok_or_else(|| table.fault("data", "a path, or a list of paths"))?;
            let epochs = match table.get("epochs") {
                None if repeats => None,
                None => Some(1),
                Some(Value::Null) => None,
                Some(value) => {
                    let count = value.as_u64().filter(|count| (1..1 << 32).contains(count));
                    Some(
                        count
                            .ok_or_else(|| table.fault("epochs", "a number of epochs from 1, or null for no limit"))?,
                    )
                }
            };
            weights.push(match table.get("weight") {
                None => return Err(table.fault("weight", "given; 0 for a source that only a later stage draws from")),
                Some(value) => decimal(value).ok_or_else(|| table.fault("weight", "a number from 0"))?,
            });
            sources.push(Source { name, data, epochs });
        }
        let mut stages = vec![Written {
            start: Length::Sequences(0),
            ramp: Length::Sequences(0),
            weights: whole(&weights, "`mixture`: the weights of the sources")?,
        }];
        let empty = Vec::new();
        let written = match table.get("stages") {
            None => &empty,
            Some(value) => value.as_array().ok_or_else(|| table.fault("stages", "a list of stages"))?,
        };
        for (index, value) in written.iter().enumerate() {
            stages.push(stage(&format!("stages[{index}]"), value, &sources)?);
        }
        let recipe = Self { sources, exhausted, exact_per, stages };
        recipe.check_exact()?;
        Ok(recipe)
    }

    /// Fails where a source has a weight, and no place in an exact global batch.
    fn check_exact(&self) -> Result<()> {
        let Some(count) = self.exact_per else { return Ok(()) };
        for (index, stage) in self.stages.iter().enumerate() {
            let places = apportioned(&stage.weights, count);
            if let Some(none) = (0..places.len()).find(|source| stage.weights[*source] > 0 && places[*source] == 0) {
                let stage = if index == 0 { String::new() } else { format!(" in stages[{}]", index - 1) };
                return Err(Error::config(format!(
                    "`mixture`: the weight of `{}`{stage} is less than one of the {count} sequences of `exact_per`: raise it, or leave `exact_per` out",
                    self.sources[none].name
                )));
            }
        }
        Ok(())
    }

    /// The stages for sequences of `seq_len` tokens, in order; fails where they overlap.
    pub fn stages(&self, seq_len: u64) -> Result<Vec<Stage>> {
        let mut stages: Vec<Stage> = Vec::with_capacity(self.stages.len());
        for (index, written) in self.stages.iter().enumerate() {
            let (start, ramp) = (written.start.sequences(seq_len), written.ramp.sequences(seq_len));
            let begun = stages.last().map_or(0, |last| last.start + last.ramp);
            if start < begun {
                return Err(Error::config(format!(
                    "`mixture`: stages[{}] begins at sequence {start}, before the one before it is complete at {begun}: stages are in order and do not \
                     overlap",
                    index - 1
                )));
            }
            stages.push(Stage { start, ramp, weights: written.weights.clone() });
        }
        Ok(stages)
    }
}

fn stage(place: &str, value: &Value, sources: &[Source]) -> Result<Written> {
    let keys = ["at_tokens", "at_sequences", "at_step", "global_batch", "ramp_tokens", "ramp_sequences", "weights"];
    let table = Table::new(place, value, &keys)?;
    let number = |key: &str| match table.get(key) {
        None => Ok(None),
        Some(value) => {
            let number = value.as_u64().filter(|number| *number < 1 << 60);
            number.map(Some).ok_or_else(|| table.fault(key, "a whole number from 0"))
        }
    };
    let start = match (number("at_tokens")?, number("at_sequences")?, number("at_step")?, number("global_batch")?) {
        (Some(tokens), None, None, None) => Length::Tokens(tokens),
        (None, Some(sequences), None, None) => Length::Sequences(sequences),
        // A step alone means another place for every batch size.
        (None, None, Some(step), Some(global_batch)) => Length::Sequences(step.saturating_mul(global_batch)),
        _ => {
            return Err(
                table.fault("at_tokens", "given, or `at_sequences`, or `at_step` with its `global_batch` of sequences")
            );
        }
    };
    let ramp = match (number("ramp_tokens")?, number("ramp_sequences")?) {
        (None, sequences) => Length::Sequences(sequences.unwrap_or(0)),
        (Some(tokens), None) => Length::Tokens(tokens),
        (Some(_), Some(_)) => return Err(table.fault("ramp_tokens", "the only length of the ramp")),
    };
    let names: Vec<&str> = sources.iter().map(|source| source.name.as_str()).collect();
    let given = table
        .get("weights")
        .ok_or_else(|| table.fault("weights", "given: a weight for each source that is drawn from"))?;
    let weights = Table::new(&format!("{place}.weights"), given, &names)?;
    let mut decimals = Vec::with_capacity(names.len());
    for name in &names {
        let weight = weights.get(name).map_or(Some("0".to_owned()), decimal);
        decimals.push(weight.ok_or_else(|| weights.fault(name, "a number from 0"))?);
    }
    Ok(Written { start, ramp, weights: whole(&decimals, &format!("`mixture`: the weights of {place}"))? })
}

/// An object and its place in the recipe.
struct Table<'a> {
    place: String,
    map: &'a Map<String, Value>,
}

impl<'a> Table<'a> {
    fn new(place: &str, value: &'a Value, keys: &[&str]) -> Result<Self> {
        let shown = if place.is_empty() { "the whole".to_owned() } else { format!("`{place}`") };
        let map = value
            .as_object()
            .ok_or_else(|| Error::config(format!("`mixture`: {shown} must be an object, found {value}")))?;
        for key in map.keys() {
            if !keys.contains(&key.as_str()) {
                let nearest = nearest_of(key, keys.iter().copied());
                let hint = nearest
                    .map_or_else(|| format!("expected {}", keys.join(", ")), |name| format!("did you mean `{name}`?"));
                return Err(Error::config(format!("`mixture`: key `{key}` of {shown} is unknown: {hint}")));
            }
        }
        Ok(Self { place: if place.is_empty() { String::new() } else { format!("{place}.") }, map })
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key)
    }

    fn fault(&self, key: &str, accepts: &str) -> Error {
        let found = self.get(key).map_or_else(|| "nothing".to_owned(), Value::to_string);
        Error::config(format!("`mixture`: `{}{key}` must be {accepts}, found {found}", self.place))
    }
}

/// A number that is not negative, in digits.
fn decimal(value: &Value) -> Option<String> {
    let number = value.as_f64().filter(|number| number.is_finite() && *number >= 0.0)?;
    Some(value.as_u64().map_or_else(|| format!("{number}"), |whole| whole.to_string()))
}

/// `decimals` as whole numbers in the same proportion.
fn whole(decimals: &[String], what: &str) -> Result<Vec<u64>> {
    let digits =
        decimals.iter().map(|text| text.split_once('.').map_or(0, |(_, fraction)| fraction.len())).max().unwrap_or(0);
    let scaled = |text: &String| {
        let (number, fraction) = text.split_once('.').unwrap_or((text, ""));
        format!("{number}{fraction}{}", "0".repeat(digits - fraction.len())).parse::<u64>().ok()
    };
    let weights: Option<Vec<u64>> = if digits > DIGITS { None } else { decimals.iter().map(scaled).collect() };
    let sum =
        weights.as_ref().and_then(|weights| weights.iter().try_fold(0u64, |sum, weight| sum.checked_add(*weight)));
    let (Some(weights), Some(sum)) = (weights, sum) else {
        return Err(Error::config(format!(
            "{what} need more than {DIGITS} digits after the point, or are too large: round them"
        )));
    };
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    match sum / divisor {
        0 => Err(Error::config(format!("{what} are all 0: at least one must be more"))),
        cycle if cycle > MAX_CYCLE => Err(Error::config(format!(
            "{what} come to a cycle of {cycle} sequences, more than {MAX_CYCLE}: round them to fewer digits"
        ))),
        _ => Ok(weights.into_iter().map(|weight| weight / divisor).collect()),
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// `weights` scaled to the sum `cycle`; what rounding leaves goes to the largest remainders, of equal ones to the first.
pub fn apportioned(weights: &[u64], cycle: u64) -> Vec<u64> {
    let total: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
    if total == 0 {
        return weights.to_vec();
    }
    let scaled = |weight: u64| u128::from(weight) * u128::from(cycle);
    let mut counts: Vec<u64> = weights.iter().map(|weight| (scaled(*weight) / total) as u64).collect();
    let left = (cycle - counts.iter().sum::<u64>()) as usize;
    let mut by_remainder: Vec<usize> = (0..weights.len()).collect();
    by_remainder.sort_by_key(|index| (std::cmp::Reverse(scaled(weights[*index]) % total), *index));
    for index in by_remainder.into_iter().take(left) {
        counts[index] += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_exact_decimals() {
        let recipe = MixtureSettings::parse(
            r#"{"sources": [{"name": "a", "data": "a/", "weight": 0.7}, {"name": "b", "data": ["b", "c"], "weight": 0.1, "epochs": 3},
                {"name": "c", "data": "c", "weight": 0.2, "epochs": null}],
                "stages": [{"at_tokens": 1000, "ramp_sequences": 5, "weights": {"c": 4, "b": 6}},
                           {"at_step": 10, "global_batch": 50, "weights": {"a": 1}}]}"#,
        )
        .unwrap();
        let stages = recipe.stages(3).unwrap();
        let weights: Vec<_> = stages.iter().map(|stage| (stage.start, stage.ramp, stage.weights.clone())).collect();
        assert_eq!(weights, [(0, 0, vec![7, 1, 2]), (334, 5, vec![0, 3, 2]), (500, 0, vec![1, 0, 0])]);
        assert_eq!(recipe.sources.iter().map(|source| source.epochs).collect::<Vec<_>>(), [Some(1), Some(3), None]);
        let error = recipe.stages(2).unwrap_err().to_string();
        assert!(
            error.contains("stages[1] begins at sequence 500, before the one before it is complete at 505"),
            "{error}"
        );
    }

    #[test]
    fn faults_name_their_place() {
        let source = r#"{"name": "a", "data": "a", "weight": 1}"#;
        for (text, words) in [
            ("{", "not valid JSON"),
            ("[]", "the whole must be an object"),
            ("{}", "`sources` must be a list of sources, found nothing"),
            (r#"{"sources": [{"name": "a", "data": 3, "weight": 1}]}"#, "`sources[0].data` must be a path"),
            (r#"{"sources": [{"name": "a", "data": "a", "wieght": 1}]}"#, "did you mean `weight`?"),
            (
                r#"{"sources": [{"name": "a", "data": "a", "weight": -1}]}"#,
                "`sources[0].weight` must be a number from 0, found -1",
            ),
            (r#"{"sources": [{"name": "a", "data": "a"}]}"#, "`sources[0].weight` must be given"),
            (r#"{"sources": [{"name": "a", "data": "a", "weight": 0}]}"#, "are all 0"),
            (r#"{"sources": [{"name": "a", "data": "a", "weight": 1, "epochs": 0}]}"#, "`sources[0].epochs`"),
            (&format!(r#"{{"sources": [{source}, {source}]}}"#), "a name of its own"),
            (&format!(r#"{{"sources": [{source}], "exhausted": "wrap"}}"#), "`exhausted` must be"),
            (&format!(r#"{{"sources": [{source}], "exact_per": 0}}"#), "`exact_per` must be"),
            (
                r#"{"sources": [{"name": "a", "data": "a", "weight": 999}, {"name": "b", "data": "b", "weight": 1}], "exact_per": 8}"#,
                "the weight of `b` is less than one of the 8 sequences",
            ),
            (
                &format!(r#"{{"sources": [{source}], "stages": [{{"at_step": 3, "weights": {{"a": 1}}}}]}}"#),
                "with its `global_batch`",
            ),
            (
                &format!(r#"{{"sources": [{source}], "stages": [{{"at_tokens": 3, "weights": {{"b": 1}}}}]}}"#),
                "key `b`",
            ),
            (
                r#"{"sources": [{"name": "a", "data": "a", "weight": 0.123456789}, {"name": "b", "data": "b", "weight": 1}]}"#,
                "round them to fewer digits",
            ),
        ] {
            let error = MixtureSettings::parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
