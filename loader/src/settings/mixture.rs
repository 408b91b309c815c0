//! Reads a mixture of sources as a user writes it, in JSON.
//!
//! ```json
//! {"sources": [{"name": "web", "data": ["web/"], "weight": 0.7},
//!              {"name": "code", "data": ["code/"], "weight": 0.3, "epochs": 4}],
//!  "stages": [{"at_tokens": 1000000000, "ramp_tokens": 100000000,
//!              "weights": {"web": "1/3", "code": "2/3"}}],
//!  "exhausted": "drop"}
//! ```
//!
//! Weights are shares of the tokens. All sequences have one length, so weights are also shares of
//! the sequences. A weight is a decimal number or a fraction. It is taken exactly as written, never
//! as a binary fraction. Weights whose cycle would be too long are rounded to simple fractions, and
//! a note reports that.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::settings::suggest::nearest_of;

/// Largest sum of the weights of one stage.
pub const MAX_CYCLE: u64 = 100_000_000;

/// Number of digits that a rounded weight keeps. Rounding changes it by at most half of 10^-8 of
/// itself.
const KEPT_DIGITS: u32 = 8;

/// The rule for a source that has given all its epochs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Exhausted {
    /// The epoch of the mixture ends with the first such source, on each lane.
    #[default]
    Stop,
    /// The other sources go on by their weights, until all have given their epochs.
    Drop,
}

/// The weights from a position on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// First position. It is rounded up to a whole number of places in every lane.
    pub start: u64,
    /// Number of positions in which the weights change from the previous stage to this stage.
    pub ramp: u64,
    /// One weight per source.
    pub weights: Vec<u64>,
}

/// A mixture of sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MixtureSettings {
    /// The sources, in order. New sources are appended.
    pub sources: Vec<Source>,
    /// The rule for a source that has given all its epochs.
    pub exhausted: Exhausted,
    /// Number of sequences in a global batch with exact counts of each source. `None` if counts
    /// need not be exact.
    pub exact_per: Option<u64>,
    /// The rounded weights, one line for each list of weights.
    pub notes: Vec<String>,
    stages: Vec<Written>,
}

/// One corpus of a mixture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Name of the source in stages and statistics.
    pub name: String,
    /// Files, folders and glob patterns.
    pub data: Vec<String>,
    /// Most epochs that the source gives. `None` if it is repeated as its weight demands.
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
    /// Reads the settings of a mixture. An error names its place in them.
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
        let mut notes = Vec::new();
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
                Some(value) => Weight::parse(value).ok_or_else(|| table.fault("weight", WEIGHT))?,
            });
            sources.push(Source { name, data, epochs });
        }
        let mut stages = vec![Written {
            start: Length::Sequences(0),
            ramp: Length::Sequences(0),
            weights: whole(&weights, "`mixture`: the weights of the sources", &mut notes)?,
        }];
        let empty = Vec::new();
        let written = match table.get("stages") {
            None => &empty,
            Some(value) => value.as_array().ok_or_else(|| table.fault("stages", "a list of stages"))?,
        };
        for (index, value) in written.iter().enumerate() {
            stages.push(stage(&format!("stages[{index}]"), value, &sources, &mut notes)?);
        }
        let mixture = Self { sources, exhausted, exact_per, notes, stages };
        mixture.check_exact()?;
        Ok(mixture)
    }

    /// Fails if a source has a weight but no place in an exact global batch.
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

    /// The stages for sequences of `seq_len` tokens, in order. Fails if they overlap.
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

fn stage(place: &str, value: &Value, sources: &[Source], notes: &mut Vec<String>) -> Result<Written> {
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
        // A step alone would mean another position for every batch size.
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
    let mut list = Vec::with_capacity(names.len());
    for name in &names {
        let weight = weights.get(name).map_or(Some(Weight::NONE), Weight::parse);
        list.push(weight.ok_or_else(|| weights.fault(name, WEIGHT))?);
    }
    Ok(Written { start, ramp, weights: whole(&list, &format!("`mixture`: the weights of {place}"), notes)? })
}

/// An object, and its place in the settings.
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

/// The accepted weights, in words.
const WEIGHT: &str = "a number from 0, or a fraction such as \"1/3\"";

/// A weight as the user wrote it: a fraction of whole numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Weight {
    numerator: u128,
    denominator: u128,
}

impl Weight {
    const NONE: Self = Self { numerator: 0, denominator: 1 };

    fn parse(value: &Value) -> Option<Self> {
        match value {
            Value::String(text) => match text.split_once('/') {
                Some((numerator, denominator)) => {
                    let [numerator, denominator] = [numerator, denominator].map(|part| part.trim().parse::<u64>().ok());
                    let denominator = denominator.filter(|denominator| *denominator > 0)?;
                    Some(Self { numerator: numerator?.into(), denominator: denominator.into() }.reduced())
                }
                None => Self::decimal(text.trim()),
            },
            _ => {
                let number = value.as_f64().filter(|number| number.is_finite() && *number >= 0.0)?;
                // The shortest text of this number is the text that the user wrote.
                let text = value.as_u64().map_or_else(|| format!("{number}"), |whole| whole.to_string());
                Self::decimal(&text)
            }
        }
    }

    /// Reads digits with a point between or before them. Leaves out digits that exceed 128 bits.
    fn decimal(text: &str) -> Option<Self> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() && fraction.is_empty() || !digits(whole) || !digits(fraction) {
            return None;
        }
        let fraction = &fraction[..fraction.len().min(27)];
        let numerator = format!("0{whole}{fraction}").parse::<u128>().ok().filter(|number| *number < 1 << 120)?;
        Some(Self { numerator, denominator: 10_u128.pow(fraction.len() as u32) }.reduced())
    }

    fn reduced(self) -> Self {
        let divisor = gcd(self.numerator, self.denominator).max(1);
        Self { numerator: self.numerator / divisor, denominator: self.denominator / divisor }
    }

    /// The simplest fraction that equals this weight when both are rounded to [`KEPT_DIGITS`]
    /// digits.
    fn simplest(self) -> Self {
        let Self { numerator, denominator } = self;
        let unit = 2 * 10_u128.pow(KEPT_DIGITS);
        // |n / d - numerator / denominator| <= (numerator / denominator) / unit, without division.
        let is_near = |n: u128, d: u128| {
            let (a, b) = (n.checked_mul(denominator), numerator.checked_mul(d));
            a.zip(b).is_some_and(|(a, b)| a.abs_diff(b).checked_mul(unit).is_some_and(|error| error <= b))
        };
        // Each convergent of the continued fraction is the nearest fraction of its size.
        let (mut before, mut now) = ((0, 1), (1, 0));
        let (mut a, mut b) = (numerator, denominator);
        while b > 0 {
            let quotient = a / b;
            let next = (quotient * now.0 + before.0, quotient * now.1 + before.1);
            (before, now) = (now, next);
            if is_near(now.0, now.1) {
                break;
            }
            (a, b) = (b, a % b);
        }
        Self { numerator: now.0, denominator: now.1 }
    }
}

impl std::fmt::Display for Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.denominator {
            1 => write!(f, "{}", self.numerator),
            denominator => write!(f, "{}/{denominator}", self.numerator),
        }
    }
}

/// Converts `weights` to whole numbers in the same proportion, if their cycle is short enough.
/// Otherwise takes the nearest proportion with a short cycle, and adds a note.
fn whole(weights: &[Weight], what: &str, notes: &mut Vec<String>) -> Result<Vec<u64>> {
    if weights.iter().all(|weight| weight.numerator == 0) {
        return Err(Error::config(format!("{what} are all 0: at least one must be more")));
    }
    if let Some(exact) = in_proportion(weights) {
        return Ok(exact);
    }
    let simple: Vec<Weight> = weights.iter().map(|weight| weight.simplest()).collect();
    let rounded = match in_proportion(&simple) {
        Some(rounded) => rounded,
        None => {
            // Shares of the longest cycle. `f64` is far more precise than one unit of it.
            let shares: Vec<f64> =
                simple.iter().map(|weight| weight.numerator as f64 / weight.denominator as f64).collect();
            let most = shares.iter().copied().fold(0.0, f64::max);
            let scaled: Vec<u64> = shares.iter().map(|share| (share / most * (1_u64 << 52) as f64) as u64).collect();
            let counts = apportioned(&scaled, MAX_CYCLE);
            let divisor = counts.iter().copied().fold(0, |a, b| gcd(a.into(), b.into()) as u64).max(1);
            counts.into_iter().map(|count| count / divisor).collect()
        }
    };
    if weights.iter().zip(&rounded).any(|(weight, count)| weight.numerator > 0 && *count == 0) {
        return Err(Error::config(format!(
            "{what} differ too much: the smallest is less than 1 of {MAX_CYCLE} sequences; raise it, or set it to 0"
        )));
    }
    let cycle: u64 = rounded.iter().sum();
    let shown: Vec<String> = rounded.iter().map(u64::to_string).collect();
    notes.push(format!("{what} are rounded to {}, in cycles of {cycle} sequences", shown.join(" : ")));
    Ok(rounded)
}

/// The smallest whole numbers in exactly the proportion of `weights`. `None` if their sum is too
/// large.
fn in_proportion(weights: &[Weight]) -> Option<Vec<u64>> {
    let denominator = weights
        .iter()
        .try_fold(1_u128, |all, weight| (all / gcd(all, weight.denominator)).checked_mul(weight.denominator))?;
    let scaled = weights.iter().map(|weight| weight.numerator.checked_mul(denominator / weight.denominator));
    let scaled: Vec<u128> = scaled.collect::<Option<_>>()?;
    let divisor = scaled.iter().copied().fold(0, gcd).max(1);
    let sum = scaled.iter().try_fold(0_u128, |sum, weight| sum.checked_add(weight / divisor))?;
    let fits = sum <= MAX_CYCLE.into();
    fits.then(|| scaled.into_iter().map(|weight| (weight / divisor) as u64).collect())
}

fn gcd(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Scales `weights` to the sum `cycle`. The largest remainders get the units that rounding leaves.
/// If remainders are equal, the first of them gets its unit first.
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
        let mixture = MixtureSettings::parse(
            r#"{"sources": [{"name": "a", "data": "a/", "weight": 0.7}, {"name": "b", "data": ["b", "c"], "weight": 0.1, "epochs": 3},
                {"name": "c", "data": "c", "weight": 0.2, "epochs": null}],
                "stages": [{"at_tokens": 1000, "ramp_sequences": 5, "weights": {"c": 4, "b": 6}},
                           {"at_step": 10, "global_batch": 50, "weights": {"a": 1}}]}"#,
        )
        .unwrap();
        let stages = mixture.stages(3).unwrap();
        let weights: Vec<_> = stages.iter().map(|stage| (stage.start, stage.ramp, stage.weights.clone())).collect();
        assert_eq!(weights, [(0, 0, vec![7, 1, 2]), (334, 5, vec![0, 3, 2]), (500, 0, vec![1, 0, 0])]);
        assert_eq!(mixture.sources.iter().map(|source| source.epochs).collect::<Vec<_>>(), [Some(1), Some(3), None]);
        let error = mixture.stages(2).unwrap_err().to_string();
        assert!(
            error.contains("stages[1] begins at sequence 500, before the one before it is complete at 505"),
            "{error}"
        );
    }

    fn of_weights(weights: &[&str]) -> (Vec<u64>, Vec<String>) {
        let source =
            |(index, weight): (usize, &&str)| format!(r#"{{"name": "{index}", "data": "x", "weight": {weight}}}"#);
        let sources: Vec<String> = weights.iter().enumerate().map(source).collect();
        let mixture = MixtureSettings::parse(&format!(r#"{{"sources": [{}]}}"#, sources.join(", "))).unwrap();
        (mixture.stages(1).unwrap()[0].weights.clone(), mixture.notes)
    }

    #[test]
    fn weights_are_kept_exactly_where_that_is_possible() {
        for (weights, expected) in [
            (&["0.7", "0.1", "0.2"][..], &[7, 1, 2][..]),
            (&[r#""1/3""#, r#""2/3""#], &[1, 2]),
            (&[r#""1/3""#, "0.5", r#"" 1 / 6 ""#], &[2, 3, 1]),
            (&[r#""0.25""#, "0.75"], &[1, 3]),
            (&["0.333333333", "0.333333333", "0.333333333"], &[1, 1, 1]),
            (&["0.3333", "0.6667"], &[3333, 6667]),
            // Numbers with twice the same digits are in the proportion 1 to 2.
            (&["0.3333333333333333", "0.6666666666666666"], &[1, 2]),
            (&["1e-6", "1"], &[1, 1_000_000]),
            (&["0.12345678", "0.87654322"], &[6_172_839, 43_827_161]),
            (&["0", "3"], &[0, 1]),
            (&["50000000", "50000000"], &[1, 1]),
        ] {
            assert_eq!(of_weights(weights), (expected.to_vec(), vec![]), "{weights:?}");
        }
    }

    #[test]
    fn weights_with_too_many_digits_are_rounded_with_a_note() {
        for (weights, expected) in [
            (&["0.333333333", "0.666666667"][..], &[1, 2][..]),
            (&["0.3333333333333333", "0.6666666666666667"], &[1, 2]),
            (&["0.14285714285714285", "0.8571428571428572"], &[1, 6]),
            (&["0.16666666666666666", "0.5", "0.3333333333333333"], &[1, 3, 2]),
            (&["33.333333333333336", "66.66666666666667"], &[1, 2]),
            (&["0.30000000000000004", "0.7"], &[3, 7]),
        ] {
            let (found, notes) = of_weights(weights);
            assert_eq!(found, expected, "{weights:?}");
            let [note] = notes.as_slice() else { panic!("{weights:?}: {notes:?}") };
            let shown: Vec<String> = expected.iter().map(u64::to_string).collect();
            let sum: u64 = expected.iter().sum();
            let end = format!("are rounded to {}, in cycles of {sum} sequences", shown.join(" : "));
            assert!(note.starts_with("`mixture`: the weights of the sources") && note.ends_with(&end), "{note}");
        }
        // No simple fractions are near, so that the longest cycle is used.
        let (found, notes) = of_weights(&["0.1234567891", "0.2718281828459045", "0.6047150280540955"]);
        assert!(found.iter().sum::<u64>() <= MAX_CYCLE && notes.len() == 1, "{found:?}");
        let sum = found.iter().sum::<u64>() as f64;
        for (count, weight) in found.iter().zip([0.1234567891, 0.2718281828459045, 0.6047150280540955]) {
            assert!((*count as f64 / sum - weight).abs() < 2e-8, "{found:?}");
        }
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
                "`sources[0].weight` must be a number from 0, or a fraction such as \"1/3\", found -1",
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
                r#"{"sources": [{"name": "a", "data": "a", "weight": 1e-12}, {"name": "b", "data": "b", "weight": 1}]}"#,
                "differ too much: the smallest is less than 1 of 100000000 sequences",
            ),
            (r#"{"sources": [{"name": "a", "data": "a", "weight": "1/0"}]}"#, "or a fraction such as"),
            (r#"{"sources": [{"name": "a", "data": "a", "weight": "a third"}]}"#, "found \"a third\""),
            (r#"{"sources": [{"name": "a", "data": "a", "weight": "-1/3"}]}"#, "`sources[0].weight` must be"),
        ] {
            let error = MixtureSettings::parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
