//! Numbers and lines as people read them.

use std::io::{Result, Write};

/// `1234567` as `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number of things: `1 shard`, `2,000 shards`.
pub(crate) fn number_of(number: u64, what: &str) -> String {
    let ending = match what {
        _ if number == 1 => "",
        what if what.ends_with('s') => "es",
        _ => "s",
    };
    format!("{} {what}{ending}", grouped(number))
}

/// Bytes in a unit that leaves few digits.
pub(crate) fn bytes(number: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if number >> shift > 0 {
            return format!("{:.1} {unit}", number as f64 / (1_u64 << shift) as f64);
        }
    }
    format!("{number} bytes")
}

/// A fact under its name.
pub(crate) fn line(out: &mut dyn Write, name: &str, text: &str) -> Result<()> {
    writeln!(out, "{name:<11} {text}")
}

/// Amount by name, as in `3 parquet, 1 arrow file`; the name alone where there is only one.
pub(crate) fn counted<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let counts = counts(names);
    match counts.as_slice() {
        [] => "-".to_owned(),
        [(name, _)] => name.clone(),
        many => many.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", "),
    }
}

/// How often each text occurs, in the order of first occurrence.
pub(crate) fn counts<T: AsRef<str>>(texts: impl IntoIterator<Item = T>) -> Vec<(String, usize)> {
    let mut counts: Vec<(String, usize)> = Vec::new();
    for text in texts {
        match counts.iter_mut().find(|(known, _)| known == text.as_ref()) {
            Some((_, count)) => *count += 1,
            None => counts.push((text.as_ref().to_owned(), 1)),
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_singular() {
        let found = [(1, "shard"), (0, "shard"), (1, "pass"), (2_000, "pass")].map(|(n, what)| number_of(n, what));
        assert_eq!(found, ["1 shard", "0 shards", "1 pass", "2,000 passes"]);
    }

    #[test]
    fn numbers_are_readable() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (123_456, "123,456"), (1_234_567, "1,234,567")]
        {
            assert_eq!(grouped(number), text);
        }
        for (number, text) in [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")] {
            assert_eq!(bytes(number), text);
        }
        assert_eq!(counted(["a", "a"]), "a");
        assert_eq!(counted(["a", "b", "a"]), "2 a, 1 b");
    }
}
