//! Text: writes numbers and names as people read them.

use std::borrow::Cow;

/// Writes `1234567` as `1,234,567`.
pub fn grouped(number: u64) -> String {
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

/// Writes a number with its noun: `1 shard`, `2,000 shards`, `3 batches`.
pub fn number_of(number: u64, noun: &str) -> String {
    format!("{} {}", grouped(number), plural(number, noun))
}

/// The form of `noun` that agrees with `number`: `batch` or `batches`, `copy` or `copies`,
/// `rank` or `ranks`.
pub fn plural(number: u64, noun: &str) -> Cow<'_, str> {
    // The end of `epoch` sounds like a k.
    let is_hissed = !noun.ends_with("epoch") && ["s", "x", "ch", "sh"].iter().any(|ending| noun.ends_with(ending));
    match noun.strip_suffix('y') {
        _ if number == 1 => noun.into(),
        Some(stem) if !stem.ends_with(['a', 'e', 'o', 'u']) => format!("{stem}ies").into(),
        _ if is_hissed => format!("{noun}es").into(),
        _ => format!("{noun}s").into(),
    }
}

/// Writes bytes in the largest unit that they fill: `512 MiB`, `1.5 KiB`, `17 bytes`.
pub fn bytes(number: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if number >> shift > 0 {
            let text = format!("{:.1}", number as f64 / (1_u64 << shift) as f64);
            return format!("{} {unit}", text.strip_suffix(".0").unwrap_or(&text));
        }
    }
    number_of(number, "byte")
}

/// Escapes the characters of `text` that would move the cursor, change the terminal, or hide.
///
/// Names of columns and files come from outside, and any of these may be in them.
pub fn escaped(text: &str) -> Cow<'_, str> {
    let is_hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    if !text.contains(is_hidden) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_hidden(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out.into()
}
