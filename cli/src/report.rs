//! Writes numbers, names and lines for readers.

use std::io::{Result, Write};

pub(crate) use forebay::text::{bytes, escaped, grouped, number_of, plural};

/// Writes bytes like [`bytes`], and adds the exact number if that is rounded.
pub(crate) fn exact_bytes(number: u64) -> String {
    let is_exact = [40, 30, 20, 10].iter().any(|shift| number >> shift > 0 && number.trailing_zeros() >= *shift);
    if is_exact || number < 1 << 10 { bytes(number) } else { format!("{} ({})", bytes(number), number) }
}

/// Writes a fact after its name.
pub(crate) fn line(out: &mut dyn Write, name: &str, text: &str) -> Result<()> {
    writeln!(out, "{name:<11} {}", escaped(text))
}

/// Escapes a report of one or several faults, one per line.
///
/// Leaves out the trace of a cause, because flatbuffers adds a line for each table on the way to
/// it.
pub(crate) fn escaped_faults(report: &str) -> String {
    const NEXT: &str = "\n  - ";
    let without_trace = |fault: &'_ str| escaped(fault.split("\n\t").next().unwrap_or(fault)).into_owned();
    report.split(NEXT).map(without_trace).collect::<Vec<_>>().join(NEXT)
}

/// Writes names in backticks, with commas between them.
pub(crate) fn names<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> String {
    names.into_iter().map(|name| format!("`{}`", name.as_ref())).collect::<Vec<_>>().join(", ")
}

/// Writes how often each name occurs, as in `3 parquet, 1 arrow file`. Writes a single name alone.
pub(crate) fn counted<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let counts = counts(names);
    match counts.as_slice() {
        [] => "-".to_owned(),
        [(name, _)] => name.clone(),
        many => many.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", "),
    }
}

/// Counts how often each text occurs, in the order of first occurrence.
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
    fn nouns_agree_with_their_numbers() {
        for (number, noun, text) in [
            (1, "shard", "1 shard"),
            (0, "shard", "0 shards"),
            (1, "pass", "1 pass"),
            (2_000, "pass", "2,000 passes"),
            (3, "batch", "3 batches"),
            (2, "torn line", "2 torn lines"),
            (2, "copy", "2 copies"),
            (2, "day", "2 days"),
        ] {
            assert_eq!(number_of(number, noun), text);
        }
    }

    #[test]
    fn numbers_are_readable() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (123_456, "123,456"), (1_234_567, "1,234,567")]
        {
            assert_eq!(grouped(number), text);
        }
        for (number, text) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1023, "1,023 bytes"),
            (1536, "1.5 KiB"),
            (512 << 20, "512 MiB"),
            (5 << 30, "5 GiB"),
        ] {
            assert_eq!(bytes(number), text);
            assert!(exact_bytes(number).starts_with(text), "{number}");
        }
        assert_eq!(exact_bytes(512 << 20), "512 MiB");
        assert_eq!(exact_bytes(1_234_567_890), "1.1 GiB (1234567890)");
        assert_eq!(counted(["a", "a"]), "a");
        assert_eq!(counted(["a", "b", "a"]), "2 a, 1 b");
    }

    #[test]
    fn what_would_reach_the_terminal_is_escaped() {
        assert_eq!(escaped("input_ids, größe, 漢字"), "input_ids, größe, 漢字");
        assert_eq!(escaped("a\u{1b}[2Jb\nc\u{202e}d"), "a\\u{1b}[2Jb\\nc\\u{202e}d");
        assert_eq!(escaped_faults("2 faults found:\n  - a\tb\n  - c"), "2 faults found:\n  - a\\tb\n  - c");
        assert_eq!(escaped_faults("damaged: out of bounds.\n\twhile verifying\n\tin"), "damaged: out of bounds.");
    }
}
